"""Exact cosine ranking: the k best gallery rows of each query, and the metrics of a ranking."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.ops import _backend, _registration, _workspace
from lcr2s_ext.reference import retrieval as reference


def _check_features(query: object, gallery: object) -> tuple[Tensor, Tensor]:
    """Both features, detached."""
    query = _checks.check_tensor("query", query, "(Q, d)")
    gallery = _checks.check_tensor("gallery", gallery, "(P, d)")
    _checks.check_nonempty("query", query)
    _checks.check_nonempty("gallery", gallery)
    _checks.check_like("gallery", gallery, "query", query)
    _checks.check_size("gallery", gallery, 1, query.shape[1], "width of `query`")
    return query.detach(), gallery.detach()


def _check_finite(backend: str, query: Tensor, gallery: Tensor) -> None:
    # The kernels refuse such values as well, and Triton's say so in the same words while they measure the rows.
    # Compiled code may not read values here.
    if backend == "triton" or torch.compiler.is_compiling():
        return
    for name, features in (("query", query), ("gallery", gallery)):
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"`{name}` must hold finite numbers, got NaN or infinity")


def topk_similarity(query: Tensor, gallery: Tensor, k: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The k gallery rows of highest cosine for each query, exactly; equal scores by lower gallery index.

    Beside the result the kernels need O((Q + k) d + P) memory and a bounded slab, never all scores. Triton copies a
    gallery with norms outside [1e-12, 1e12].

    Args:
        query: (Q, d) float32, float64, bfloat16 or float16 features, normalised inside; Q and d at least 1.
        gallery: (P, d), dtype and device of `query`.
        k: 1 to P.
        backend: see :func:`lcr2s_ext.ops.use_backend`.

    Returns:
        values: (Q, k) cosines from high to low, float32 (float64 for float64 features).
        indices: (Q, k) int64 gallery rows.
        No gradient flows through either. A zero row has cosine 0.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or range, or holds NaN or infinity; the
            message names it. Checking the values synchronises with a GPU.
        BackendUnavailableError: the backend cannot run here.
    """
    query, gallery = _check_features(query, gallery)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"`k` must be an int, got {type(k).__name__}")
    if not 1 <= k <= gallery.shape[0]:
        raise ValueError(f"`k` must be in 1..{gallery.shape[0]} (rows of `gallery`), got {k}")
    chosen = _backend.resolve("topk_similarity", backend, query.device, query.shape[0])
    _checks.check_backend_dtype(chosen, query=query, gallery=gallery)
    _check_finite(chosen, query, gallery)
    if chosen == "reference":
        return reference.topk_similarity(query, gallery, k)
    return _operators(chosen).topk_similarity(query, gallery, k, _workspace.workspace_bytes(query.device))


def retrieval_metrics(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    backend: str | None = None,
) -> dict[str, float]:
    """Rank the whole gallery by cosine for each query and measure where the rows of its identity land.

    Equal scores rank by gallery index. Nothing is sorted by the compiled kernel: the rank of a positive is 1 + the
    number of gallery rows above it. Queries without a positive in the gallery are left out of every mean.

    Args:
        query: (Q, d) float32, float64, bfloat16 or float16 features, normalised inside; Q and d at least 1.
        gallery: (P, d), dtype and device of `query`.
        query_ids: (Q,) int32 or int64 identities.
        gallery_ids: (P,) int32 or int64 identities.
        ks: cut-offs, each at least 1; one above P counts any positive.
        backend: see :func:`lcr2s_ext.ops.use_backend`.

    Returns:
        "R@k" for each k: share of queries with a positive among their first k; "mAP": mean average precision on the
        full ranking, the mean of hits / rank over the positives; "mAP_trapezoid": the same with the trapezoidal
        interpolation of the Market-1501 protocol, never larger; "mINP": mean of positives / rank of the last positive.
        Fractions in [0, 1], NaN where no query has a positive. "queries": Q; "queries_without_positive": how many of
        them were left out.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or range, or holds NaN or infinity; the
            message names it.
        BackendUnavailableError: the backend cannot run here.

    The values are read on the host: not for torch.compile(fullgraph=True).

    References:
        Zheng et al., "Scalable Person Re-identification: A Benchmark" (Market-1501), ICCV 2015; Ye et al., "Deep
        Learning for Person Re-identification: A Survey and Outlook", TPAMI 2022, arXiv 2001.04193 (mINP).
    """
    query, gallery = _check_features(query, gallery)
    _checks.check_ids("query_ids", query_ids, query.shape[0], "query", query)
    _checks.check_ids("gallery_ids", gallery_ids, gallery.shape[0], "gallery", gallery)
    if isinstance(ks, (str, bytes, Tensor)) or not isinstance(ks, Sequence):
        raise TypeError(f"`ks` must be a sequence of ints, got {type(ks).__name__}")
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"`ks` must hold ints, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"`ks` must hold numbers of at least 1, got {k}")
    chosen = _backend.resolve("retrieval_metrics", backend, query.device, query.shape[0])
    _checks.check_backend_dtype(chosen, query=query, gallery=gallery)
    _check_finite(chosen, query, gallery)
    if chosen == "reference":
        statistics = reference.retrieval_statistics(query, gallery, query_ids, gallery_ids)
    else:
        statistics = _operators(chosen).retrieval_metrics(
            query,
            gallery,
            query_ids.to(torch.int64),
            gallery_ids.to(torch.int64),
            _workspace.workspace_bytes(query.device),
        )
    return _average(statistics, ks)


def ranking_metrics(hits: Iterable[Tensor], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What :func:`retrieval_metrics` returns, of any ranking.

    Args:
        hits: blocks of (rows, P) bool: whether the gallery row at each rank is a positive of the query.
        ks: cut-offs.
    """
    blocks = [tuple(part.cpu() for part in reference.ranking_statistics(block)) for block in hits]
    return _average(tuple(torch.cat(parts) for parts in zip(*blocks, strict=True)), ks)


def _average(statistics: tuple[Tensor, ...], ks: Sequence[int]) -> dict[str, float]:
    positives, first, last, average_precision, trapezoid = (tensor.cpu() for tensor in statistics)
    valid = positives > 0

    def mean(values: Tensor) -> float:
        return float(values[valid].to(torch.float64).mean())

    metrics = {f"R@{k}": mean(first <= k) for k in ks}
    metrics["mAP"] = mean(average_precision)
    metrics["mAP_trapezoid"] = mean(trapezoid)
    metrics["mINP"] = mean(positives.to(torch.float64) / last)
    metrics["queries"] = positives.shape[0]
    metrics["queries_without_positive"] = positives.shape[0] - int(valid.sum())
    return metrics


def _fake_topk(query: Tensor, gallery: Tensor, k: int, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return (
        query.new_empty(shape, dtype=_checks.statistics_dtype(query.dtype)),
        query.new_empty(shape, dtype=torch.int64),
    )


def _fake_metrics(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts = [query.new_empty(query.shape[0], dtype=torch.int64) for _ in range(3)]
    precisions = [query.new_empty(query.shape[0], dtype=torch.float64) for _ in range(2)]
    return counts[0], counts[1], counts[2], precisions[0], precisions[1]


# No autocast rule: the kernels take every dtype as it is and normalise in their own precision.
def _register(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::topk_similarity", _fake_topk)
    torch.library.register_fake(f"{namespace}::retrieval_metrics", _fake_metrics)


_operators = _registration.Operators("retrieval", _register)
