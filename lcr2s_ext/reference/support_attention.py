"""Ragged multi-head attention over support sets in plain PyTorch."""

import torch
from torch import Tensor


def support_attention(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, entry_rows: Tensor, scale: float
) -> Tensor:
    """Attention of every query over its own support rows, differentiable any number of times.

    Args:
        query: (B, H, D).
        key: (M, H, D).
        value: (M, H, Dv).
        indices: (nnz,) int64, the pool row of each entry.
        entry_rows: (nnz,) int64, the query of each entry.
        scale: factor of the scores.

    Returns:
        (B, H, Dv); zeros for a query without entries. Half dtypes are computed in float32.
    """
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (tensor.to(statistics) for tensor in (query, key, value))
    heads = q.shape[:2]
    scores = (q[entry_rows] * k[indices]).sum(-1) * scale
    rows = entry_rows.unsqueeze(1).expand_as(scores)
    maxima = scores.new_zeros(heads).scatter_reduce(0, rows, scores.detach(), "amax", include_self=False)
    weights = (scores - maxima[entry_rows]).exp()
    probs = weights / weights.new_zeros(heads).index_add(0, entry_rows, weights)[entry_rows]
    out = v.new_zeros(*heads, v.shape[2]).index_add(0, entry_rows, probs.unsqueeze(-1) * v[indices])
    return out.to(query.dtype)
