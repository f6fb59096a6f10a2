"""Exact cosine ranking in Triton: the k best gallery rows of each query, and the ranks of a query's positives.

One product of a query tile with a gallery tile, :func:`_scores`, serves every kernel with one shape and one number of
warps, so that a pair of rows scores the same bits wherever it is scored. Rows are not normalised beforehand: a score is
the product of the raw rows, exact in its terms also for half inputs, times both inverse norms.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.triton import INTERPRETED, requested_loads
from lcr2s_ext.triton._launch import capability, input_precision, operator, with_workspace, wrap_triton
from lcr2s_ext.triton._tiles import DESCRIPTORS, POINTERS, SPECIALIZED, loads, operand, split_columns

_LAST = 0x7FFFFFFF
"""2^31 - 1. Keys hold a gallery row or tile as what is left to it: among equal scores the lower has the larger key."""

LAST = tl.constexpr(_LAST)
WIDEN = tl.constexpr(INTERPRETED)
FINITE, EXTREME, NOT_FINITE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def retrieval_norms_kernel(
    features,
    stride,
    rows,
    width,
    inverse,
    status,
    scaled,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """1 / |row|, 0 for a zero row, and whether the row's products may leave float32; or the row brought to a norm in
    [1, 2) by a power of two, and the inverse norm of that."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, width, COLUMNS):
        mask = valid[:, None] & (begin + column < width)[None, :]
        x = tl.load(features + row[:, None] * stride + (begin + column)[None, :], mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(x * x, 1)
    norm = tl.sqrt(total)
    if SCALE:
        # The norm's exponent, negated.
        power = (2046 << 52) - (norm.to(tl.int64, bitcast=True) & (0x7FF << 52))
        factor = tl.where(norm > 0, power.to(tl.float64, bitcast=True), 1.0)
        for begin in range(0, width, COLUMNS):
            mask = valid[:, None] & (begin + column < width)[None, :]
            x = tl.load(features + row[:, None] * stride + (begin + column)[None, :], mask=mask, other=0.0)
            x = (x.to(tl.float64) * factor[:, None]).to(tl.float32).to(scaled.dtype.element_ty)
            tl.store(scaled + row[:, None] * width + (begin + column)[None, :], x, mask=mask)
        norm = norm * factor
    finite = norm < float("inf")
    # 2^-40 and 2^40: sums of products stay far inside float32.
    ordinary = (norm == 0) | ((norm > 9.1e-13) & (norm < 1.1e12))
    tl.store(status + row, tl.where(finite, tl.where(ordinary, FINITE, EXTREME), NOT_FINITE), mask=valid)
    tl.store(inverse + row, tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm)).to(tl.float32), mask=valid)


@triton.jit
def _multiply_add(q, g, total, PRECISION: tl.constexpr):
    """q @ g.T + total."""
    if WIDEN:
        # The interpreter's product takes bfloat16 for integers, and rounds a float32 by its place in the tile.
        q = q.to(tl.float64)
        g = g.to(tl.float64)
    return tl.dot(q, tl.trans(g), total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _scores(
    query,
    query_stride,
    query_first,
    query_row,
    query_inverse,
    gallery,
    gallery_stride,
    gallery_first,
    gallery_row,
    gallery_inverse,
    width,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    QUERY_LOADS: tl.constexpr,
    GALLERY_LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Cosines of TILE rows with TILE rows. A side is a pointer, of whose rows all of query_row (gallery_row) are valid,
    or a descriptor, and then the tile is the rows from query_first (gallery_first) on."""
    column = tl.arange(0, DEPTH)
    if QUERY_LOADS == POINTERS:
        query += query_row[:, None].to(tl.int64) * query_stride + column[None, :]
    if GALLERY_LOADS == POINTERS:
        gallery += gallery_row[:, None].to(tl.int64) * gallery_stride + column[None, :]
    total = tl.zeros((TILE, TILE), tl.float64 if WIDEN else tl.float32)
    for begin in tl.range(0, width, DEPTH, warp_specialize=QUERY_LOADS == SPECIALIZED):
        mask = (begin + column < width)[None, :]
        if QUERY_LOADS == POINTERS:
            q = tl.load(query + begin, mask=mask, other=0.0)
        else:
            q = query.load([query_first, begin])
        if GALLERY_LOADS == POINTERS:
            g = tl.load(gallery + begin, mask=mask, other=0.0)
        else:
            g = gallery.load([gallery_first, begin])
        total = _multiply_add(q, g, total, PRECISION)
    score = (
        total.to(tl.float32)
        * tl.load(query_inverse + query_row)[:, None]
        * tl.load(gallery_inverse + gallery_row)[None, :]
    )
    # -0 and 0 are one score.
    return tl.where(score == 0.0, 0.0, score)


@triton.jit
def _ordered(score):
    """int32 numbers that order like the scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & LAST)


@triton.jit
def topk_similarity_maxima_kernel(
    query,
    query_stride,
    query_inverse,
    first,
    last,
    gallery,
    gallery_stride,
    gallery_inverse,
    rows,
    width,
    maxima,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """maxima[i, t]: the key of query first + i's best score in gallery tile t. Queries up to `last`."""
    query_tiles = tl.cdiv(last - first, TILE)
    # Neighbours in time share a gallery tile.
    query_tile = tl.program_id(0) % query_tiles
    tile = tl.program_id(0) // query_tiles
    query_row = first + query_tile * TILE + tl.arange(0, TILE)
    gallery_row = tile * TILE + tl.arange(0, TILE)
    if LOADS == SPECIALIZED:
        # Made here: a compiler that splits the tile among warp groups cannot change descriptors of the host.
        query = tl.make_tensor_descriptor(query, [last, width], [query_stride, 1], [TILE, DEPTH])
        gallery = tl.make_tensor_descriptor(gallery, [rows, width], [gallery_stride, 1], [TILE, DEPTH])
    score = _scores(
        query,
        query_stride,
        first + query_tile * TILE,
        tl.minimum(query_row, last - 1),
        query_inverse,
        gallery,
        gallery_stride,
        tile * TILE,
        tl.minimum(gallery_row, rows - 1),
        gallery_inverse,
        width,
        TILE,
        DEPTH,
        LOADS,
        LOADS,
        PRECISION,
    )
    best = tl.max(tl.where((gallery_row < rows)[None, :], score, float("-inf")), 1)
    place = (query_row - first) * tl.cdiv(rows, TILE) + tile
    key = (_ordered(best).to(tl.int64) << 32) | (tile.to(tl.int64) ^ LAST)
    tl.store(maxima + place, key, mask=query_row < last)


@triton.jit
def topk_similarity_rescore_kernel(
    query,
    query_stride,
    query_inverse,
    first,
    gallery,
    gallery_stride,
    gallery_inverse,
    rows,
    width,
    pairs,
    starts,
    block_ends,
    block_tiles,
    slots,
    ordered,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ordered[pair, :]: all scores of a (query, gallery tile) pair, ordered; a program takes TILE queries of one tile.

    `pairs` are sorted by tile, those of tile t in starts[t] .. starts[t + 1]; pair = (query - first) * slots + slot.
    """
    tile = tl.load(block_tiles + tl.program_id(0))
    if tile < tl.cdiv(rows, TILE):
        begin = tl.load(starts + tile)
        end = tl.load(starts + tile + 1)
        later_blocks = tl.load(block_ends + tile) - tl.program_id(0)
        blocks = tl.cdiv(end - begin, TILE)
        at = begin + (blocks - later_blocks) * TILE + tl.arange(0, TILE)
        pair = tl.load(pairs + tl.minimum(at, end - 1)).to(tl.int32)
        gallery_row = tile.to(tl.int32) * TILE + tl.arange(0, TILE)
        score = _scores(
            query,
            query_stride,
            0,
            first + pair // slots,
            query_inverse,
            gallery,
            gallery_stride,
            tile.to(tl.int32) * TILE,
            tl.minimum(gallery_row, rows - 1),
            gallery_inverse,
            width,
            TILE,
            DEPTH,
            POINTERS,
            LOADS,
            PRECISION,
        )
        score = tl.where((gallery_row < rows)[None, :], score, float("-inf"))
        place = pair[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(ordered + place, _ordered(score), mask=(at < end)[:, None])


@triton.jit
def retrieval_metrics_positives_kernel(
    query,
    query_stride,
    query_inverse,
    gallery,
    gallery_stride,
    gallery_inverse,
    width,
    query_order,
    first,
    last,
    starts,
    counts,
    ends,
    base,
    order,
    rows,
    scores,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the positives of queries query_order[first .. last], a range of gallery rows `order` for each."""
    at = first + tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = at < last
    query_row = tl.load(query_order + tl.minimum(at, last - 1))
    start = tl.load(starts + at, mask=valid, other=0).to(tl.int32)
    count = tl.load(counts + at, mask=valid, other=0).to(tl.int32)
    slot = (tl.load(ends + at, mask=valid, other=0) - base).to(tl.int32) - count
    # Queries come in the order of their ranges, so that a tile's are close together.
    begin = tl.min(tl.where(count > 0, start, rows))
    end = tl.max(tl.where(count > 0, start + count, 0))
    for low in range(begin, end, TILE):
        if tl.max(((count > 0) & (start < low + TILE) & (start + count > low)).to(tl.int32)) > 0:
            place = low + tl.arange(0, TILE)
            score = _scores(
                query,
                query_stride,
                0,
                query_row,
                query_inverse,
                gallery,
                gallery_stride,
                0,
                tl.load(order + tl.minimum(place, rows - 1)),
                gallery_inverse,
                width,
                TILE,
                DEPTH,
                POINTERS,
                POINTERS,
                PRECISION,
            )
            # In pieces: addresses for the whole tile would not fit the registers.
            pieces = split_columns(score, TILE, TILE, 4)
            for i in tl.static_range(4):
                column = low + i * (TILE // 4) + tl.arange(0, TILE // 4)
                own = (column[None, :] >= start[:, None]) & (column[None, :] < (start + count)[:, None])
                tl.store(scores + ((slot - start)[:, None] + column[None, :]), pieces[i], mask=own)


@triton.jit
def retrieval_metrics_count_kernel(
    query,
    query_stride,
    query_inverse,
    gallery,
    gallery_stride,
    gallery_inverse,
    width,
    query_order,
    first,
    last,
    starts,
    counts,
    ends,
    base,
    order,
    rows,
    scores,
    above,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to above[positive] what ranks above it in one gallery tile."""
    query_tiles = tl.cdiv(last - first, TILE)
    at = first + tl.program_id(0) % query_tiles * TILE + tl.arange(0, TILE)
    gallery_first = tl.program_id(0) // query_tiles * TILE
    gallery_row = gallery_first + tl.arange(0, TILE)
    valid = at < last
    start = tl.load(starts + at, mask=valid, other=0).to(tl.int32)
    count = tl.load(counts + at, mask=valid, other=0).to(tl.int32)
    slot = (tl.load(ends + at, mask=valid, other=0) - base).to(tl.int32) - count
    most = tl.max(count)
    if most > 0:
        score = _scores(
            query,
            query_stride,
            0,
            tl.load(query_order + tl.minimum(at, last - 1)),
            query_inverse,
            gallery,
            gallery_stride,
            gallery_first,
            tl.minimum(gallery_row, rows - 1),
            gallery_inverse,
            width,
            TILE,
            DEPTH,
            POINTERS,
            LOADS,
            PRECISION,
        )
        score = tl.where((gallery_row < rows)[None, :], score, float("-inf"))
        for positive in range(most):
            has = positive < count
            own = tl.load(scores + slot + positive, mask=has, other=float("inf"))
            index = tl.load(order + start + positive, mask=has, other=0).to(tl.int32)
            before = gallery_row[None, :] < index[:, None]
            higher = (score > own[:, None]) | ((score == own[:, None]) & before)
            # Integers: the sum does not depend on the order of the additions.
            tl.atomic_add(above + slot + positive, tl.sum(higher.to(tl.int32), 1), mask=has)


@triton.jit
def retrieval_metrics_finish_kernel(
    query_order,
    first,
    last,
    counts,
    ends,
    base,
    ranks,
    first_rank,
    last_rank,
    average_precision,
    trapezoid,
    QUERIES: tl.constexpr,
    POSITIVES: tl.constexpr,
):
    """First and last rank and average precisions from each query's ascending ranks."""
    at = first + tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    valid = at < last
    count = tl.load(counts + at, mask=valid, other=0)
    slot = tl.load(ends + at, mask=valid, other=0) - count - base
    precisions = tl.zeros((QUERIES,), tl.float64)
    areas = tl.zeros((QUERIES,), tl.float64)
    for begin in range(0, tl.max(count), POSITIVES):
        hit = begin + tl.arange(0, POSITIVES)[None, :]
        has = hit < count[:, None]
        rank = tl.load(ranks + slot[:, None] + hit, mask=has, other=1)
        precision = (hit + 1).to(tl.float64) / rank.to(tl.float64)
        # Precision just before the hit; 1 at rank 1.
        before = tl.where(rank > 1, hit.to(tl.float64) / tl.maximum(rank - 1, 1).to(tl.float64), 1.0)
        precisions += tl.sum(tl.where(has, precision, 0.0), 1)
        areas += tl.sum(tl.where(has, (precision + before) * 0.5, 0.0), 1)
    some = valid & (count > 0)
    query_row = tl.load(query_order + at, mask=valid, other=0)
    divisor = tl.maximum(count, 1).to(tl.float64)
    tl.store(first_rank + query_row, tl.load(ranks + slot, mask=some, other=0), mask=valid)
    tl.store(last_rank + query_row, tl.load(ranks + slot + count - 1, mask=some, other=0), mask=valid)
    tl.store(average_precision + query_row, precisions / divisor, mask=valid)
    tl.store(trapezoid + query_row, areas / divisor, mask=valid)


class _Ranked:
    """Features whose pairs can be scored: the rows, their stride and their inverse norms."""

    def __init__(self, features: Tensor) -> None:
        self.rows = features if features.stride(1) == 1 else features.contiguous()
        self.inverse, self.status = self._norms(self.rows, None)

    @staticmethod
    def _norms(features: Tensor, scaled: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, width = features.shape
        inverse = features.new_empty(rows, dtype=torch.float32)
        status = features.new_empty(rows, dtype=torch.int32)
        wrap_triton(retrieval_norms_kernel)[(triton.cdiv(rows, 16),)](
            features,
            features.stride(0),
            rows,
            width,
            inverse,
            status,
            features if scaled is None else scaled,
            ROWS=16,
            COLUMNS=128,
            SCALE=scaled is not None,
        )
        return inverse, status

    def rescale(self) -> None:
        """Replace rows, some of them too long or too short for products in float32, by multiples of about norm 1."""
        scaled = self.rows.new_empty(self.rows.shape)
        self.inverse, _ = self._norms(self.rows, scaled)
        self.rows = scaled


class _Ranking:
    """Query and gallery of one call, checked; reading the status synchronises with the device."""

    def __init__(self, query: Tensor, gallery: Tensor, workspace_bytes: int) -> None:
        _check_features("query", query, "(Q, d)")
        _check_features("gallery", gallery, "(P, d)")
        _checks.check_like("gallery", gallery, "query", query)
        _checks.check_size("gallery", gallery, 1, query.shape[1], "width of `query`")
        for name, features in (("query", query), ("gallery", gallery)):
            if features.shape[0] > _LAST - 128:
                raise ValueError(f"`{name}` must have fewer than 2^31 - 128 rows, got {features.shape[0]}")
        if workspace_bytes < 0:
            raise ValueError(f"`workspace_bytes` must not be negative, got {workspace_bytes}")
        self.query = _Ranked(query)
        self.gallery = _Ranked(gallery)
        half = query.dtype != torch.float32
        self.tile = 128 if half else 64
        self.options: dict[str, Any] = {
            "TILE": self.tile,
            "DEPTH": 64 if half else 32,
            "PRECISION": input_precision(query.dtype),
            "num_warps": 8 if half else 4,
            "num_stages": 3,
        }
        self.workspace_bytes = workspace_bytes

    def settle(self, *more: Tensor) -> list[Tensor]:
        """Refuse rows that are not finite, bring extreme ones into range; `more` comes back on the host."""
        sides = {"query": self.query, "gallery": self.gallery}
        status = torch.stack([side.status.amax() for side in sides.values()]).to(torch.int64)
        # One transfer.
        numbers = on_host(torch.cat([status, *[tensor.flatten() for tensor in more]]))
        for (name, side), state in zip(sides.items(), numbers[:2].tolist(), strict=True):
            if state == NOT_FINITE.value:
                raise ValueError(f"`{name}` must hold finite numbers, got NaN or infinity")
            if state == EXTREME.value:
                side.rescale()
        return list(numbers[2:].split([tensor.numel() for tensor in more]))

    def loads(self) -> int:
        """How consecutive rows are loaded: by descriptors only where every row begins at a multiple of 16 bytes."""
        for rows in (self.query.rows, self.gallery.rows):
            if rows.stride(0) * rows.element_size() % 16 or rows.data_ptr() % 16:
                return POINTERS.value
        return loads(self.query.rows.dtype, self.query.rows.device)

    @property
    def queries(self) -> int:
        return self.query.rows.shape[0]

    @property
    def size(self) -> int:
        return self.gallery.rows.shape[0]

    @property
    def query_arguments(self) -> tuple[Any, int, Tensor]:
        return self.query.rows, self.query.rows.stride(0), self.query.inverse

    def gallery_arguments(self, by: int) -> tuple[Any, int, Tensor]:
        rows = operand(self.gallery.rows, self.tile, self.options["DEPTH"], by)
        return rows, self.gallery.rows.stride(0), self.gallery.inverse


def on_host(numbers: Tensor) -> Tensor:
    """The numbers on the CPU: waits for the device."""
    return numbers.cpu()


def _check_features(name: str, value: Tensor, shape: str) -> None:
    """What a direct call could get wrong, and the dtypes that Triton kernels have."""
    _checks.check_tensor(name, value, shape, (torch.float32, torch.bfloat16, torch.float16))
    _checks.check_nonempty(name, value)


def _rescored(ranking: _Ranking, first: int, last: int, tiles: Tensor) -> Tensor:
    """Keys of every score of queries first .. last in their `tiles`, (queries, tiles of each * ranking.tile)."""
    queries, slots = tiles.shape
    count = triton.cdiv(ranking.size, ranking.tile)
    by_tile, pairs = torch.sort(tiles.flatten(), stable=True)
    starts = torch.searchsorted(by_tile, torch.arange(count + 1, device=tiles.device))
    block_ends = ((starts.diff() + (ranking.tile - 1)) // ranking.tile).cumsum(0)
    # As many blocks as there can be; those that are not needed belong to no tile.
    blocks = min(count, pairs.numel()) + pairs.numel() // ranking.tile
    block_tiles = torch.searchsorted(block_ends, torch.arange(blocks, device=tiles.device), right=True)
    ordered = tiles.new_empty((queries, slots, ranking.tile), dtype=torch.int32)
    by = ranking.loads()
    wrap_triton(topk_similarity_rescore_kernel)[(blocks,)](
        *ranking.query_arguments,
        first,
        *ranking.gallery_arguments(by),
        ranking.size,
        ranking.query.rows.shape[1],
        pairs,
        starts,
        block_ends,
        block_tiles,
        slots,
        ordered,
        LOADS=by,
        **ranking.options,
    )
    keys = ordered.to(torch.int64).mul_(1 << 32)
    keys.add_((_LAST - tiles * ranking.tile)[:, :, None])
    return keys.sub_(torch.arange(ranking.tile, device=tiles.device)).flatten(1)


def _best_tiles(ranking: _Ranking, first: int, last: int, k: int) -> Tensor:
    """The k gallery tiles of the highest maxima for each of the queries first .. last, which hold its k best rows."""
    count = triton.cdiv(ranking.size, ranking.tile)
    if count <= k:
        return torch.arange(count, device=ranking.query.rows.device).repeat(last - first, 1)
    maxima = ranking.query.inverse.new_empty((last - first, count), dtype=torch.int64)
    by = ranking.loads()
    options = {**ranking.options, "LOADS": by}
    if by == DESCRIPTORS.value and requested_loads() == "specialized" and capability(maxima.device) < 120:
        # A group of 4 warps loads, two multiply half of the rows each.
        options.update(LOADS=SPECIALIZED.value, num_warps=4)
    on_host = DESCRIPTORS.value if options["LOADS"] == DESCRIPTORS.value else POINTERS.value
    query, *query_rest = ranking.query_arguments

    def launch() -> None:
        wrap_triton(topk_similarity_maxima_kernel)[(triton.cdiv(last - first, ranking.tile) * count,)](
            operand(query, ranking.tile, options["DEPTH"], on_host),
            *query_rest,
            first,
            last,
            *ranking.gallery_arguments(on_host),
            ranking.size,
            ranking.query.rows.shape[1],
            maxima,
            **options,
        )

    with_workspace(launch, maxima.device)
    best = maxima.topk(k, sorted=False).values
    return _LAST - (best & _LAST)


@functools.partial(operator, opaque=True)
def topk_similarity(query: Tensor, gallery: Tensor, k: int, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """See :func:`lcr2s_ext.ops.topk_similarity`."""
    ranking = _Ranking(query, gallery, workspace_bytes)
    if not 1 <= k <= ranking.size:
        raise ValueError(f"`k` must be in 1..{ranking.size} (rows of `gallery`), got {k}")
    ranking.settle()
    values = query.new_empty((ranking.queries, k), dtype=torch.float32)
    indices = query.new_empty((ranking.queries, k), dtype=torch.int64)
    count = triton.cdiv(ranking.size, ranking.tile)
    # Maxima and their selection, a tile's two descriptors; keys and their selection, with the pairs they come from.
    query_bytes = 18 * count + min(k, count) * (24 * ranking.tile + 48)
    # 32 bits hold every place in a slab.
    slab = max(1, min(workspace_bytes, _LAST) // query_bytes)
    for first in range(0, ranking.queries, slab):
        last = min(first + slab, ranking.queries)
        best = _rescored(ranking, first, last, _best_tiles(ranking, first, last, k)).topk(k).values
        ordered = (best >> 32).to(torch.int32)
        values[first:last] = (ordered ^ ((ordered >> 31) & _LAST)).view(torch.float32)
        indices[first:last] = _LAST - (best & _LAST)
    return values, indices


def _check_ids(name: str, ids: Tensor, rows: int, other_name: str, other: Tensor) -> Tensor:
    _checks.check_ids(name, ids, rows, other_name, other)
    if ids.dtype != torch.int64:
        raise TypeError(f"`{name}` must have dtype int64, got {ids.dtype}")
    return ids.contiguous()


@functools.partial(operator, opaque=True)
def retrieval_metrics(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positives, first and last rank, and average precisions of each query.

    As :func:`lcr2s_ext.reference.retrieval.retrieval_statistics` returns them.
    """
    ranking = _Ranking(query, gallery, workspace_bytes)
    wanted = _check_ids("query_ids", query_ids, ranking.queries, "query", query)
    owned = _check_ids("gallery_ids", gallery_ids, ranking.size, "gallery", gallery)
    # Gallery rows by identity: the positives of a query are one range of `order`.
    by_id, order = torch.sort(owned, stable=True)
    starts = torch.searchsorted(by_id, wanted)
    positives = torch.searchsorted(by_id, wanted, right=True) - starts
    starts, query_order = torch.sort(starts, stable=True)
    counts = positives[query_order]
    ends = counts.cumsum(0)
    (host_ends,) = ranking.settle(ends)

    first_rank, last_rank = torch.empty_like(positives), torch.empty_like(positives)
    average_precision, trapezoid = (torch.empty_like(positives, dtype=torch.float64) for _ in range(2))
    width = ranking.query.rows.shape[1]
    tiles = triton.cdiv(ranking.size, ranking.tile)
    # Waves of queries whose positives fit the budget, with their scores, counts, ranks and the ranks' sorting.
    room = min(workspace_bytes, _LAST) // 56
    most_queries = 0x7FFFFFFF // tiles // 2 * ranking.tile
    first, base = 0, 0
    while first < ranking.queries:
        fitting = int(torch.searchsorted(host_ends, base + room, right=True))
        last = min(max(fitting, first + 1), first + most_queries)
        size = int(host_ends[last - 1]) - base
        scores = query.new_empty(size, dtype=torch.float32)
        above = positives.new_zeros(size, dtype=torch.int32)
        query_tiles = triton.cdiv(last - first, ranking.tile)
        part = (query_order, first, last)
        spans = (starts, counts, ends, base, order, ranking.size)
        by = ranking.loads()
        if size > 0:
            # As many registers as there are: left to itself the assembler takes fewer and spills.
            wrap_triton(retrieval_metrics_positives_kernel)[(query_tiles,)](
                *ranking.query_arguments,
                *ranking.gallery_arguments(POINTERS.value),
                width,
                *part,
                *spans,
                scores,
                **ranking.options,
                maxnreg=240,
            )
            wrap_triton(retrieval_metrics_count_kernel)[(query_tiles * tiles,)](
                *ranking.query_arguments,
                *ranking.gallery_arguments(by),
                width,
                *part,
                *spans,
                scores,
                above,
                LOADS=by,
                **ranking.options,
            )
        owner = torch.arange(last - first, device=query.device).repeat_interleave(counts[first:last], output_size=size)
        # Each query's ranks in ascending order; a rank is at most P.
        owner *= ranking.size + 1
        ranks = (owner + above + 1).sort().values - owner
        wrap_triton(retrieval_metrics_finish_kernel)[(triton.cdiv(last - first, 32),)](
            *part,
            counts,
            ends,
            base,
            ranks,
            first_rank,
            last_rank,
            average_precision,
            trapezoid,
            QUERIES=32,
            POSITIVES=16,
        )
        first, base = last, int(host_ends[last - 1])
    return positives, first_rank, last_rank, average_precision, trapezoid
