"""Multi-head attention of every query over its own small set of pool rows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.ops import _backend, _registration
from lcr2s_ext.ops.support_index import SupportIndex
from lcr2s_ext.reference.support_attention import support_attention as _reference


def support_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    support: SupportIndex,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-head attention of query i over the pool rows of its support set.

    .. math:: out_i^h = \sum_{j \in S_i} \mathrm{softmax}_j(scale \cdot q_i^h \cdot k_j^h)\, v_j^h

    The attention inside the multi-head attentional fusion of LCR²S (Yan et al., ACM MM 2023, arXiv 2310.11210). Sets
    are ragged and gathered by index: nothing is padded, and no copy of the gathered rows is made. A row that occurs
    repeatedly in a set counts as often. Memory is O(nnz * H) beyond inputs and outputs.

    Args:
        query: (B, H, D) float32, float64 (not on "triton"), bfloat16 or float16. Half dtypes accumulate in float32.
        key: (M, H, D) of the dtype and on the device of `query`.
        value: (M, H, Dv), likewise; Dv may differ from D.
        support: B sets over M pool rows, on the same device.
        scale: factor of the scores, a finite number; None means 1 / sqrt(D).
        backend: "auto", "reference", "cpu", "cuda" or "triton"; None means that of :func:`use_backend`.

    Returns:
        (B, H, Dv) of the dtype of `query`. An empty set gives zeros and passes zero gradients on; NaN in a set's rows
        gives NaN. Differentiable once in query, key and value (any number of times on "reference").

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device; the message names it.
        BackendUnavailableError: the backend cannot run here.

    Under autocast the inputs are cast to the autocast dtype, as for matrix products.
    """
    _check(query, key, value, support)
    chosen_scale = _check_scale(scale, query.shape[2])
    chosen = _backend.resolve("support_attention", backend, query.device)
    _checks.check_backend_dtype(chosen, query=query, key=key, value=value)
    if chosen == "reference":
        device = query.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = _registration.cast_to_autocast((query, key, value), dtype)
        return _reference(query, key, value, support.indices, support.entry_rows, chosen_scale)
    out, _ = _operators(chosen).support_attention(
        query,
        key,
        value,
        support.indptr,
        support.indices,
        support.entry_rows,
        support.t_indptr,
        support.t_entries,
        chosen_scale,
        any(_registration.needs_grad(query, key, value)),
    )
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, support: SupportIndex) -> None:
    _checks.check_tensor("query", query, "(B, H, D)")
    _checks.check_tensor("key", key, "(M, H, D)")
    _checks.check_tensor("value", value, "(M, H, Dv)")
    if not isinstance(support, SupportIndex):
        raise TypeError(f"`support` must be a SupportIndex, got {type(support).__name__}")
    autocast = torch.is_autocast_enabled(query.device.type)
    for name, tensor in (("key", key), ("value", value)):
        # Under autocast everything but float64 is cast to one dtype.
        cast = autocast and torch.float64 not in (query.dtype, tensor.dtype)
        _checks.check_like(name, tensor, "query", query, dtype=not cast)
        _checks.check_size(name, tensor, 1, query.shape[1], "heads of `query`")
        _checks.check_size(name, tensor, 0, support.num_rows, "num_rows of `support`")
    _checks.check_size("key", key, 2, query.shape[2], "head width of `query`")
    if query.shape[2] == 0:
        raise ValueError(f"`query` must have a head width of at least 1, got shape {tuple(query.shape)}")
    _checks.check_size("query", query, 0, len(support), "sets of `support`")
    if support.device != query.device:
        raise ValueError(f"`support` must be on the device of `query` ({query.device}), got {support.device}")


def _check_scale(scale: float | None, width: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(width)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"`scale` must be a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite, got {scale}")
    return float(scale)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    entry_rows: Tensor,
    t_indptr: Tensor,
    t_entries: Tensor,
    scale: float,
    need_probs: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads = query.shape[:2]
    entries = indices.shape[0] if need_probs else 0
    probs = query.new_empty((entries, heads), dtype=_checks.statistics_dtype(query.dtype))
    return query.new_empty((batch, heads, value.shape[2])), probs


def _fake_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probs: Tensor,
    indptr: Tensor,
    indices: Tensor,
    entry_rows: Tensor,
    t_indptr: Tensor,
    t_entries: Tensor,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = ((query, need_query), (key, need_key), (value, need_value))
    grad_query, grad_key, grad_value = (like.new_empty(like.shape if needed else (0,)) for like, needed in operands)
    return grad_query, grad_key, grad_value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(namespace: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        if grad_out is None:
            return None, None, None, *nothing
        query, key, value, *index, probs = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        op = getattr(torch.ops, namespace).support_attention_backward
        grads = op(grad_out, query, key, value, probs, *index, ctx.scale, *needs)
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *nothing

    return backward


def _register(namespace: str) -> None:
    name = f"{namespace}::support_attention"
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_autograd(name, _backward(namespace), setup_context=_setup_context)
    torch.library.register_autograd(f"{name}_backward", _registration.no_double_backward("support_attention"))
    _registration.register_autocast(namespace, "support_attention", _registration.cast_to_autocast)


_operators = _registration.Operators("support_attention", _register)
