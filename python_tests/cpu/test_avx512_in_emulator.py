"""The AVX-512 copy of the CPU kernels, executed as machine code, by the processor emulator Bochs.

Needs `bochs` (Debian: the packages bochs and bochs-term; version 2.7 knows AVX-512, later ones AVX512_BF16 as well, and
LCR2S_BOCHS may name one) and a static glibc. `machine/` is what the emulated computer runs: a ROM in place of an
operating system, and one program with every kernel in two copies.
"""

import os
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

BOCHS = os.environ.get("LCR2S_BOCHS") or shutil.which("bochs")
ROOT = Path(__file__).resolve().parents[2]
MACHINE = Path(__file__).with_name("machine")
# Of a disk's cylinder, 16 heads of 63 sectors.
CYLINDER = 16 * 63 * 512
MIB = 1 << 20
ZMM_STATE = 0xE7
YMM_STATE = 0x07

pytestmark = [
    pytest.mark.skipif(BOCHS is None, reason="bochs is not installed"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="builds for x86-64"),
]


def avx512_options() -> list[str]:
    """As the library is compiled, from CMakeLists.txt."""
    calls = re.findall(r"lcr2s_cpu_kernels\((\w+) \d+ ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    return next(options.split() for isa, options in calls if isa == "avx512" and "avx512f" in options)


def emulated_model() -> str | None:
    """The newest processor with AVX-512 that this bochs has."""
    asked = subprocess.run([str(BOCHS), "--help", "cpu"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    known = asked.stdout + asked.stderr
    return next((name for name in ("sapphire_rapids", "tigerlake") if name in known), None)


class Computer:
    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model
        self.has_bf16 = model == "sapphire_rapids"
        self.program = folder / "kernels"
        self._build_program()
        self._build_rom()

    def _build_program(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        copies = {"avx2": (32, ["-mavx2", "-mfma", "-mf16c"]), "avx512": (64, avx512_options())}
        dispatch = ROOT / "csrc" / "cpu" / "dispatch.cpp"
        units: list[tuple[str, Path, list[str]]] = [
            ("kernels", MACHINE / "kernels.cpp", ["-O1"]),
            ("dispatch", dispatch, ["-O2"]),
        ]
        for source in sorted({*dispatch.parent.glob("*.cpp")} - {dispatch}):
            for isa, (width, options) in copies.items():
                defines = [f"-DLCR2S_ISA={isa}", f"-DLCR2S_VECTOR_BYTES={width}"]
                units.append((f"{source.stem}_{isa}", source, ["-O2", "-fno-math-errno", *defines, *options]))
        common = [compiler, "-std=gnu++20", "-DLCR2S_X86", "-Wno-psabi", f"-I{ROOT / 'csrc'}", "-c"]

        def compile_unit(unit: tuple[str, Path, list[str]]) -> str:
            name, source, options = unit
            compiled = str(self.folder / f"{name}.o")
            subprocess.run([*common, *options, str(source), "-o", compiled], check=True)
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        # The file's headers belong in the first segment, where the C library looks for them.
        link = [compiler, "-static", "-no-pie", "-Wl,-z,noseparate-code", *objects, "-o", str(self.program)]
        subprocess.run(link, check=True)

    def _build_rom(self) -> None:
        options = "-O1 -ffreestanding -fno-builtin -fno-pic -mno-red-zone -mgeneral-regs-only -fno-stack-protector"
        options += " -fcf-protection=none -fno-asynchronous-unwind-tables -static -nostdlib -Wl,--build-id=none"
        sources = [str(MACHINE / name) for name in ("boot.S", "machine.c")]
        linked = str(self.folder / "boot.elf")
        command = [
            os.environ.get("CC", "cc"),
            *options.split(),
            f"-Wl,-T,{MACHINE / 'boot.ld'}",
            *sources,
            "-o",
            linked,
        ]
        subprocess.run(command, check=True)
        rom = str(self.folder / "boot.rom")
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "-j", ".reset", linked, rom], check=True)

    def run(self, *arguments: str, state: int = ZMM_STATE, environment: tuple[str, ...] = ()) -> str:
        """What the program prints and how it ended, on a processor whose system saves `state` (XCR0)."""
        lists = [b"".join(word.encode() + b"\0" for word in words) for words in (("kernels", *arguments), environment)]
        program = self.program.read_bytes()
        header = struct.pack("<QQQ", state, 256 * MIB, len(program)) + lists[0] + b"\0" + lists[1] + b"\0"
        disk = header.ljust(512, b"\0") + program
        cylinders = -(-len(disk) // CYLINDER)
        (self.folder / "disk").write_bytes(disk.ljust(cylinders * CYLINDER, b"\0"))
        (self.folder / "none.rom").write_bytes(bytes(512))
        for display in ("nogui", "term"):
            (self.folder / "bochsrc").write_text(f"""
display_library: {display}
memory: guest=256, host=256
romimage: file={self.folder}/boot.rom, address=0xffff0000
vgaromimage: file={self.folder}/none.rom
vga: extension=none
cpu: model={self.model}, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none
ata0-master: type=disk, path={self.folder}/disk, mode=flat, cylinders={cylinders}, heads=16, spt=63
port_e9_hack: enabled=1
log: {self.folder}/log
panic: action=fatal
error: action=ignore
info: action=ignore
""")
            # A build with the debugger waits to be told to continue.
            done = subprocess.run(
                [str(BOCHS), "-q", "-f", str(self.folder / "bochsrc")],
                input=b"c\n",
                capture_output=True,
                timeout=1200,
                env={**os.environ, "TERM": "dumb"},
            )
            printed = done.stdout.decode(errors="replace")
            if "\nexit " in printed or "\nexception " in printed:
                return printed
        return printed + done.stderr.decode(errors="replace")


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Computer:
    model = emulated_model()
    if model is None:
        pytest.skip("this bochs has no processor with AVX-512")
    return Computer(tmp_path_factory.mktemp("computer"), model)


def test_copy_follows_the_processor_and_its_system(computer: Computer) -> None:
    best = "avx512_bf16" if computer.has_bf16 else "avx512"
    for expected, state, environment in [
        (best, ZMM_STATE, ()),
        ("avx512", ZMM_STATE, ("LCR2S_CPU_ISA=avx512",)),
        ("avx2", ZMM_STATE, ("LCR2S_CPU_ISA=avx2",)),
        ("avx2", YMM_STATE, ()),
        ("portable", 0, ()),
    ]:
        printed = computer.run(state=state, environment=environment)
        assert f"chosen: {expected}\n" in printed, printed


def test_without_its_registers_avx512_cannot_run(computer: Computer) -> None:
    """Invalid opcode: what ran in the other tests was AVX-512."""
    assert "\nexception 0000000000000006" in computer.run("all", state=YMM_STATE)


@pytest.mark.parametrize("limit", ["", "LCR2S_CPU_ISA=avx512"], ids=["best", "avx512"])
def test_kernels_agree_with_avx2(computer: Computer, limit: str) -> None:
    if limit and not computer.has_bf16:
        pytest.skip("is the best that this bochs has")
    printed = computer.run("all", environment=(limit,) if limit else ())
    assert "\nexit 0000000000000000" in printed, "\n".join(
        line for line in printed.splitlines() if re.search("MUCH|exception|exit|agree", line)
    )
