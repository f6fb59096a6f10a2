"""Which implementation of an operator runs, and why the others cannot."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lcr2s_ext import triton
from lcr2s_ext.ops import _dispatch, _library

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

OPERATORS = (
    "support_attention",
    "info_nce",
    "sdm",
    "cmpm",
    "tal",
    "relation_frobenius",
    "relation_kl",
    "topk_similarity",
    "retrieval_metrics",
)
"""Every operator, by its name in torch.ops.lcr2s."""

TRITON_OPS: frozenset[str] = frozenset(triton.MODULES)
"""Operators that have a Triton kernel."""


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run this call here; the message says why."""


class _State:
    backend = "auto"


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}; got {backend!r}")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run the operators called inside the `with` block on one backend.

    Args:
        backend: "auto" (the compiled library; on CUDA without one, Triton), "reference" (plain PyTorch), "cpu", "cuda"
            or "triton". A `backend=` argument of an operator wins over this. The choice is process-wide, and a
            backward pass always runs on the backend of its forward, wherever it is called.

    Raises:
        ValueError: for another name.
    """
    _check_name(backend)
    previous = _State.backend
    _State.backend = backend
    try:
        yield
    finally:
        _State.backend = previous


def unavailable_reason(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on tensors of `device`; None when it can."""
    if backend == "reference":
        return None
    if backend in ("cpu", "cuda"):
        if device.type != backend:
            return f"the tensors are on {device}, this backend needs {backend} tensors"
        if not _library.compiled():
            return f"the compiled library is missing: {_library.LOAD_ERROR}"
        if not _library.has_kernel(op, backend):
            return f"this build holds no {backend} kernel for {op}"
        return None
    if triton.UNAVAILABLE is not None:
        return triton.UNAVAILABLE
    if op not in TRITON_OPS:
        return f"this version has no Triton kernel for {op}"
    wanted = "cpu" if triton.INTERPRETED else "cuda"
    if device.type != wanted:
        interpreter = " in the interpreter (TRITON_INTERPRET)" if triton.INTERPRETED else ""
        return f"the tensors are on {device}, Triton kernels need {wanted} tensors{interpreter}"
    return None


def resolve(op: str, backend: str | None, device: torch.device, rows: int | None = None) -> str:
    """The backend that runs `op` for tensors on `device`: "reference", "cpu", "cuda" or "triton".

    Args:
        op: operator name in torch.ops.lcr2s.
        backend: the caller's choice; None: that of :func:`use_backend`.
        device: of the call's tensors.
        rows: of the call's first tensor. On a GPU "auto" prefers CUDA or Triton by the table of `_dispatch`.

    Raises:
        ValueError: `backend` is not a backend's name.
        BackendUnavailableError: it cannot run here.
    """
    chosen = _State.backend if backend is None else backend
    _check_name(chosen)
    if chosen == "auto":
        if device.type != "cuda":
            candidates: tuple[str, ...] = ("cpu",)
        elif _dispatch.choice(op, rows).backend == "cuda":
            candidates = ("cuda", "triton")
        else:
            candidates = ("triton", "cuda")
    else:
        candidates = (chosen,)
    reasons = []
    for candidate in candidates:
        reason = unavailable_reason(op, candidate, device)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailableError(
        f"{op}: backend {chosen!r} cannot run here ({'; '.join(reasons)}). "
        "backend='reference' runs plain PyTorch anywhere."
    )


def with_passes(op: str, backend: str, dtype: torch.dtype) -> str | None:
    """The backend whose kernels work on blocks of a loss's matrix for `backend`, one that :func:`resolve` returned.

    Args:
        op: the operator of the first pass, in torch.ops.lcr2s.
        backend: what runs the loss in one process.
        dtype: of its statistics.

    Returns:
        `backend` itself where it has the passes; for CUDA without them Triton, if it runs here; None: there is none.
    """
    if backend in ("reference", "triton") or _library.has_kernel(op, backend):
        return backend
    usable = triton.UNAVAILABLE is None and not triton.INTERPRETED
    return "triton" if backend == "cuda" and usable and dtype != torch.float64 else None


def explain(op: str, *tensors: Tensor) -> str:
    """Say which backend `op` would use for these tensors, and why the others cannot.

    Args:
        op: operator name, such as "support_attention" or "sdm_loss".
        tensors: the tensors of the call; the device and the number of rows of the first are looked at. None means the
            CPU.

    Returns:
        One line for each backend, and what a GPU would take by default and on what grounds.
    """
    name = op.removesuffix("_loss")
    device = tensors[0].device if tensors else torch.device("cpu")
    rows = tensors[0].shape[0] if tensors and tensors[0].dim() else None
    try:
        chosen: str | None = resolve(name, None, device, rows)
    except BackendUnavailableError:
        chosen = None
    lines = [f"{op} on {device}:"]
    for backend in BACKENDS[1:]:
        reason = unavailable_reason(name, backend, device)
        state = "runs" if backend == chosen else "available on request" if reason is None else f"no: {reason}"
        lines.append(f"  {backend:<10} {state}")
    lines.append(f"  {_dispatch.describe(name, rows)}")
    return "\n".join(lines)
