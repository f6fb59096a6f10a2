"""Cosine ranking in plain PyTorch: the whole score matrix is formed and sorted."""

import torch
from torch import Tensor

from lcr2s_ext.reference.similarity import _cosine


def _ranking(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Scores from high to low and the gallery index of each; equal scores by index."""
    with torch.autocast(query.device.type, enabled=False):
        scores = _cosine(query, gallery)[0]
    return torch.sort(scores, dim=1, descending=True, stable=True)


def topk_similarity(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`lcr2s_ext.ops.topk_similarity`."""
    values, indices = _ranking(query, gallery)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


def retrieval_statistics(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`lcr2s_ext.ops.retrieval_metrics` averages, for each query.

    Returns:
        (Q,) int64 number of positives, ranks from 1 of the first and of the last positive, and (Q,) float64 average
        precision, as a step function and with the trapezoids of the Market-1501 protocol. A query without a positive
        has zeros.
    """
    order = _ranking(query, gallery)[1]
    return ranking_statistics(gallery_ids[order] == query_ids[:, None])


def ranking_statistics(hit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of :func:`retrieval_statistics` of (Q, P) bool: whether the row at each rank is a positive."""
    positives = hit.sum(1)
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    first = torch.where(positives > 0, hit.to(torch.uint8).argmax(1) + 1, 0)
    last = (hit * rank).amax(1)
    found = hit.cumsum(1).to(torch.float64)
    precision = found / rank
    # Precision just before the hit; 1 at rank 1.
    before = torch.where(rank > 1, (found - 1) / (rank - 1).clamp(min=1), 1.0)
    count = positives.clamp(min=1)
    average_precision = (precision * hit).sum(1) / count
    trapezoid = ((precision + before) / 2 * hit).sum(1) / count
    return positives, first, last, average_precision, trapezoid
