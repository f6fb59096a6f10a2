"""How the Triton operators are registered and their kernels launched."""

import functools
from collections.abc import Callable, Sequence
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


def wrap_triton(kernel: Any) -> Any:
    """`wrap_triton(kernel)[grid](...)` launches `kernel`, eagerly, traced by torch.compile or in the interpreter."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def autotune(configs: Sequence[tuple[int, int]], key: Sequence[str]) -> Callable[[Any], Any]:
    """Choose (num_warps, num_stages) by timing, once for each value of `key`, and keep the choice on disk.

    Only for kernels whose sums do not depend on the number of warps (a tl.dot does not, a tl.sum does): the choice may
    differ between machines, the bits may not. In the interpreter there is nothing to choose.
    """
    if INTERPRETED:
        return lambda kernel: kernel
    choices = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in configs]
    return triton.autotune(choices, key=list(key), cache_results=True)


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
