"""Calls whose kernels are compiled ahead of time: what a call launches on a GPU is what gets compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of torch.ops.lcr2s_triton.`op`.

    `arguments` makes its arguments, with tensors on the meta device; `wgmma` names the kernels that must use the
    tensor cores' `wgmma` on sm_90.
    """

    op: str
    arguments: Callable[[], tuple[Any, ...]]
    wgmma: frozenset[str] = frozenset()


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


CASES = [
    Case(op, lambda make=make, shape=shape: make(*shape))
    for op, make in (("support_attention", attention), ("support_attention_backward", attention_backward))
    for shape in (
        (torch.float32, 4096, 16384, 8, 128),  # blocks of 8
        (torch.bfloat16, 128, 4000, 8, 64),  # of 32
        (torch.float16, 64, 1000, 1, 1024),  # of 16, wide heads in chunks
    )
]
