"""Loads the compiled library, once, and remembers why when that fails."""

import os
import warnings
from pathlib import Path

import torch

# LCR2S_LIBRARY names another build of the library, such as one with sanitizers.
_PATH = Path(os.environ.get("LCR2S_LIBRARY") or Path(__file__).resolve().parent.parent / "liblcr2s.so")
ISA_NAMES = ("portable", "avx2", "avx512", "avx512_bf16")


def _load() -> str | None:
    if not _PATH.exists():
        return f"{_PATH} does not exist: this installation was built without the compiled library"
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        # The reason is part of every BackendUnavailableError, the loader's own words (torch keeps them in the cause)
        # included; the reference and Triton backends still work.
        message = f"{_PATH} could not be loaded by torch {torch.__version__}: {error.__cause__ or error}"
        warnings.warn(f"lcr2s_ext: {message}", RuntimeWarning, stacklevel=3)
        return message
    return None


LOAD_ERROR: str | None = _load()
"""Why the compiled library is not there, or None when it is loaded."""


def compiled() -> bool:
    """Whether the compiled library is loaded."""
    return LOAD_ERROR is None


def _kernels() -> frozenset[tuple[str, str]]:
    return frozenset(
        (name.removeprefix("lcr2s::").removesuffix("."), device)
        for device in ("cpu", "cuda")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(device.upper())
        if name.startswith("lcr2s::")
    )


KERNELS: frozenset[tuple[str, str]] = _kernels()
"""(operator, "cpu" or "cuda") of every kernel in the library; a constant, so that torch.compile can trace through."""


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the loaded library holds a kernel of `op` for "cpu" or "cuda" tensors."""
    return (op, device_type) in KERNELS
