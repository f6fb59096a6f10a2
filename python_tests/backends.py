"""The backends that a test body runs on, here or on a machine with a GPU, and moving a problem to one of them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lcr2s_ext import triton
from lcr2s_ext.ops import SupportIndex

DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "cuda": "cuda",
    "triton": "cpu" if triton.INTERPRETED else "cuda",
}
"""Backend -> device type of the tensors that it takes."""

MISSING: dict[str, str] = {}
"""Backend -> why this machine has none of its tests; the run's header says so."""
if not torch.cuda.is_available():
    MISSING["cuda"] = "no usable GPU"
if triton.UNAVAILABLE is not None:
    MISSING["triton"] = triton.UNAVAILABLE


def _here(names: Sequence[str]) -> list[str]:
    return [name for name in names or DEVICES if name not in MISSING]


def backends(*names: str) -> list[Any]:
    """Parameters for "backend", of those named (none: of all) that this machine has."""
    return [_parameter(name) for name in _here(names)]


def backends_and_dtypes(dtypes: Sequence[torch.dtype], *names: str) -> list[Any]:
    """Parameters for ("backend", "dtype"): every pair but float64 in Triton, which refuses it."""
    return [
        _parameter(name, dtype)
        for name in _here(names)
        for dtype in dtypes
        if not (name == "triton" and dtype == torch.float64)
    ]


def interpreted(backend: str) -> bool:
    """Whether Triton's interpreter is what runs: a tile is hundreds of calls of numpy there, so problems are small."""
    return backend == "triton" and triton.INTERPRETED


def widest_dtype(backend: str) -> torch.dtype:
    """The widest dtype that the backend takes."""
    return torch.float32 if backend == "triton" else torch.float64


def cases(keep: Callable[..., bool], *parameters: Iterable[Any], among: Sequence[Any]) -> list[Any]:
    """Every (*parameters, backend) for which keep(*parameters) holds, or whose backend is not interpreted."""
    return [
        pytest.param(*values, *backend.values, id="-".join([*map(str, values), *backend.values]))
        for *values, backend in itertools.product(*parameters, among)
        if not interpreted(backend.values[0]) or keep(*values)
    ]


def _parameter(backend: str, *more: Any) -> Any:
    name = "-".join([backend, *(str(value).removeprefix("torch.") for value in more)])
    return pytest.param(backend, *more, id=name)


def on(backend: str, value: Any) -> Any:
    """`value` on the device of `backend`: tensors and support indices, also inside lists, tuples and dicts."""
    if isinstance(value, (Tensor, SupportIndex)):
        return value.to(DEVICES[backend])
    if isinstance(value, (list, tuple)):
        return type(value)(on(backend, item) for item in value)
    if isinstance(value, dict):
        return {key: on(backend, item) for key, item in value.items()}
    return value
