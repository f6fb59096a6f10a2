"""InfoNCE, SDM, CMPM and TAL in Triton: one set of kernels, the loss a compile-time constant.

Row logits are x_ij = a_i c_ij, column logits y_ij = b_j c_ij of cosines c, in base 2: exp2 is what a GPU computes. The
statistics kernel forms each tile of cosines once and leaves, for each of its rows and columns, a maximum and a few sums
of exponentials below it. They are merged in a fixed order into each row's loss and the coefficients of dL/dx. The
gradient kernel forms the tiles again, or reads them where they were kept, and writes G = dL/dc as a slab of the
workspace; what remains are two matrix products and the derivative of the normalisation.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.triton import _tiles
from lcr2s_ext.triton._launch import operator, wrap_triton
from lcr2s_ext.triton._tiles import TILE, PackedRows, SlabProducts, TileShape

INFO_NCE = tl.constexpr(0)
MATCHING = tl.constexpr(1)  # SDM: one factor of all logits
PROJECTION = tl.constexpr(2)  # CMPM: norms as factors
TRIPLET = tl.constexpr(3)  # TAL
LOG_SUM = tl.constexpr(4)  # nothing but the normaliser of a softmax

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every logit, and finite: differences of two of them are not NaN.
LOWEST = tl.constexpr(-1e30)
# |cosine| <= 1: up to this factor exp2 of a logit and sums of 10^8 of them are normal numbers, and one exponential
# serves a row's and a column's sums. Above it, each is taken below its own maximum.
UNSHIFTED = tl.constexpr(100.0)
NEVER = tl.constexpr(0)
ALWAYS = tl.constexpr(1)
BY_SCALE = tl.constexpr(2)

# Fields of a row's statistics, coefficients of its gradient, by loss.
_FIELDS = (4, 5, 5, 6, 2)
_COEFFICIENTS = (3, 4, 4, 4)
_MERGE_ROWS = 64
_MERGE_PARTS = 16


@triton.jit
def store_parts(
    out,
    stride,
    index,
    mask,
    x,
    shared,
    shifted,
    positive,
    AXIS: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Fields of a tile's rows (AXIS 1) or columns (AXIS 0) from its logits, which are LOWEST outside the matrix.

    INFO_NCE: maximum, sum of e, sum of x over positives, positives. MATCHING, PROJECTION: maximum, sum of e over
    positives, sum of e (x - maximum), sum of e over negatives, positives. TRIPLET: maxima over positives and over
    negatives, sums of e and of e (x - maximum) over positives, sum of e over negatives, positives. LOG_SUM: maximum,
    sum of e. e is exp2(x - maximum), or follows from `shared`, exp2(x): see :func:`is_shifted`.
    """
    at = out + index
    if SHIFT == NEVER:
        # Any common shift of the parts will do for a maximum, and 0 costs nothing.
        top = tl.zeros_like(index).to(tl.float32)
        other_top = top
    elif KIND == TRIPLET:
        top = tl.max(tl.where(positive, x, LOWEST), AXIS)
        other_top = tl.max(tl.where(positive, LOWEST, x), AXIS)
    else:
        top = tl.max(x, AXIS)
        other_top = top
    below = x - tl.expand_dims(top, AXIS)
    e = shared
    if SHIFT == ALWAYS:
        if KIND == TRIPLET:
            e = tl.exp2(tl.where(positive, below, x - tl.expand_dims(other_top, AXIS)))
        else:
            e = tl.exp2(below)
    elif SHIFT == BY_SCALE:
        if shifted:
            e = tl.exp2(below)
    # Without an entry the maximum is LOWEST and the sums are 0.
    by = tl.where(top > 0.5 * LOWEST, tl.where(shifted, 1.0, tl.exp2(-top)), 0.0)
    tl.store(at, top, mask=mask)
    if KIND == INFO_NCE or KIND == LOG_SUM:
        tl.store(at + stride, by * tl.sum(e, AXIS), mask=mask)
    if KIND == INFO_NCE:
        tl.store(at + 2 * stride, tl.sum(tl.where(positive, x, 0.0), AXIS), mask=mask)
        tl.store(at + 3 * stride, tl.sum(tl.where(positive, 1.0, 0.0), AXIS), mask=mask)
    if KIND == MATCHING or KIND == PROJECTION:
        tl.store(at + stride, by * tl.sum(tl.where(positive, e, 0.0), AXIS), mask=mask)
        tl.store(at + 2 * stride, by * tl.sum(e * below, AXIS), mask=mask)
        tl.store(at + 3 * stride, by * tl.sum(tl.where(positive, 0.0, e), AXIS), mask=mask)
        tl.store(at + 4 * stride, tl.sum(tl.where(positive, 1.0, 0.0), AXIS), mask=mask)
    if KIND == TRIPLET:
        other_by = tl.where(other_top > 0.5 * LOWEST, tl.where(shifted, 1.0, tl.exp2(-other_top)), 0.0)
        tl.store(at + stride, other_top, mask=mask)
        tl.store(at + 2 * stride, by * tl.sum(tl.where(positive, e, 0.0), AXIS), mask=mask)
        tl.store(at + 3 * stride, by * tl.sum(tl.where(positive, e * below, 0.0), AXIS), mask=mask)
        tl.store(at + 4 * stride, other_by * tl.sum(tl.where(positive, 0.0, e), AXIS), mask=mask)
        tl.store(at + 5 * stride, tl.sum(tl.where(positive, 1.0, 0.0), AXIS), mask=mask)


@triton.jit
def same_identity(image_ids, text_ids, row, column, rows, columns, HAS_IDS: tl.constexpr):
    """(rows, columns) of a tile whose identities agree, False outside the matrix; without ids, the diagonal."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if HAS_IDS:
        of_row = tl.load(image_ids + row, mask=row < rows, other=0).to(tl.int64)
        of_column = tl.load(text_ids + column, mask=column < columns, other=0).to(tl.int64)
        return (of_row[:, None] == of_column[None, :]) & inside
    return (row[:, None] == column[None, :]) & inside


@triton.jit
def logit_factor(scale, constant, KIND: tl.constexpr):
    """The common factor of all base-2 logits: of the device's scale, or of a constant."""
    if KIND == TRIPLET:
        return constant * LOG2E
    return tl.load(scale) * LOG2E


@triton.jit
def is_shifted(factor, SHIFT: tl.constexpr):
    """Whether exponentials are taken below a maximum, each row and column its own, or once for both as they are."""
    if SHIFT == BY_SCALE:
        shifted = (tl.abs(factor) <= UNSHIFTED) == 0
    else:
        shifted = SHIFT == ALWAYS
    return shifted


@triton.jit(do_not_specialize=["first_row_tile", "row_tiles", "column_tiles", "rows", "columns"])
def similarity_statistics_kernel(
    image,
    image_scalars,
    image_ids,
    text,
    text_scalars,
    text_ids,
    scale,
    constant,
    row_parts,
    column_parts,
    cosines,
    first_row_tile,
    row_tiles,
    column_tiles,
    rows,
    columns,
    padded_rows,
    padded_columns,
    padded_width,
    slab_rows,
    KIND: tl.constexpr,
    FIELDS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    KEEP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of the statistics of `row_tiles` tiles of rows: row_parts [piece of a column tile][field][row of the slab],
    column_parts [1 + row tile of the slab][field][column]. With KEEP, cosines too: [row][column]."""
    row_tile, column_tile = _tiles.tile_position(tl.program_id(0), row_tiles, column_tiles)
    row_start = (first_row_tile + row_tile) * TILE_ROWS
    column_start = column_tile * TILE_COLUMNS
    product = _tiles.tile_product(
        image, row_start, text, column_start, padded_width, TILE_ROWS, TILE_COLUMNS, DEPTH, LOADS, PRECISION
    )
    row = row_start + tl.arange(0, TILE_ROWS)
    row_reciprocal = tl.load(image_scalars + row)[:, None]
    slab_row = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column_out = column_parts + (row_tile + 1).to(tl.int64) * FIELDS * padded_columns
    WIDTH: tl.constexpr = TILE_COLUMNS // PIECES
    pieces = _tiles.split_columns(product, TILE_ROWS, TILE_COLUMNS, PIECES)
    for piece in tl.static_range(PIECES):
        start = column_start + piece * WIDTH
        column = start + tl.arange(0, WIDTH)
        column_reciprocal = tl.load(text_scalars + column)[None, :]
        cosine = _tiles.rounded_product(pieces[piece] * row_reciprocal, column_reciprocal)
        if KEEP:
            at = cosines + row_start.to(tl.int64) * padded_columns + start
            tl.store(at + tl.arange(0, TILE_ROWS)[:, None] * padded_columns + tl.arange(0, WIDTH)[None, :], cosine)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        positive = inside
        if KIND != LOG_SUM:
            positive = same_identity(image_ids, text_ids, row, column, rows, columns, HAS_IDS)
        row_out = row_parts + (column_tile * PIECES + piece).to(tl.int64) * FIELDS * slab_rows
        if KIND == PROJECTION:
            norm = tl.load(image_scalars + 2 * padded_rows + row) * LOG2E
            x = tl.where(inside, _tiles.rounded_product(norm[:, None], cosine), LOWEST)
            store_parts(row_out, slab_rows, slab_row, row < rows, x, x, True, positive, 1, KIND, SHIFT)
            norm = tl.load(text_scalars + 2 * padded_columns + column) * LOG2E
            x = tl.where(inside, _tiles.rounded_product(norm[None, :], cosine), LOWEST)
            store_parts(column_out, padded_columns, column, column < columns, x, x, True, positive, 0, KIND, SHIFT)
        else:
            factor = logit_factor(scale, constant, KIND)
            shifted = is_shifted(factor, SHIFT)
            x = tl.where(inside, _tiles.rounded_product(factor, cosine), LOWEST)
            e = tl.exp2(x)
            store_parts(row_out, slab_rows, slab_row, row < rows, x, e, shifted, positive, 1, KIND, SHIFT)
            store_parts(column_out, padded_columns, column, column < columns, x, e, shifted, positive, 0, KIND, SHIFT)


@triton.jit
def merge_parts(
    parts,
    stride,
    index,
    limit,
    first,
    count,
    KIND: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(maximum, second maximum, three sums, positives) of `index`, over parts [first, count) in a fixed order."""
    top = tl.full([ROWS], LOWEST, tl.float32)
    other_top = tl.full([ROWS], LOWEST, tl.float32)
    for begin in range(first, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        at = parts + part[:, None].to(tl.int64) * (FIELDS * stride) + index[None, :]
        mask = (part < count)[:, None] & (index < limit)[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=mask, other=LOWEST), 0))
        if KIND == TRIPLET:
            other_top = tl.maximum(other_top, tl.max(tl.load(at + stride, mask=mask, other=LOWEST), 0))
    first_sum = tl.zeros([ROWS], tl.float32)
    second_sum = tl.zeros([ROWS], tl.float32)
    third_sum = tl.zeros([ROWS], tl.float32)
    positives = tl.zeros([ROWS], tl.int32)
    for begin in range(first, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        at = parts + part[:, None].to(tl.int64) * (FIELDS * stride) + index[None, :]
        mask = (part < count)[:, None] & (index < limit)[None, :]
        shift = tl.load(at, mask=mask, other=LOWEST) - top[None, :]
        by = tl.exp2(shift)
        if KIND == TRIPLET:
            of_positive = tl.load(at + 2 * stride, mask=mask, other=0.0)
            first_sum += tl.sum(by * of_positive, 0)
            second_sum += tl.sum(by * (tl.load(at + 3 * stride, mask=mask, other=0.0) + of_positive * shift), 0)
            other_by = tl.exp2(tl.load(at + stride, mask=mask, other=LOWEST) - other_top[None, :])
            third_sum += tl.sum(other_by * tl.load(at + 4 * stride, mask=mask, other=0.0), 0)
        elif KIND == INFO_NCE or KIND == LOG_SUM:
            first_sum += tl.sum(by * tl.load(at + stride, mask=mask, other=0.0), 0)
        else:
            of_positive = tl.load(at + stride, mask=mask, other=0.0)
            of_negative = tl.load(at + 3 * stride, mask=mask, other=0.0)
            first_sum += tl.sum(by * of_positive, 0)
            second_sum += tl.sum(
                by * (tl.load(at + 2 * stride, mask=mask, other=0.0) + (of_positive + of_negative) * shift), 0
            )
            third_sum += tl.sum(by * of_negative, 0)
        if KIND == INFO_NCE:
            second_sum += tl.sum(tl.load(at + 2 * stride, mask=mask, other=0.0), 0)
        if KIND != LOG_SUM:
            positives += tl.sum(tl.load(at + (FIELDS - 1) * stride, mask=mask, other=0.0).to(tl.int32), 0)
    return top, other_top, first_sum, second_sum, third_sum, positives


@triton.jit
def store_merged(
    out,
    stride,
    index,
    mask,
    top,
    other_top,
    first_sum,
    second_sum,
    third_sum,
    positives,
    KIND: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Write merged statistics as a part, for the parts that are yet to come."""
    at = out + index
    tl.store(at, top, mask=mask)
    if KIND == TRIPLET:
        tl.store(at + stride, other_top, mask=mask)
        tl.store(at + 2 * stride, first_sum, mask=mask)
        tl.store(at + 3 * stride, second_sum, mask=mask)
        tl.store(at + 4 * stride, third_sum, mask=mask)
    elif KIND == INFO_NCE or KIND == LOG_SUM:
        tl.store(at + stride, first_sum, mask=mask)
    else:
        tl.store(at + stride, first_sum, mask=mask)
        tl.store(at + 2 * stride, second_sum, mask=mask)
        tl.store(at + 3 * stride, third_sum, mask=mask)
    if KIND == INFO_NCE:
        tl.store(at + 2 * stride, second_sum, mask=mask)
    if KIND != LOG_SUM:
        tl.store(at + (FIELDS - 1) * stride, positives.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["first", "count", "limit"])
def similarity_merge_kernel(
    parts,
    stride,
    first,
    count,
    limit,
    KIND: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge all parts of each column into part 0."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top, other_top, first_sum, second_sum, third_sum, positives = merge_parts(
        parts, stride, index, limit, first, count, KIND, FIELDS, ROWS, PARTS
    )
    store_merged(
        parts, stride, index, index < limit, top, other_top, first_sum, second_sum, third_sum, positives, KIND, FIELDS
    )


@triton.jit(do_not_specialize=["first", "count", "begin", "limit", "entries", "total_begin", "total_stride"])
def similarity_finish_kernel(
    parts,
    stride,
    first,
    count,
    begin,
    limit,
    entries,
    norms,
    coefficients,
    coefficient_stride,
    totals,
    total_begin,
    total_stride,
    eps,
    margin,
    tau,
    L2_TARGET: tl.constexpr,
    KIND: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Coefficients of dL/dlogit of rows (or columns) begin + index < limit, for :func:`logit_gradient`, and the
    program's totals in float64: losses, rows with a positive, the largest bound of |dL/dcosine|, without weights."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = begin + index < limit
    top, other_top, first_sum, second_sum, third_sum, positives = merge_parts(
        parts, stride, index, limit - begin, first, count, KIND, FIELDS, ROWS, PARTS
    )
    maximum = LN2 * top.to(tl.float64)
    one = tl.full([ROWS], 1.0, tl.float64)
    first_sum = tl.where(mask, first_sum.to(tl.float64), one)
    second_sum = LN2 * second_sum.to(tl.float64)
    third_sum = third_sum.to(tl.float64)
    has_positive = tl.where(positives > 0, one, 0.0)
    number = tl.maximum(positives, 1).to(tl.float64)
    at = coefficients + begin + index
    tl.store(at, top, mask=mask)
    if KIND == INFO_NCE:
        # A row without a positive counts 0 times, which keeps NaN.
        loss = has_positive * (maximum + tl.log(first_sum) - second_sum / number)
        bound = has_positive
        tl.store(at + coefficient_stride, (has_positive / first_sum).to(tl.float32), mask=mask)
        tl.store(at + 2 * coefficient_stride, (has_positive / number).to(tl.float32), mask=mask)
    elif KIND == TRIPLET:
        of_positive = tl.where(first_sum == 0, one, first_sum)
        of_negative = tl.where(third_sum == 0, one, third_sum)
        other_maximum = LN2 * other_top.to(tl.float64)
        hinge = margin - tau * (maximum + second_sum / of_positive) + tau * (other_maximum + tl.log(of_negative))
        valid = (positives > 0) & (positives < entries)
        # Multiplied where the row does not count, compared from the other side where it does: NaN shows.
        loss = tl.where(valid, tl.where(hinge <= 0, 0.0, hinge), 0.0 * (first_sum + third_sum))
        bound = tl.where(valid & (hinge > 0), one, 0.0)
        active = valid & ((hinge <= 0) == 0)
        tl.store(at + coefficient_stride, tl.where(active, -1.0 / of_positive, 0.0).to(tl.float32), mask=mask)
        tl.store(at + 2 * coefficient_stride, other_top, mask=mask)
        tl.store(at + 3 * coefficient_stride, tl.where(active, 1.0 / of_negative, 0.0).to(tl.float32), mask=mask)
    else:
        total = first_sum + third_sum
        log_total = tl.log(total)
        log_eps = tl.log(one * eps)
        log_target = tl.log(1.0 / (tl.sqrt(number) if L2_TARGET else number) + eps)
        log_target = tl.where(positives > 0, log_target, log_eps)
        loss = (second_sum - log_target * first_sum - log_eps * third_sum) / total - log_total
        of_positive = log_total + log_target + loss
        of_negative = log_total + log_eps + loss
        # e^-t (t + |c|) <= max(1, |c|) for t >= 0.
        bound = tl.maximum(tl.maximum(tl.abs(of_positive), tl.abs(of_negative)), 1.0) / total
        if KIND == PROJECTION:
            bound *= tl.load(norms + begin + index).to(tl.float64)
        tl.store(at + coefficient_stride, (1.0 / total).to(tl.float32), mask=mask)
        tl.store(at + 2 * coefficient_stride, of_positive.to(tl.float32), mask=mask)
        tl.store(at + 3 * coefficient_stride, of_negative.to(tl.float32), mask=mask)
    out = totals + total_begin + tl.program_id(0)
    tl.store(out, tl.sum(tl.where(mask, loss, 0.0), 0))
    tl.store(out + total_stride, tl.sum(tl.where(mask, has_positive, 0.0), 0))
    tl.store(out + 2 * total_stride, tl.max(tl.where(mask, bound, 0.0), 0))


@triton.jit
def sum_totals(totals, stride, begin, end, BLOCK: tl.constexpr):
    """(losses, rows with a positive, bound) of programs [begin, end), in a fixed order."""
    loss = tl.zeros([BLOCK], tl.float64)
    valid = tl.zeros([BLOCK], tl.float64)
    bound = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < end
        loss += tl.load(totals + index, mask=mask, other=0.0)
        valid += tl.load(totals + stride + index, mask=mask, other=0.0)
        bound = tl.maximum(bound, tl.load(totals + 2 * stride + index, mask=mask, other=0.0))
    return tl.sum(loss, 0), tl.sum(valid, 0), tl.max(bound, 0)


@triton.jit(do_not_specialize=["row_programs", "programs", "rows", "columns"])
def similarity_loss_kernel(
    totals,
    row_programs,
    programs,
    rows,
    columns,
    loss,
    weights,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss, and `weights`: of a row, of a column, and a power of two that brings dL/dcosine below 2^15."""
    row_loss, valid_rows, row_bound = sum_totals(totals, programs, 0, row_programs, BLOCK)
    column_loss, valid_columns, column_bound = sum_totals(totals, programs, row_programs, programs, BLOCK)
    if KIND == INFO_NCE:
        row_weight = 0.5 / tl.maximum(valid_rows, 1.0)
        column_weight = 0.5 / tl.maximum(valid_columns, 1.0)
    elif KIND == TRIPLET:
        row_weight = valid_rows * 0.0 + 1.0
        column_weight = row_weight
    else:
        row_weight = 1.0 / (valid_rows * 0.0 + rows)
        column_weight = 1.0 / (valid_rows * 0.0 + columns)
    tl.store(loss, (row_weight * row_loss + column_weight * column_loss).to(tl.float32))
    tl.store(weights, row_weight.to(tl.float32))
    tl.store(weights + 1, column_weight.to(tl.float32))
    bound = (row_weight * row_bound + column_weight * column_bound).to(tl.float32)
    exponent = ((bound.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    power = tl.minimum(tl.maximum(14 - exponent, -126), 126)
    tl.store(weights + 2, ((power + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit
def logit_gradient(
    x,
    shared,
    shifted,
    positive,
    coefficients,
    stride,
    AXIS: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """dL/dlogit of a tile, before the weight, from the coefficients of its rows (AXIS 1) or columns (AXIS 0)."""
    first = tl.load(coefficients + stride)
    if KIND == TRIPLET:
        third = tl.load(coefficients + 3 * stride)
        e = shared
        if SHIFT == ALWAYS:
            top = tl.expand_dims(tl.load(coefficients), AXIS)
            other_top = tl.expand_dims(tl.load(coefficients + 2 * stride), AXIS)
            e = tl.exp2(x - tl.where(positive, top, other_top))
        return e * tl.where(positive, tl.expand_dims(first, AXIS), tl.expand_dims(third, AXIS))
    top = tl.load(coefficients)
    second = tl.load(coefficients + 2 * stride)
    below = x - tl.expand_dims(top, AXIS)
    first = tl.where(shifted, first, first * tl.exp2(-top))
    e = shared
    if SHIFT == ALWAYS:
        e = tl.exp2(below)
    elif SHIFT == BY_SCALE:
        if shifted:
            e = tl.exp2(below)
    e *= tl.expand_dims(first, AXIS)
    if KIND == INFO_NCE:
        return e - tl.where(positive, tl.expand_dims(second, AXIS), 0.0)
    third = tl.load(coefficients + 3 * stride)
    return e * (LN2 * below - tl.where(positive, tl.expand_dims(second, AXIS), tl.expand_dims(third, AXIS)))


@triton.jit(do_not_specialize=["first_row_tile", "row_tiles", "column_tiles", "rows", "columns", "first_column_tile"])
def similarity_gradient_kernel(
    image,
    image_scalars,
    image_ids,
    image_coefficients,
    text,
    text_scalars,
    text_ids,
    text_coefficients,
    scale,
    constant,
    weights,
    slab,
    slab_stride,
    row_sums,
    column_sums,
    first_row_tile,
    row_tiles,
    first_column_tile,
    column_tiles,
    rows,
    columns,
    padded_rows,
    padded_columns,
    padded_width,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    KEPT: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of a block's slab: G = dL/dcosine (without the common factor of the logits) times both packed rows'
    reciprocal norms, times UNIT^2 and, where SCALED, the slab scale.

    row_sums: with a common factor, [tile of the block] sums of G * cosine; with norms, [column tile][row] of the block,
    sums of dL/dx * cosine, and column_sums likewise.
    """
    row_tile, column_tile = _tiles.tile_position(tl.program_id(0), row_tiles, column_tiles)
    row_start = (first_row_tile + row_tile) * TILE_ROWS
    column_start = (first_column_tile + column_tile) * TILE_COLUMNS
    row = row_start + tl.arange(0, TILE_ROWS)
    row_reciprocal = tl.load(image_scalars + row)[:, None]
    of_row = image_coefficients + row
    row_weight = tl.load(weights)
    column_weight = tl.load(weights + 1)
    out = slab + (row_tile * TILE_ROWS).to(tl.int64) * slab_stride + column_tile * TILE_COLUMNS
    WIDTH: tl.constexpr = TILE_COLUMNS // PIECES
    out += tl.arange(0, TILE_ROWS)[:, None] * slab_stride + tl.arange(0, WIDTH)[None, :]
    if KEPT == 0:
        product = _tiles.tile_product(
            image, row_start, text, column_start, padded_width, TILE_ROWS, TILE_COLUMNS, DEPTH, LOADS, PRECISION
        )
        pieces = _tiles.split_columns(product, TILE_ROWS, TILE_COLUMNS, PIECES)
    total = tl.zeros([TILE_ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        column = column_start + piece * WIDTH + tl.arange(0, WIDTH)
        column_reciprocal = tl.load(text_scalars + column)[None, :]
        if KEPT:
            cosine = tl.load(out + piece * WIDTH)
        else:
            cosine = _tiles.rounded_product(pieces[piece] * row_reciprocal, column_reciprocal)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        positive = same_identity(image_ids, text_ids, row, column, rows, columns, HAS_IDS)
        of_column = text_coefficients + column
        if KIND == PROJECTION:
            row_norm = tl.load(image_scalars + 2 * padded_rows + row)[:, None]
            column_norm = tl.load(text_scalars + 2 * padded_columns + column)[None, :]
            x = _tiles.rounded_product(row_norm * LOG2E, cosine)
            by_row = row_weight * logit_gradient(x, x, True, positive, of_row, padded_rows, 1, KIND, SHIFT)
            x = _tiles.rounded_product(column_norm * LOG2E, cosine)
            by_column = column_weight * logit_gradient(x, x, True, positive, of_column, padded_columns, 0, KIND, SHIFT)
            total += tl.sum(tl.where(inside, by_row * cosine, 0.0), 1)
            at = column_sums + row_tile.to(tl.int64) * (column_tiles * TILE_COLUMNS)
            tl.store(
                at + column - first_column_tile * TILE_COLUMNS, tl.sum(tl.where(inside, by_column * cosine, 0.0), 0)
            )
            g = row_norm * by_row + column_norm * by_column
        else:
            factor = logit_factor(scale, constant, KIND)
            shifted = is_shifted(factor, SHIFT)
            x = _tiles.rounded_product(factor, cosine)
            e = tl.exp2(x)
            g = row_weight * logit_gradient(x, e, shifted, positive, of_row, padded_rows, 1, KIND, SHIFT)
            g += column_weight * logit_gradient(x, e, shifted, positive, of_column, padded_columns, 0, KIND, SHIFT)
            total += tl.sum(tl.where(inside, g * cosine, 0.0), 1)
        if SCALED:
            g *= tl.load(weights + 2)
        g *= (UNIT * row_reciprocal) * (UNIT * column_reciprocal)
        tl.store(out + piece * WIDTH, tl.where(inside, g, 0.0).to(slab.dtype.element_ty))
    if KIND == PROJECTION:
        at = row_sums + column_tile.to(tl.int64) * (row_tiles * TILE_ROWS)
        tl.store(at + row - first_row_tile * TILE_ROWS, total)
    else:
        tl.store(row_sums + row_tile * column_tiles + column_tile, tl.sum(total, 0))


class _Call(NamedTuple):
    """What one call asks for."""

    kind: int
    image: Tensor
    text: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    scale: Tensor | None
    workspace_bytes: int
    need_image: bool
    need_text: bool
    need_scale: bool
    eps: float = 1.0
    margin: float = 0.0
    tau: float = 1.0
    l2_target: bool = False


def packed_dtype(*features: Tensor) -> torch.dtype:
    """What all of them are packed as: their common half dtype, float32 otherwise."""
    dtypes = {tensor.dtype for tensor in features}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def rows_of_statistics(columns: int, fields: int, shape: TileShape, workspace_bytes: int) -> int:
    """How many rows (whole tiles) have statistics that fit the workspace."""
    row_bytes = 4 * fields * columns * (shape.pieces / shape.columns + 1 / shape.rows)
    return max(int(workspace_bytes / row_bytes) // TILE, 1) * TILE


def _shift(kind: int, constant: float) -> int:
    if kind == PROJECTION.value:
        return ALWAYS.value
    if kind == TRIPLET.value:
        return NEVER.value if constant * LOG2E.value <= UNSHIFTED.value else ALWAYS.value
    return BY_SCALE.value


def launch_statistics(
    kind: int,
    image: PackedRows,
    text: PackedRows,
    ids: tuple[Tensor, Tensor] | None,
    scale: Tensor | None,
    constant: float,
    shape: TileShape,
    begin: int,
    count: int,
    row_parts: Tensor,
    column_parts: Tensor,
    cosines: Tensor | None,
) -> None:
    """Statistics of the packed rows [begin, begin + count)."""
    row_tiles, column_tiles = count // shape.rows, text.data.shape[0] // shape.columns
    anything = image.scalars
    wrap_triton(similarity_statistics_kernel)[(row_tiles * column_tiles,)](
        _tiles.operand(image.data, shape.rows, shape.depth, shape.loads),
        image.scalars,
        anything if ids is None else ids[0],
        _tiles.operand(text.data, shape.columns, shape.depth, shape.loads),
        text.scalars,
        anything if ids is None else ids[1],
        anything if scale is None else scale,
        constant,
        row_parts,
        column_parts,
        anything if cosines is None else cosines,
        begin // shape.rows,
        row_tiles,
        column_tiles,
        image.rows,
        text.rows,
        image.data.shape[0],
        text.data.shape[0],
        image.data.shape[1],
        row_parts.shape[2],
        KIND=kind,
        FIELDS=_FIELDS[kind],
        SHIFT=_shift(kind, constant),
        HAS_IDS=ids is not None,
        KEEP=cosines is not None,
        **shape.constants(),
    )


def merge_columns(kind: int, parts: Tensor, first: int, count: int, columns: int) -> None:
    """Merge the parts [first, count) of all columns into part 0."""
    wrap_triton(similarity_merge_kernel)[(triton.cdiv(columns, _MERGE_ROWS),)](
        parts,
        parts.shape[2],
        first,
        count,
        columns,
        KIND=kind,
        FIELDS=_FIELDS[kind],
        ROWS=_MERGE_ROWS,
        PARTS=_MERGE_PARTS,
        num_warps=4,
    )


def check_scale(name: str, scale: Tensor, like: Tensor) -> None:
    """Check a () factor of the logits, of any dtype that the kernels can have as float32."""
    _checks.check_tensor(name, scale, "()")
    if scale.device != like.device:
        raise ValueError(f"`{name}` must be on the device of the features ({like.device}), got {scale.device}")


def check_features(**features: Tensor) -> None:
    """Check what a direct call could get wrong about features: the dtypes that these kernels have, sizes, devices."""
    like = next(iter(features.values()))
    for name, value in features.items():
        _checks.check_tensor(name, value, "(B, d)", (torch.float32, torch.bfloat16, torch.float16))
        _checks.check_nonempty(name, value)
        _checks.check_like(name, value, next(iter(features)), like, dtype=False)


def check_workspace(workspace_bytes: int) -> None:
    """Check the budget of a direct call."""
    if workspace_bytes < 0:
        raise ValueError(f"`workspace_bytes` must not be negative, got {workspace_bytes}")


def _check(call: _Call) -> None:
    check_features(image=call.image, text=call.text)
    check_workspace(call.workspace_bytes)
    _checks.check_size("text", call.text, 1, call.image.shape[1], "width of `image`")
    if call.image_ids is not None and call.text_ids is not None:
        _checks.check_ids("image_ids", call.image_ids, call.image.shape[0], "image", call.image)
        _checks.check_ids("text_ids", call.text_ids, call.text.shape[0], "text", call.text)
    elif call.image_ids is not None or call.text_ids is not None:
        raise ValueError("`image_ids` and `text_ids` must be given together")
    else:
        _checks.check_size("text", call.text, 0, call.image.shape[0], "rows of `image`")
    if call.scale is not None:
        check_scale("logit_scale", call.scale, call.image)
    _checks.check_positive("eps", call.eps)
    _checks.check_positive("tau", call.tau)
    if not math.isfinite(call.margin):
        raise ValueError(f"`margin` must be finite, got {call.margin}")


class _Packed(NamedTuple):
    """A call's tensors as the kernels take them."""

    dtype: torch.dtype
    image: PackedRows
    text: PackedRows
    ids: tuple[Tensor, Tensor] | None
    scale: Tensor | None
    shape: TileShape


def _pack(call: _Call) -> _Packed:
    _check(call)
    dtype = packed_dtype(call.image, call.text)
    ids = None
    if call.image_ids is not None and call.text_ids is not None:
        ids = call.image_ids.contiguous(), call.text_ids.contiguous()
    return _Packed(
        dtype,
        _tiles.pack_rows(call.image, dtype),
        _tiles.pack_rows(call.text, dtype),
        ids,
        None if call.scale is None else call.scale.to(torch.float32),
        _tiles.tile_shape(dtype, call.image.device),
    )


def _run(call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = _pack(call)
    dtype, image, text, ids, scale, shape = packed
    kind, fields = call.kind, _FIELDS[call.kind]
    rows, columns = image.data.shape[0], text.data.shape[0]
    need_gradient = call.need_image or call.need_text or call.need_scale

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.image.new_empty(size, dtype=dtype)

    # float32 cosines are dear; those of halves are formed again sooner than they are read.
    keep = need_gradient and dtype == torch.float32 and 4 * rows * columns <= call.workspace_bytes
    cosines = empty(rows, columns) if keep else None
    slab = min(rows_of_statistics(columns, fields, shape, call.workspace_bytes), rows)
    row_pieces = columns // shape.columns * shape.pieces
    row_parts = empty(row_pieces, fields, slab)
    column_parts = empty(slab // shape.rows + 1, fields, columns)
    image_coefficients, text_coefficients = empty(_COEFFICIENTS[kind], rows), empty(_COEFFICIENTS[kind], columns)
    row_programs = triton.cdiv(image.rows, _MERGE_ROWS)
    programs = row_programs + triton.cdiv(text.rows, _MERGE_ROWS)
    totals = empty(3, programs, dtype=torch.float64)

    def finish(side: PackedRows, parts: Tensor, first: int, count: int, begin: int, size: int) -> None:
        of_text = side is text
        size = min(size, side.rows - begin)
        wrap_triton(similarity_finish_kernel)[(triton.cdiv(size, _MERGE_ROWS),)](
            parts,
            parts.shape[2],
            first,
            count,
            begin,
            side.rows,
            image.rows if of_text else text.rows,
            side.scalars[2],
            text_coefficients if of_text else image_coefficients,
            side.data.shape[0],
            totals,
            (row_programs if of_text else 0) + begin // _MERGE_ROWS,
            programs,
            call.eps,
            call.margin,
            call.tau,
            L2_TARGET=call.l2_target,
            KIND=kind,
            FIELDS=fields,
            ROWS=_MERGE_ROWS,
            PARTS=_MERGE_PARTS,
            num_warps=4,
        )

    for begin in range(0, rows, slab):
        count = min(slab, rows - begin)
        launch_statistics(
            kind, image, text, ids, scale, 1.0 / call.tau, shape, begin, count, row_parts, column_parts, cosines
        )
        finish(image, row_parts, 0, row_pieces, begin, count)
        # Part 0 of the columns is what the slabs before this one gave.
        first, parts = int(begin == 0), count // shape.rows + 1
        if begin + count < rows:
            merge_columns(kind, column_parts, first, parts, text.rows)
        else:
            finish(text, column_parts, first, parts, 0, columns)
    loss, weights = empty(), empty(3)
    wrap_triton(similarity_loss_kernel)[(1,)](
        totals, row_programs, programs, image.rows, text.rows, loss, weights, KIND=kind, BLOCK=1024, num_warps=4
    )
    if not need_gradient:
        return loss, empty(0), empty(0), empty(0)
    return loss, *_gradients(call, packed, image_coefficients, text_coefficients, weights, cosines)


def _gradients(
    call: _Call,
    packed: _Packed,
    image_coefficients: Tensor,
    text_coefficients: Tensor,
    weights: Tensor,
    cosines: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the images, the texts and the scale; without elements where not asked for."""
    dtype, image, text, ids, scale, shape = packed
    kind, rows, columns = call.kind, image.data.shape[0], text.data.shape[0]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.image.new_empty(size, dtype=dtype)

    products = SlabProducts(image, text, call.need_image, call.need_text)
    blocks = _tiles.blocks(image, text, dtype.itemsize, call.workspace_bytes)
    slab_tensor = empty(blocks[0].rows, blocks[0].columns, dtype=dtype) if cosines is None else cosines
    by_norm = kind == PROJECTION.value
    row_norms = empty(image.rows).zero_() if by_norm else None
    column_norms = empty(text.rows).zero_() if by_norm else None
    scale_gradient = empty().zero_()
    for block in blocks:
        row_tiles, column_tiles = block.rows // shape.rows, block.columns // shape.columns
        row_sums = empty(column_tiles, block.rows) if by_norm else empty(row_tiles * column_tiles)
        column_sums = empty(row_tiles, block.columns) if by_norm else row_sums
        wrap_triton(similarity_gradient_kernel)[(row_tiles * column_tiles,)](
            _tiles.operand(image.data, shape.rows, shape.depth, shape.loads),
            image.scalars,
            image.scalars if ids is None else ids[0],
            image_coefficients,
            _tiles.operand(text.data, shape.columns, shape.depth, shape.loads),
            text.scalars,
            text.scalars if ids is None else ids[1],
            text_coefficients,
            image.scalars if scale is None else scale,
            1.0 / call.tau,
            weights,
            slab_tensor,
            slab_tensor.shape[1],
            row_sums,
            column_sums,
            block.row // shape.rows,
            row_tiles,
            block.column // shape.columns,
            column_tiles,
            image.rows,
            text.rows,
            rows,
            columns,
            image.data.shape[1],
            KIND=kind,
            SHIFT=_shift(kind, 1.0 / call.tau),
            HAS_IDS=ids is not None,
            KEPT=cosines is not None,
            SCALED=dtype == torch.float16,
            UNIT=2.0 ** _tiles.packed_exponent(dtype),
            **shape.constants(),
        )
        products.add(slab_tensor, block)
        if row_norms is not None and column_norms is not None:
            of_rows = row_norms[block.row : block.row + block.rows]
            of_rows.add_(row_sums.sum(0)[: of_rows.shape[0]])
            of_columns = column_norms[block.column : block.column + block.columns]
            of_columns.add_(column_sums.sum(0)[: of_columns.shape[0]])
        elif call.need_scale:
            scale_gradient.add_(row_sums.sum())
    slab_scale: Tensor | float = weights[2] if dtype == torch.float16 else 1.0
    if products.image is not None:
        _tiles.project(products.image, image, scale, slab_scale, row_norms)
    if products.text is not None:
        _tiles.project(products.text, text, scale, slab_scale, column_norms)
    return (
        empty(0) if products.image is None else products.image,
        empty(0) if products.text is None else products.text,
        scale_gradient if call.need_scale else empty(0),
    )


def _slab_scale(kind: int, image: PackedRows, text: PackedRows, coefficients: tuple[Tensor, Tensor]) -> Tensor:
    """A power of two that brings dL/dcosine, bounded by its weighed coefficients, below 2^15."""
    bound = image.scalars.new_zeros(())
    for side, (_, first, second, third) in zip((image, text), coefficients, strict=True):
        if kind == INFO_NCE.value:
            of_rows = torch.maximum(first, second)
        elif kind == TRIPLET.value:
            of_rows = torch.maximum(first.abs(), third.abs())
        else:
            of_rows = first * torch.maximum(second.abs(), third.abs()).clamp(min=1)
        if kind == PROJECTION.value:
            of_rows = of_rows * side.scalars[2, : side.rows]
        bound = bound + of_rows.amax()
    return torch.ldexp(torch.ones_like(bound), (15 - torch.frexp(bound).exponent).clamp(-126, 126))


def _pass_call(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    loss: int,
    tau: float,
    workspace_bytes: int,
    needs: tuple[bool, bool, bool],
) -> _Call:
    if not 0 <= loss < len(_COEFFICIENTS):
        raise ValueError(f"`loss` must be 0 (InfoNCE), 1 (SDM), 2 (CMPM) or 3 (TAL), got {loss}")
    scale = logit_scale if loss in (INFO_NCE.value, MATCHING.value) else None
    call = _Call(loss, image, text, image_ids, text_ids, scale, workspace_bytes, *needs)
    return call._replace(tau=tau)


@operator
def similarity_statistics(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    loss: int,
    tau: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The first pass over a block, as torch.ops.lcr2s.similarity_statistics; logits are counted in base 2."""
    call = _pass_call(image, text, image_ids, text_ids, logit_scale, loss, tau, workspace_bytes, (False,) * 3)
    _, packed_image, packed_text, ids, scale, shape = _pack(call)
    fields = _FIELDS[loss]
    rows, columns = packed_image.data.shape[0], packed_text.data.shape[0]
    slab = min(rows_of_statistics(columns, fields, shape, workspace_bytes), rows)
    row_pieces = columns // shape.columns * shape.pieces
    row_parts = packed_image.scalars.new_empty((row_pieces, fields, slab))
    column_parts = packed_image.scalars.new_empty((slab // shape.rows + 1, fields, columns))
    of_images = packed_image.scalars.new_empty((fields, packed_image.rows))
    for begin in range(0, rows, slab):
        count = min(slab, rows - begin)
        launch_statistics(
            loss, packed_image, packed_text, ids, scale, 1.0 / tau, shape, begin, count, row_parts, column_parts, None
        )
        inside = min(count, packed_image.rows - begin)
        merge_columns(loss, row_parts, 0, row_pieces, inside)
        of_images[:, begin : begin + inside] = row_parts[0, :, :inside]
        merge_columns(loss, column_parts, int(begin == 0), count // shape.rows + 1, packed_text.rows)
    return of_images, column_parts[0, :, : packed_text.rows].clone()


@operator
def similarity_gradients(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    image_coefficients: Tensor,
    text_coefficients: Tensor,
    loss: int,
    tau: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The second pass over a block, as torch.ops.lcr2s.similarity_gradients; maxima are counted in base 2."""
    needs = need_image, need_text, need_scale
    call = _pass_call(image, text, image_ids, text_ids, logit_scale, loss, tau, workspace_bytes, needs)
    packed = _pack(call)
    padded = []
    sides = (
        ("image_coefficients", image_coefficients, packed.image),
        ("text_coefficients", text_coefficients, packed.text),
    )
    for name, coefficients, side in sides:
        _checks.check_tensor(name, coefficients, "(4, rows)", (torch.float32,))
        _checks.check_size(name, coefficients, 0, 4, "coefficients of a row")
        _checks.check_size(name, coefficients, 1, side.rows, "rows of that side")
        _checks.check_like(name, coefficients, "image", image, dtype=False)
        padded.append(torch.nn.functional.pad(coefficients, (0, side.data.shape[0] - side.rows)))
    weights = image_coefficients.new_ones(3)
    if packed.dtype == torch.float16:
        weights[2] = _slab_scale(loss, packed.image, packed.text, (image_coefficients, text_coefficients))
    return _gradients(call, packed, padded[0], padded[1], weights, None)


@operator
def info_nce(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    logit_scale: Tensor,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of :func:`lcr2s_ext.ops.info_nce_loss`, as torch.ops.lcr2s.info_nce."""
    needs = need_image, need_text, need_scale
    return _run(_Call(INFO_NCE.value, image, text, image_ids, text_ids, logit_scale, workspace_bytes, *needs))


@operator
def sdm(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    eps: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of :func:`lcr2s_ext.ops.sdm_loss`, as torch.ops.lcr2s.sdm."""
    needs = need_image, need_text, need_scale
    return _run(_Call(MATCHING.value, image, text, image_ids, text_ids, logit_scale, workspace_bytes, *needs, eps=eps))


@operator
def cmpm(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    l2_target: bool,
    eps: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of :func:`lcr2s_ext.ops.cmpm_loss`, as torch.ops.lcr2s.cmpm."""
    needs = need_image, need_text, False
    call = _Call(PROJECTION.value, image, text, image_ids, text_ids, None, workspace_bytes, *needs, eps=eps)
    return _run(call._replace(l2_target=l2_target))[:3]


@operator
def tal(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    margin: float,
    tau: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of :func:`lcr2s_ext.ops.tal_loss`, as torch.ops.lcr2s.tal."""
    needs = need_image, need_text, False
    call = _Call(TRIPLET.value, image, text, image_ids, text_ids, None, workspace_bytes, *needs)
    return _run(call._replace(margin=margin, tau=tau))[:3]
