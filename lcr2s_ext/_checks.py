"""Argument checks of the public operators: every message names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object, shape: str, dtypes: Sequence[torch.dtype] = FLOATING) -> Tensor:
    """Check that `value` is a tensor with the dimensions of `shape` (written like "(B, d)") and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor of shape {shape}, got {type(value).__name__}")
    dims = 0 if shape == "()" else shape.count(",") + (0 if shape.endswith(",)") else 1)
    if value.dim() != dims:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"`{name}` must have dtype {_names(dtypes)}, got {_names([value.dtype])}")
    return value


def check_size(name: str, value: Tensor, axis: int, expected: int, meaning: str) -> None:
    """Check one size of `value`; `meaning` says where the expected number comes from."""
    if value.shape[axis] != expected:
        raise ValueError(
            f"`{name}` must have size {expected} ({meaning}) in dimension {axis}, got {tuple(value.shape)}"
        )


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Check that `value` is on the device of `other` and, unless told otherwise, of its dtype."""
    if value.device != other.device:
        raise ValueError(f"`{name}` must be on the device of `{other_name}` ({other.device}), got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"`{name}` must have the dtype of `{other_name}` ({_names([other.dtype])}), got {_names([value.dtype])}"
        )


def check_ids(name: str, value: object, rows: int, other_name: str, other: Tensor) -> Tensor:
    """Check identity ids: (rows,) int32 or int64 on the device of `other`."""
    ids = check_tensor(name, value, "(N,)", INTEGER)
    check_size(name, ids, 0, rows, f"rows of `{other_name}`")
    check_like(name, ids, other_name, other, dtype=False)
    return ids


def check_nonempty(name: str, value: Tensor) -> None:
    """Refuse a batch without rows or without features."""
    if value.shape[0] == 0 or value.shape[-1] == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(value.shape)}")


def check_positive(name: str, value: object) -> float:
    """Check a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be a finite number above 0, got {value}")
    return float(value)


def check_backend_dtype(backend: str, **tensors: Tensor) -> None:
    """Refuse float64 where `backend`, the one that will run, has no kernels for it."""
    if backend == "triton":
        for name, value in tensors.items():
            if value.dtype == torch.float64:
                others = _names([dtype for dtype in FLOATING if dtype != torch.float64])
                raise TypeError(f"`{name}` must have dtype {others} on backend 'triton', got float64")


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Check that `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def check_scale(name: str, value: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A logit scale as a 0-dimensional tensor: a positive number or a one-element tensor (never read here)."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"`{name}` must have one element, got shape {tuple(value.shape)}")
        if value.dtype not in FLOATING:
            raise TypeError(f"`{name}` must have dtype {_names(FLOATING)}, got {_names([value.dtype])}")
        if value.device != device:
            raise ValueError(f"`{name}` must be on {device} like the features, got {value.device}")
        return value.reshape(()).to(dtype)
    return torch.full((), check_positive(name, value), dtype=dtype, device=device)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, sums and statistics for features of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
