"""How the Triton operators are registered and their kernels launched."""

import contextvars
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from lcr2s_ext.triton import INTERPRETED

Operator = Callable[..., Any]

BODIES: dict[str, Operator] = {}
"""Operator name -> the function that allocates and launches; called directly, it also runs on meta tensors."""


def operator(body: Operator, *, opaque: bool = INTERPRETED) -> Operator:
    """Register `body` as torch.ops.lcr2s_triton.<its name>; its annotations give the schema.

    torch.compile sees the kernels inside, unless the operator is opaque: because it reads values on the host, or in the
    interpreter, where there is nothing to see.
    """

    @functools.wraps(body)
    def on_its_device(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        # Triton launches on the current device, whatever the tensors'.
        if device.type == "cuda" and torch.cuda.is_initialized() and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return body(*args, **kwargs)
        return body(*args, **kwargs)

    name = body.__name__
    BODIES[name] = body
    if opaque:
        # What reads on the host cannot be captured; the interpreter's tensors are on the CPU.
        tags = (torch.Tag.cudagraph_unsafe,)
        return torch.library.custom_op(f"lcr2s_triton::{name}", on_its_device, mutates_args=(), tags=tags)
    return torch.library.triton_op(f"lcr2s_triton::{name}", on_its_device, mutates_args=())


AUTOTUNE = os.environ.get("LCR2S_TRITON_AUTOTUNE") == "1"
"""Time how many pipeline stages suit the losses' matrix kernels, once for each of TUNED_BY; keep the choice on disk."""

STAGES = (2, 3, 4)
"""What is tried: fewer stages leave room for more programs, more hide longer loads. Stages move no bit of a result;
tile sizes and warps would, for sums are cut by them, and stay fixed."""

TUNED_BY = ("padded_width", "KIND", "LOADS", "PRECISION")
"""Arguments of a kernel that get a choice of their own, beside the dtypes of its tensors."""


@functools.cache
def _tuned(kernel: Any, warps: int) -> Any:
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for stages in STAGES]
    key = [name for name in TUNED_BY if name in kernel.arg_names]
    return triton.autotune(configs, key=key, cache_results=True)(kernel)


class _Tunable:
    """Launches a matrix kernel of the losses with the number of stages that was fastest."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> Any:
            if constants.get("KEPT"):
                # Writes over what it reads: a second run, to time it, would read something else.
                options = {"num_warps": num_warps, "num_stages": num_stages}
                return torch.library.wrap_triton(self.kernel)[grid](*args, **constants, **options)
            return torch.library.wrap_triton(_tuned(self.kernel, num_warps))[grid](*args, **constants)

        return launch


def wrap_triton(kernel: Any) -> Any:
    """`wrap_triton(kernel)[grid](...)` launches `kernel`, eagerly, traced by torch.compile or in the interpreter."""
    if INTERPRETED:
        return kernel
    if AUTOTUNE and "PIECES" in kernel.arg_names:
        return _Tunable(kernel)
    return torch.library.wrap_triton(kernel)


def is_traced(kernel: Any) -> bool:
    """Whether torch.compile is recording launches, for which torch takes descriptors made on the host for constants."""
    return not INTERPRETED and torch.library.wrap_triton(kernel) is not kernel


def with_workspace(launch: Callable[[], Any], device: torch.device) -> None:
    """Launch kernels that make descriptors, which Triton keeps in memory of the launch; torch allocates it."""

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    # In a context of its own, so that the caller's allocator stays what it was.
    contextvars.copy_context().run(run)


off_cuda_capability = 80
"""What :func:`capability` says in the interpreter, and on meta tensors, where kernels are compiled ahead of time."""


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0."""
    if device.type != "cuda":
        return off_cuda_capability
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def input_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: exact float32 products unless the user allows TF32."""
    # Says so whichever way the user took; `allow_tf32` raises where it was the newer one.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
