"""Compile what the operators launch, for GPUs that are not there; one JSON object a line.

Runs as a process of its own, without TRITON_INTERPRET: the interpreter's kernels cannot be compiled.
`python compile_kernels.py INDEX COUNT` takes every COUNT-th launch from INDEX on.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from aot_cases import CASES, Case
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lcr2s_ext.triton import MODULES, _launch, load, tile_loads

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGpu:
    """As much of a driver as triton's compilation asks for."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Launch:
    case: Case
    architecture: int
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def variant(self) -> tuple[Any, ...]:
        """What tells its binary from others', but for what triton makes of the values of integers."""
        kinds = tuple((type(arg), getattr(getattr(arg, "base", arg), "dtype", None)) for arg in self.args)
        wgmma = self.kernel_name() in self.case.wgmma
        return self.kernel_name(), self.architecture, kinds, tuple(sorted(self.options.items())), wgmma

    def kernel_name(self) -> str:
        return getattr(self.kernel, "fn", self.kernel).__name__


def launches(case: Case, architecture: int) -> list[Launch]:
    """What `case` launches on such a GPU: its body runs on meta tensors."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: recorded.append(
                Launch(case, architecture, self._kernel, grid, args, options)
            )

    _launch.off_cuda_capability = architecture
    for module in [m for name, m in sys.modules.items() if name.startswith("lcr2s_ext.triton.")]:
        if hasattr(module, "wrap_triton"):
            module.wrap_triton = Recorder
    # As in an eager call: torch would record a launch outside of one.
    _launch.is_traced = lambda kernel: False
    with tile_loads(case.loads):
        _launch.BODIES[case.op](*case.arguments())
    return recorded


def compiled(launch: Launch) -> Iterator[tuple[Any, Any]]:
    """(kernel, its binary), one for each configuration that autotuning would try."""
    driver.set_active(AbsentGpu(launch.architecture))
    kernel = launch.kernel
    configs = [config.all_kwargs() for config in kernel.configs] if hasattr(kernel, "configs") else [{}]
    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    for config in configs:
        yield kernel, kernel.warmup(*launch.args, grid=launch.grid, **launch.options, **config)


def resources(binary: bytes) -> dict[str, int]:
    """Registers, and the bytes of stack and local memory of a thread: where there is a spill there is a stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(re.findall(rf"{key}:(\d+)", text)[-1]) for key in ("REG", "STACK", "LOCAL")}


def describe(launch: Launch, kernel: Any, result: Any) -> dict[str, Any]:
    return {
        "op": launch.case.op,
        "kernel": kernel.__name__,
        "architecture": launch.architecture,
        "threads": 32 * result.metadata.num_warps,
        "shared": result.metadata.shared,
        "loads": launch.options.get("LOADS", 0),
        "tma": "cp.async.bulk.tensor" in result.asm["ptx"],
        # (block of the descriptor, block in shared memory) of every copy.
        "copies": re.findall(
            r"async_tma_copy_global_to_local .*tensordesc<(?:tensor<)?([\dx]+)x.*-> !ttg.memdesc<([\dx]+)x",
            result.asm["ttgir"],
        ),
        "specialized": "ttg.warp_specialize(" in result.asm["ttgir"] and "setmaxnreg" in result.asm["ptx"],
        "wgmma": "wgmma.mma_async" in result.asm["ptx"],
        "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S+", result.asm["ptx"]))),
        "wants_wgmma": kernel.__name__ in launch.case.wgmma,
        **resources(result.asm["cubin"]),
    }


def main() -> None:
    for module in sorted(set(MODULES.values())):
        load(module)
    index, count = int(sys.argv[1]), int(sys.argv[2])
    every = [launch for case in CASES for architecture in case.architectures for launch in launches(case, architecture)]
    different = {launch.variant(): launch for launch in every}
    for launch in list(different.values())[index::count]:
        for kernel, result in compiled(launch):
            print(json.dumps(describe(launch, kernel, result)), flush=True)


if __name__ == "__main__":
    main()
