"""Support attention in Triton.

A program takes one row (a query, or a pool row in the last pass of the backward) and a slice of heads. The rows of its
set are gathered in blocks of 8, 16 or 32 entries, so products with them are sums over a small tile, not tl.dot. Sets
longer than a block are streamed, their scores computed twice. No atomics: the gradients of a pool row are summed by one
program over the transposed index, in its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.triton._launch import operator, wrap_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COUNTS = ["queries", "pool_rows", "entries"]
"""Arguments that change from batch to batch: no kernel is compiled anew because one is a multiple of 16."""
_TILE = 1024
"""Elements of a gathered block for a warp, 32 registers of each thread. Programs aim at one warp: its sums need no
barrier, and gathering is hidden by the other programs of a multiprocessor."""
_WIDEST = 8192
"""And the most it takes: wider heads are cut."""


@triton.jit
def _entries(offsets, row, count):
    """The range of a row's entries; empty where `offsets` points outside."""
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    sound = (begin >= 0) & (end >= begin) & (end <= count)
    return begin, tl.where(sound, end - begin, 0)


@triton.jit
def _gather(base, rows, keep, stride, head, at, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """(entries, heads, width) float32 of the given rows; zeros beyond HEADS and WIDTH and where `keep` is false."""
    offset = rows[:, None, None] * stride + (head[:, None] * WIDTH + at[None, :])[None, :, :]
    mask = keep[:, None, None] & ((head < HEADS)[:, None] & (at < WIDTH)[None, :])[None, :, :]
    return tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row(base, row, stride, head, at, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """(heads, width) float32 of one row."""
    mask = (head < HEADS)[:, None] & (at < WIDTH)[None, :]
    offset = row * stride + (head[:, None] * WIDTH + at[None, :])
    return tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_row(base, row, value, head, at, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The same, to a contiguous result."""
    mask = (head < HEADS)[:, None] & (at < WIDTH)[None, :]
    offset = (row * HEADS + head[:, None]) * WIDTH + at[None, :]
    tl.store(base + offset, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _block(indices, begin, count, step, pool_rows, BLOCK: tl.constexpr):
    """Entries of one block of a set, which of them exist, their pool rows, and which of these can be followed."""
    inside = step * BLOCK + tl.arange(0, BLOCK)
    exists = inside < count
    entry = begin + inside
    rows = tl.load(indices + entry, mask=exists, other=0)
    return entry, exists, rows, exists & (rows >= 0) & (rows < pool_rows)


@triton.jit
def _scores(
    left,
    left_row,
    left_stride,
    right,
    right_rows,
    right_stride,
    exists,
    follow,
    head,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(entries, heads) products of one row with each row of a block; NaN for an entry that cannot be followed."""
    total = tl.zeros((follow.shape[0], head.shape[0]), tl.float32)
    for chunk in tl.static_range(0, (WIDTH + CHUNK - 1) // CHUNK):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        one = _row(left, left_row, left_stride, head, at, HEADS, WIDTH)
        rows = _gather(right, right_rows, follow, right_stride, head, at, HEADS, WIDTH)
        total += tl.sum(one[None, :, :] * rows, axis=2)
    return tl.where((exists & ~follow)[:, None], float("nan"), total)


@triton.jit(do_not_specialize=_COUNTS)
def support_attention_forward_kernel(
    query,
    key,
    value,
    indptr,
    indices,
    probs,
    out,
    query_stride,
    key_stride,
    value_stride,
    pool_rows,
    entries,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    NEED_PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_CHUNK: tl.constexpr,
):
    """probs and out of one query, HEAD_SLICE heads and VALUE_CHUNK columns of the values."""
    chunks: tl.constexpr = (VALUE_WIDTH + VALUE_CHUNK - 1) // VALUE_CHUNK
    slices: tl.constexpr = (HEADS + HEAD_SLICE - 1) // HEAD_SLICE
    program = tl.program_id(0)
    row = (program // (slices * chunks)).to(tl.int64)
    head = (program // chunks) % slices * HEAD_SLICE + tl.arange(0, HEAD_SLICE)
    chunk = program % chunks
    at = chunk * VALUE_CHUNK + tl.arange(0, VALUE_CHUNK)
    begin, count = _entries(indptr, row, entries)
    blocks = tl.cdiv(count, BLOCK)

    scores = tl.zeros((BLOCK, HEAD_SLICE), tl.float32)
    maximum = tl.full((HEAD_SLICE,), float("-inf"), tl.float32)
    total = tl.zeros((HEAD_SLICE,), tl.float32)
    for step in range(blocks):
        _, exists, rows, follow = _block(indices, begin, count, step, pool_rows, BLOCK)
        scores = scale * _scores(
            query, row, query_stride, key, rows, key_stride, exists, follow, head, HEADS, WIDTH, CHUNK
        )
        scores = tl.where(exists[:, None], scores, float("-inf"))
        # tl.max may drop NaN: then it comes back through the sum.
        raised = tl.maximum(maximum, tl.max(scores, axis=0))
        weights = tl.where(exists[:, None], tl.exp(scores - raised[None, :]), 0.0)
        total = total * tl.where(step == 0, 0.0, tl.exp(maximum - raised)) + tl.sum(weights, axis=0)
        maximum = raised

    result = tl.zeros((HEAD_SLICE, VALUE_CHUNK), tl.float32)
    for step in range(blocks):
        entry, exists, rows, follow = _block(indices, begin, count, step, pool_rows, BLOCK)
        if blocks > 1:
            scores = scale * _scores(
                query, row, query_stride, key, rows, key_stride, exists, follow, head, HEADS, WIDTH, CHUNK
            )
        weights = tl.where(exists[:, None], tl.exp(scores - maximum[None, :]) / total[None, :], 0.0)
        if NEED_PROBS:
            if chunk == 0:
                mask = exists[:, None] & (head < HEADS)[None, :]
                tl.store(probs + entry[:, None] * HEADS + head[None, :], weights, mask=mask)
        gathered = _gather(value, rows, follow, value_stride, head, at, HEADS, VALUE_WIDTH)
        result += tl.sum(weights[:, :, None] * gathered, axis=0)
    _store_row(out, row, result, head, at, HEADS, VALUE_WIDTH)


@triton.jit(do_not_specialize=_COUNTS)
def support_attention_backward_query_kernel(
    grad_out,
    query_gradient,
    key,
    value,
    probs,
    indptr,
    indices,
    grad_scores,
    grad_stride,
    key_stride,
    value_stride,
    pool_rows,
    entries,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    NEED_QUERY: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_CHUNK: tl.constexpr,
):
    """grad_scores and the query's gradient of one query, HEAD_SLICE heads and CHUNK columns."""
    chunks: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK if NEED_QUERY else 1
    slices: tl.constexpr = (HEADS + HEAD_SLICE - 1) // HEAD_SLICE
    program = tl.program_id(0)
    row = (program // (slices * chunks)).to(tl.int64)
    head = (program // chunks) % slices * HEAD_SLICE + tl.arange(0, HEAD_SLICE)
    chunk = program % chunks
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    begin, count = _entries(indptr, row, entries)
    blocks = tl.cdiv(count, BLOCK)

    gradients = tl.zeros((BLOCK, HEAD_SLICE), tl.float32)
    mean = tl.zeros((HEAD_SLICE,), tl.float32)
    for step in range(blocks):
        entry, exists, rows, follow = _block(indices, begin, count, step, pool_rows, BLOCK)
        gradients = _scores(
            grad_out, row, grad_stride, value, rows, value_stride, exists, follow, head, HEADS, VALUE_WIDTH, VALUE_CHUNK
        )
        mask = exists[:, None] & (head < HEADS)[None, :]
        weights = tl.load(probs + entry[:, None] * HEADS + head[None, :], mask=mask, other=0.0)
        mean += tl.sum(weights * gradients, axis=0)

    result = tl.zeros((HEAD_SLICE, CHUNK), tl.float32)
    for step in range(blocks):
        entry, exists, rows, follow = _block(indices, begin, count, step, pool_rows, BLOCK)
        if blocks > 1:
            gradients = _scores(
                grad_out,
                row,
                grad_stride,
                value,
                rows,
                value_stride,
                exists,
                follow,
                head,
                HEADS,
                VALUE_WIDTH,
                VALUE_CHUNK,
            )
        mask = exists[:, None] & (head < HEADS)[None, :]
        place = entry[:, None] * HEADS + head[None, :]
        # Where nothing was loaded the weight is 0, but 0 * (0 - NaN) would be NaN.
        weights = tl.load(probs + place, mask=mask, other=0.0)
        weights = tl.where(mask, weights * (gradients - mean[None, :]), 0.0)
        if chunk == 0:
            tl.store(grad_scores + place, weights, mask=mask)
        if NEED_QUERY:
            gathered = _gather(key, rows, follow, key_stride, head, at, HEADS, WIDTH)
            result += tl.sum(weights[:, :, None] * gathered, axis=0)
    if NEED_QUERY:
        _store_row(query_gradient, row, scale * result, head, at, HEADS, WIDTH)


@triton.jit
def _pool_gradient(
    source,
    weights,
    entry_rows,
    t_entries,
    result,
    row,
    begin,
    count,
    queries,
    entries,
    stride,
    scale,
    head,
    at,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result[row] = scale * sum of weight * source row over the entries that use the pool row."""
    total = tl.zeros((head.shape[0], at.shape[0]), tl.float32)
    for step in range(tl.cdiv(count, BLOCK)):
        inside = step * BLOCK + tl.arange(0, BLOCK)
        exists = inside < count
        entry = tl.load(t_entries + begin + inside, mask=exists, other=0)
        known = exists & (entry >= 0) & (entry < entries)
        users = tl.load(entry_rows + entry, mask=known, other=-1)
        follow = known & (users >= 0) & (users < queries)
        mask = follow[:, None] & (head < HEADS)[None, :]
        weight = tl.load(weights + entry[:, None] * HEADS + head[None, :], mask=mask, other=0.0)
        weight = tl.where((exists & ~follow)[:, None], float("nan"), weight)
        gathered = _gather(source, users, follow, stride, head, at, HEADS, WIDTH)
        total += tl.sum(weight[:, :, None] * gathered, axis=0)
    _store_row(result, row, scale * total, head, at, HEADS, WIDTH)


@triton.jit(do_not_specialize=_COUNTS)
def support_attention_backward_pool_kernel(
    grad_out,
    query,
    probs,
    grad_scores,
    entry_rows,
    t_indptr,
    t_entries,
    grad_key,
    grad_value,
    grad_stride,
    query_stride,
    queries,
    entries,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_CHUNK: tl.constexpr,
):
    """Gradients of one pool row, HEAD_SLICE heads, CHUNK columns of the key and VALUE_CHUNK of the value."""
    slices: tl.constexpr = (HEADS + HEAD_SLICE - 1) // HEAD_SLICE
    program = tl.program_id(0)
    row = (program // (slices * CHUNKS)).to(tl.int64)
    head = (program // CHUNKS) % slices * HEAD_SLICE + tl.arange(0, HEAD_SLICE)
    chunk = program % CHUNKS
    begin, count = _entries(t_indptr, row, entries)
    if NEED_KEY:
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        _pool_gradient(
            query,
            grad_scores,
            entry_rows,
            t_entries,
            grad_key,
            row,
            begin,
            count,
            queries,
            entries,
            query_stride,
            scale,
            head,
            at,
            HEADS,
            WIDTH,
            BLOCK,
        )
    if NEED_VALUE:
        value_at = chunk * VALUE_CHUNK + tl.arange(0, VALUE_CHUNK)
        _pool_gradient(
            grad_out,
            probs,
            entry_rows,
            t_entries,
            grad_value,
            row,
            begin,
            count,
            queries,
            entries,
            grad_stride,
            1.0,
            head,
            value_at,
            HEADS,
            VALUE_WIDTH,
            BLOCK,
        )


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows are dense, so that views of a fused projection are read in place."""
    _, heads, width = tensor.shape
    dense = (width <= 1 or tensor.stride(2) == 1) and (heads <= 1 or tensor.stride(1) == width)
    return tensor if dense else tensor.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, **index: Tensor) -> None:
    """What the host sees of a call that did not come through the public function; kernels follow no bad index."""
    for name, tensor, shape in (
        ("query", query, "(B, H, D)"),
        ("key", key, "(M, H, D)"),
        ("value", value, "(M, H, Dv)"),
    ):
        _checks.check_tensor(name, tensor, shape, _DTYPES)
        _checks.check_like(name, tensor, "query", query)
        _checks.check_size(name, tensor, 1, query.shape[1], "heads of `query`")
    _checks.check_size("key", key, 2, query.shape[2], "head width of `query`")
    _checks.check_size("value", value, 0, key.shape[0], "rows of `key`")
    for name, tensor in (("indices", indices), *index.items()):
        _checks.check_tensor(name, tensor, "(n,)", (torch.int64,))
        _checks.check_like(name, tensor, "query", query, dtype=False)
    sizes = {"indptr": query.shape[0] + 1, "t_indptr": key.shape[0] + 1}
    for name, tensor in index.items():
        _checks.check_size(name, tensor, 0, sizes.get(name, indices.shape[0]), "sets, pool rows or entries")


class _Plan:
    """Tile sizes and the number of programs of a row, from shapes alone."""

    def __init__(self, rows: int, entries: int, heads: int, width: int, value_width: int) -> None:
        # The mean set decides, since the longest one is known on the device only: blocks that most sets fill well.
        self.block = 8 if entries <= 8 * rows else 16 if entries <= 16 * rows else 32
        widest = _WIDEST // self.block
        self.chunk = min(triton.next_power_of_2(width), widest)
        self.value_chunk = min(triton.next_power_of_2(max(value_width, 1)), widest)
        slice_width = max(self.chunk, self.value_chunk)
        fitting = max(_TILE // (self.block * slice_width), 1)
        self.head_slice = min(triton.next_power_of_2(max(heads, 1)), fitting)
        self.slices = triton.cdiv(heads, self.head_slice)
        self.num_warps = max(self.block * self.head_slice * slice_width // _TILE, 1)

    def options(self) -> dict[str, int]:
        return {
            "BLOCK": self.block,
            "HEAD_SLICE": self.head_slice,
            "CHUNK": self.chunk,
            "VALUE_CHUNK": self.value_chunk,
            "num_warps": self.num_warps,
        }


@operator
def support_attention(
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
    """The rows of out, and the probabilities (nnz, H) where the backward will need them."""
    _check(query, key, value, indices, indptr=indptr)
    (queries, heads, width), value_width = query.shape, value.shape[2]
    heads, width, value_width = int(heads), int(width), int(value_width)
    entries = indices.shape[0]
    indptr, indices = indptr.contiguous(), indices.contiguous()
    query, key, value = _dense(query), _dense(key), _dense(value)
    out = query.new_empty((queries, heads, value_width))
    probs = query.new_empty((entries if need_probs else 0, heads), dtype=torch.float32)
    plan = _Plan(queries, entries, heads, width, value_width)
    programs = queries * plan.slices * triton.cdiv(value_width, plan.value_chunk)
    if programs > 0:
        wrap_triton(support_attention_forward_kernel)[(programs,)](
            query,
            key,
            value,
            indptr,
            indices,
            probs,
            out,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            key.shape[0],
            entries,
            scale,
            HEADS=heads,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            NEED_PROBS=need_probs,
            **plan.options(),
        )
    return out, probs


@operator
def support_attention_backward(
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
    """Gradients of query, key and value; without elements where not needed."""
    _check(query, key, value, indices, indptr=indptr, entry_rows=entry_rows, t_indptr=t_indptr, t_entries=t_entries)
    (queries, heads, width), value_width = query.shape, value.shape[2]
    heads, width, value_width = int(heads), int(width), int(value_width)
    pool_rows, entries = key.shape[0], indices.shape[0]
    _checks.check_tensor("grad_out", grad_out, "(B, H, Dv)", (query.dtype,))
    for axis, (size, meaning) in enumerate(((queries, "query"), (heads, "query"), (value_width, "value"))):
        _checks.check_size("grad_out", grad_out, axis, size, f"of `{meaning}`")
    _checks.check_tensor("probs", probs, "(nnz, H)", (torch.float32,))
    for axis, size in enumerate((entries, heads)):
        _checks.check_size("probs", probs, axis, size, "run the forward with need_probs=True")
    indptr, indices, entry_rows, t_indptr, t_entries = (
        tensor.contiguous() for tensor in (indptr, indices, entry_rows, t_indptr, t_entries)
    )
    probs = probs.contiguous()
    grad_query = query.new_empty((queries, heads, width) if need_query else (0,))
    grad_key = key.new_empty((pool_rows, heads, width) if need_key else (0,))
    grad_value = value.new_empty((pool_rows, heads, value_width) if need_value else (0,))
    grad_out, query, key, value = _dense(grad_out), _dense(query), _dense(key), _dense(value)
    need_scores = need_query or need_key
    grad_scores = query.new_empty((entries if need_scores else 0, heads), dtype=torch.float32)
    plan = _Plan(queries, entries, heads, width, value_width)
    programs = queries * plan.slices * (triton.cdiv(width, plan.chunk) if need_query else 1)
    if need_scores and programs > 0:
        wrap_triton(support_attention_backward_query_kernel)[(programs,)](
            grad_out,
            grad_query,
            key,
            value,
            probs,
            indptr,
            indices,
            grad_scores,
            grad_out.stride(0),
            key.stride(0),
            value.stride(0),
            pool_rows,
            entries,
            scale,
            HEADS=heads,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            NEED_QUERY=need_query,
            **plan.options(),
        )
    plan = _Plan(pool_rows, entries, heads, width, value_width)
    widths = [(width, plan.chunk)] * need_key + [(value_width, plan.value_chunk)] * need_value
    chunks = max((triton.cdiv(wide, chunk) for wide, chunk in widths), default=0)
    programs = pool_rows * plan.slices * chunks
    if programs > 0:
        wrap_triton(support_attention_backward_pool_kernel)[(programs,)](
            grad_out,
            query,
            probs,
            grad_scores,
            entry_rows,
            t_indptr,
            t_entries,
            grad_key,
            grad_value,
            grad_out.stride(0),
            query.stride(0),
            queries,
            entries,
            scale,
            HEADS=heads,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            NEED_KEY=need_key,
            NEED_VALUE=need_value,
            CHUNKS=chunks,
            **plan.options(),
        )
    return grad_query, grad_key, grad_value
