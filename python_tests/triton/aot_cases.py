"""Calls whose kernels are compiled ahead of time: what a call launches on a GPU is what gets compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcr2s_ext.triton import retrieval

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Case:
    """One call of torch.ops.lcr2s_triton.`op`.

    `arguments` makes its arguments, with tensors on the meta device; `wgmma` names the kernels that must use the
    tensor cores' `wgmma` on sm_90. `loads` is how tiles are loaded, `architectures` are the GPUs for which this says
    something that other cases do not.
    """

    op: str
    arguments: Callable[[], tuple[Any, ...]]
    wgmma: frozenset[str] = frozenset()
    loads: str = "pointers"
    architectures: tuple[int, ...] = ARCHITECTURES


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(dtype: torch.dtype, sets: int, entries: int, heads: int, width: int) -> tuple[Any, ...]:
    pool = 2 * sets
    rows = [meta(count, heads, width, dtype=dtype) for count in (sets, pool, pool)]
    index = [meta(count, dtype=torch.int64) for count in (sets + 1, entries, entries, pool + 1, entries)]
    return *rows, *index, width**-0.5


def attention(*shape: Any) -> tuple[Any, ...]:
    return *_attention(*shape), True


def attention_backward(*shape: Any) -> tuple[Any, ...]:
    query, key, value, *rest = _attention(*shape)
    probs = meta(rest[1].shape[0], query.shape[1])
    return query, query, key, value, probs, *rest, True, True, True


def absent_numbers(numbers: Tensor) -> Tensor:
    """What a ranking on the meta device reads on the host: finite queries, a gallery to rescale, two positives each."""
    return torch.cat([torch.tensor([0, 1]), 2 * torch.arange(1, numbers.numel() - 1)])


def ranking(dtype: torch.dtype, queries: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    retrieval.on_host = absent_numbers
    return meta(queries, width, dtype=dtype), meta(rows, width, dtype=dtype)


def topk(*shape: Any) -> tuple[Any, ...]:
    return *ranking(*shape), 10, 1 << 28


def metrics(*shape: Any) -> tuple[Any, ...]:
    query, gallery = ranking(*shape)
    ids = (meta(tensor.shape[0], dtype=torch.int64) for tensor in (query, gallery))
    return query, gallery, *ids, 1 << 28


def frobenius(dtype: torch.dtype, rows: int, width: int, teacher_width: int) -> tuple[Any, ...]:
    student, teacher = ([meta(rows, w, dtype=dtype) for _ in range(2)] for w in (width, teacher_width))
    return *student, *teacher, 2, 1 << 28, True, True


def similarity(loss: str, dtype: torch.dtype, rows: int, columns: int, width: int) -> tuple[Any, ...]:
    features = meta(rows, width, dtype=dtype), meta(columns, width, dtype=dtype)
    ids = meta(rows, dtype=torch.int64), meta(columns, dtype=torch.int32)
    options = {"info_nce": (meta(),), "sdm": (meta(), 1e-8), "cmpm": (True, 1e-8), "tal": (0.1, 0.015)}[loss]
    return *features, *ids, *options, 1 << 18, *[True] * (3 if loss in ("info_nce", "sdm") else 2)


def divergence(dtype: torch.dtype, rows: int, width: int, teacher_width: int, workspace_bytes: int) -> tuple[Any, ...]:
    student, teacher = ([meta(rows, w, dtype=dtype) for _ in range(2)] for w in (width, teacher_width))
    return *student, *teacher, meta(), meta(), workspace_bytes, True, True, True


TOPK_TILES = frozenset({"topk_similarity_maxima_kernel", "topk_similarity_rescore_kernel"})
METRICS_TILES = frozenset({"retrieval_metrics_positives_kernel", "retrieval_metrics_count_kernel"})
HALVES = (torch.bfloat16, torch.float16)

CASES = [
    Case(op, lambda make=make, shape=shape: make(*shape))
    for op, make in (("support_attention", attention), ("support_attention_backward", attention_backward))
    for shape in (
        (torch.float32, 4096, 16384, 8, 128),  # blocks of 8
        (torch.bfloat16, 128, 4000, 8, 64),  # of 32
        (torch.float16, 64, 1000, 1, 1024),  # of 16, wide heads in chunks
    )
]
CASES += [
    Case(op, lambda make=make, dtype=dtype: make(dtype, 6156, 3074, 512), tiles if dtype in HALVES else frozenset())
    for op, make, tiles in (("topk_similarity", topk, TOPK_TILES), ("retrieval_metrics", metrics, METRICS_TILES))
    for dtype in (torch.float32, torch.bfloat16)
]
CASES += [
    Case("relation_frobenius", lambda shape=shape: frobenius(*shape))
    for shape in (
        (torch.bfloat16, 8192, 512, 512),  # Gram matrices of differences
        (torch.float32, 256, 512, 1000),  # relations themselves, widths that differ
    )
]
SIMILARITY_TILES = frozenset({"similarity_statistics_kernel", "similarity_gradient_kernel"})
CASES += [
    Case(op, lambda op=op, dtype=dtype: similarity(op, dtype, 1024, 600, 512), tiles)
    for op, dtype, tiles in (
        ("info_nce", torch.float16, SIMILARITY_TILES),
        ("sdm", torch.bfloat16, SIMILARITY_TILES),
        ("cmpm", torch.bfloat16, SIMILARITY_TILES),
        ("tal", torch.bfloat16, SIMILARITY_TILES),
        ("sdm", torch.float32, frozenset()),
    )
]
KL_TILES = frozenset({"similarity_statistics_kernel", "relation_kl_kernel"})
CASES += [
    Case("relation_kl", lambda shape=shape: divergence(*shape), tiles)
    for shape, tiles in (
        ((torch.bfloat16, 1024, 512, 768, 1 << 19), KL_TILES),
        ((torch.float32, 1000, 512, 768, 1 << 26), frozenset()),  # cosines kept
    )
]
CASES += [
    Case(op, lambda make=make, shape=shape: make(*shape), tiles, loads, architectures)
    for op, make, shape, tiles, loads, architectures in (
        ("sdm", similarity, ("sdm", torch.bfloat16, 1024, 600, 512), SIMILARITY_TILES, "tma", (90,)),
        ("relation_kl", divergence, (torch.bfloat16, 1024, 512, 768, 1 << 19), KL_TILES, "tma", (90,)),
        ("topk_similarity", topk, (torch.bfloat16, 6156, 3074, 512), TOPK_TILES, "tma", (90,)),
        ("topk_similarity", topk, (torch.bfloat16, 6156, 3074, 512), TOPK_TILES, "specialized", (90, 100)),
        ("retrieval_metrics", metrics, (torch.bfloat16, 6156, 3074, 512), METRICS_TILES, "tma", (90,)),
    )
]
