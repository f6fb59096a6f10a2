"""Registers, shared memory and spills of every CUDA kernel, as ptxas reported them when the library was built.

`python python_tests/cuda/test_resources.py` (`make resources`) prints them as a table.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORTS = Path(os.environ.get("LCR2S_BUILD_DIR", ROOT / "build" / "cmake")) / "ptxas"
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")

# Bytes of stack that are no spill. Two weights that the compiler insists on picking from memory, once a tile.
STACK = {"similarity_cooperative_kernel": 16}


@dataclass
class Resources:
    """What one kernel takes on one architecture; bytes but for the registers."""

    kernel: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0


def parse(report: str) -> list[Resources]:
    """ptxas -v; functions that a kernel calls count as the kernel's."""
    found: list[Resources] = []
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            found.append(Resources(entry[1], entry[2]))
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if not found:
                raise ValueError(f"a stack frame before any kernel: {line}")
            found[-1].stack += int(frame[1])
            found[-1].spills += int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            found[-1].registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1].shared = int(shared[1]) if shared else 0
    return found


def readable(names: list[str]) -> dict[str, str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shortened = []
    for name in text.splitlines():
        name = name.replace("(anonymous namespace)::", "").replace("lcr2s::cuda::", "").removeprefix("void ")
        shortened.append(re.sub(r"(?<=[\w>])\(.*$", "", name))
    return dict(zip(names, shortened, strict=True))


def resources() -> dict[str, list[Resources]]:
    """By source file, with readable names."""
    found = {path.name.removesuffix(".ptxas"): parse(path.read_text()) for path in sorted(REPORTS.glob("*.ptxas"))}
    names = readable(sorted({r.kernel for kernels in found.values() for r in kernels}))
    for kernels in found.values():
        for kernel in kernels:
            kernel.kernel = names[kernel.kernel]
    return found


def table(found: dict[str, list[Resources]]) -> str:
    kernels = [kernel for file in found.values() for kernel in file]
    architectures = sorted({kernel.architecture for kernel in kernels}, key=lambda a: int(re.sub(r"\D", "", a)))
    static = max((kernel.shared for kernel in kernels), default=0)
    lines = [
        "kernel: registers, +bytes of spills, /bytes of stack, on " + ", ".join(architectures),
        f"static shared memory: at most {static} bytes; dynamic: what a launch asks for (docs/kernels.md)",
    ]
    for name in dict.fromkeys(kernel.kernel for kernel in kernels):
        cells = []
        for architecture in architectures:
            one = [k for k in kernels if (k.kernel, k.architecture) == (name, architecture)]
            spills = f"+{one[0].spills}" if one and one[0].spills else ""
            stack = f"/{one[0].stack}" if one and one[0].stack else ""
            cells.append(f"{one[0].registers}{spills}{stack}" if one else "-")
        lines.append(f"{name}: " + " ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(resources()))
elif NVCC is None:
    pytest.skip("no nvcc on PATH: no CUDA kernel was compiled", allow_module_level=True)


def test_a_spill_is_seen() -> None:
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5lcr2s4cuda4someIfEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN5lcr2s4cuda4someIfEEvi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 16 bytes cumulative stack size, 32 bytes smem, 564 bytes cmem[0]
"""
    assert parse(report) == [Resources("_ZN5lcr2s4cuda4someIfEEvi", "sm_80", 40, 32, 16, 20)]
    assert readable(["_ZN5lcr2s4cuda4someIfEEvi"]) == {"_ZN5lcr2s4cuda4someIfEEvi": "some<float>"}


def test_every_file_was_compiled_for_every_architecture() -> None:
    found = resources()
    files = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert files <= found.keys(), "no ptxas report: run `make build`"
    architectures = {kernel.architecture for file in files for kernel in found[file]}
    for file in files:
        assert {kernel.architecture for kernel in found[file]} == architectures, file


def test_no_kernel_spills_or_has_static_shared_memory() -> None:
    found = resources()
    print(table(found))
    files = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    kernels = [kernel for file in files for kernel in found[file]]
    assert kernels
    assert [kernel for kernel in kernels if kernel.spills] == []
    assert [kernel for kernel in kernels if kernel.stack > STACK.get(kernel.kernel.split("<")[0], 0)] == []
    assert [kernel for kernel in kernels if kernel.shared] == []
