"""Relation KL in Triton: two passes over tiles of the student's and of the teacher's cosines.

The first leaves the log-sum-exp of every row and column of both. The second knows u = (z - lse z) - (x - lse x) of
every entry (x the student's logits, z the teacher's), so that p_S = p_T e^-u and

    KL = sum p_T (u + e^-u - 1),  dKL/dx = p_T (e^-u - 1):

no term cancels where the student is near the teacher, and because E_T[1 - e^-u] = 0 an error of the log-sum-exps enters
the loss squared.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.triton import _tiles
from lcr2s_ext.triton._launch import operator, wrap_triton
from lcr2s_ext.triton._tiles import TILE, PackedRows, SlabProducts, TileShape
from lcr2s_ext.triton.similarity import (
    BY_SCALE,
    LN2,
    LOG2E,
    LOG_SUM,
    check_features,
    check_scale,
    check_workspace,
    is_shifted,
    launch_statistics,
    merge_columns,
    merge_parts,
    packed_dtype,
    rows_of_statistics,
)

_FIELDS = 2
_COEFFICIENTS = 5
_MERGE_ROWS = 64
_MERGE_PARTS = 16


@triton.jit(do_not_specialize=["first", "count", "teacher_count", "begin", "limit"])
def relation_kl_finish_kernel(
    student_parts,
    teacher_parts,
    stride,
    first,
    count,
    teacher_count,
    begin,
    limit,
    coefficients,
    coefficient_stride,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Of rows (or columns) begin + index < limit: maximum and reciprocal sum of the student's and of the teacher's
    exponentials (logits in base 2), and lse z - lse x."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = begin + index < limit
    top, _, total, _, _, _ = merge_parts(
        student_parts, stride, index, limit - begin, first, count, LOG_SUM, FIELDS, ROWS, PARTS
    )
    teacher_top, _, teacher_total, _, _, _ = merge_parts(
        teacher_parts, stride, index, limit - begin, first, teacher_count, LOG_SUM, FIELDS, ROWS, PARTS
    )
    total = tl.where(mask, total, 1.0).to(tl.float64)
    teacher_total = tl.where(mask, teacher_total, 1.0).to(tl.float64)
    delta = LN2 * (teacher_top.to(tl.float64) - top.to(tl.float64)) + (tl.log(teacher_total) - tl.log(total))
    at = coefficients + begin + index
    tl.store(at, top, mask=mask)
    tl.store(at + coefficient_stride, (1.0 / total).to(tl.float32), mask=mask)
    tl.store(at + 2 * coefficient_stride, teacher_top, mask=mask)
    tl.store(at + 3 * coefficient_stride, (1.0 / teacher_total).to(tl.float32), mask=mask)
    tl.store(at + 4 * coefficient_stride, delta.to(tl.float32), mask=mask)


@triton.jit
def probability(x, shared, shifted, coefficients, stride, AXIS: tl.constexpr):
    """Softmax over the rows (AXIS 1) or columns (AXIS 0) of base-2 logits x; `shared` is exp2(x)."""
    top = tl.load(coefficients)
    reciprocal = tl.load(coefficients + stride)
    e = shared
    if shifted:
        e = tl.exp2(x - tl.expand_dims(top, AXIS))
    return e * tl.expand_dims(tl.where(shifted, reciprocal, reciprocal * tl.exp2(-top)), AXIS)


@triton.jit
def divergence(teacher, student, u):
    """(p_T (e^-u - 1), p_T (u + e^-u - 1)) from p_T, p_S and u."""
    # (e^-u - 1 + u) / u^2 by its series where |u| < 1/2, from the probabilities elsewhere.
    series = u * (-1 / 362880) + 1 / 40320
    series = series * u - 1 / 5040
    series = series * u + 1 / 720
    series = series * u - 1 / 120
    series = series * u + 1 / 24
    series = series * u - 1 / 6
    series = series * u + 1 / 2
    curved = series * u * u
    far = student - teacher
    near = tl.abs(u) < 0.5
    return tl.where(near, teacher * (curved - u), far), tl.where(near, teacher * curved, teacher * u + far)


@triton.jit(do_not_specialize=["first_row_tile", "row_tiles", "column_tiles", "rows", "columns", "first_column_tile"])
def relation_kl_kernel(
    image,
    image_scalars,
    text,
    text_scalars,
    padded_width,
    teacher_image,
    teacher_image_scalars,
    teacher_text,
    teacher_text_scalars,
    teacher_padded_width,
    row_coefficients,
    column_coefficients,
    student_scale,
    teacher_scale,
    slab,
    slab_stride,
    slab_scale,
    teacher_cosines,
    sums,
    first_row_tile,
    row_tiles,
    first_column_tile,
    column_tiles,
    rows,
    columns,
    padded_rows,
    padded_columns,
    row_weight,
    column_weight,
    KEPT: tl.constexpr,
    STORE: tl.constexpr,
    UNIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_DEPTH: tl.constexpr,
    TEACHER_LOADS: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """One tile of a block: sums [field][tile] of the rows' and of the columns' KL terms and of G * cosine, where
    G = dL/dx; with STORE, the slab: G times both packed rows' reciprocal norms, times UNIT^2 and the slab scale.
    KEPT: the slab holds the student's cosines, which G overwrites, and `teacher_cosines` the teacher's."""
    row_tile, column_tile = _tiles.tile_position(tl.program_id(0), row_tiles, column_tiles)
    row_start = (first_row_tile + row_tile) * TILE_ROWS
    column_start = (first_column_tile + column_tile) * TILE_COLUMNS
    row = row_start + tl.arange(0, TILE_ROWS)
    reciprocal = tl.load(image_scalars + row)[:, None]
    teacher_reciprocal = tl.load(teacher_image_scalars + row)[:, None]
    WIDTH: tl.constexpr = TILE_COLUMNS // PIECES
    at = (row_tile * TILE_ROWS).to(tl.int64) * slab_stride + column_tile * TILE_COLUMNS
    at += tl.arange(0, TILE_ROWS)[:, None] * slab_stride + tl.arange(0, WIDTH)[None, :]
    if KEPT == 0:
        product = _tiles.tile_product(
            image, row_start, text, column_start, padded_width, TILE_ROWS, TILE_COLUMNS, DEPTH, LOADS, PRECISION
        )
        teacher_product = _tiles.tile_product(
            teacher_image,
            row_start,
            teacher_text,
            column_start,
            teacher_padded_width,
            TILE_ROWS,
            TILE_COLUMNS,
            TEACHER_DEPTH,
            TEACHER_LOADS,
            TEACHER_PRECISION,
        )
        pieces = _tiles.split_columns(product, TILE_ROWS, TILE_COLUMNS, PIECES)
        teacher_pieces = _tiles.split_columns(teacher_product, TILE_ROWS, TILE_COLUMNS, PIECES)
    student_factor = tl.load(student_scale)
    teacher_factor = tl.load(teacher_scale)
    student_shifted = is_shifted(student_factor * LOG2E, BY_SCALE)
    teacher_shifted = is_shifted(teacher_factor * LOG2E, BY_SCALE)
    of_row = row_coefficients + row
    row_sum = tl.zeros([TILE_ROWS], tl.float32)
    column_sum = tl.zeros([TILE_ROWS], tl.float32)
    scale_sum = tl.zeros([TILE_ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        column = column_start + piece * WIDTH + tl.arange(0, WIDTH)
        column_reciprocal = tl.load(text_scalars + column)[None, :]
        if KEPT:
            cosine = tl.load(slab + at + piece * WIDTH)
            teacher_cosine = tl.load(teacher_cosines + at + piece * WIDTH)
        else:
            cosine = _tiles.rounded_product(pieces[piece] * reciprocal, column_reciprocal)
            teacher_column = tl.load(teacher_text_scalars + column)[None, :]
            teacher_cosine = _tiles.rounded_product(teacher_pieces[piece] * teacher_reciprocal, teacher_column)
        # z - x, exact where scales agree and cosines are close.
        apart = teacher_factor * (teacher_cosine - cosine) + (teacher_factor - student_factor) * cosine
        x = _tiles.rounded_product(student_factor * LOG2E, cosine)
        z = _tiles.rounded_product(teacher_factor * LOG2E, teacher_cosine)
        student_e = tl.exp2(x)
        teacher_e = tl.exp2(z)
        of_column = column_coefficients + column
        row_slope, row_term = divergence(
            probability(z, teacher_e, teacher_shifted, of_row + 2 * padded_rows, padded_rows, 1),
            probability(x, student_e, student_shifted, of_row, padded_rows, 1),
            apart - tl.load(of_row + 4 * padded_rows)[:, None],
        )
        column_slope, column_term = divergence(
            probability(z, teacher_e, teacher_shifted, of_column + 2 * padded_columns, padded_columns, 0),
            probability(x, student_e, student_shifted, of_column, padded_columns, 0),
            apart - tl.load(of_column + 4 * padded_columns)[None, :],
        )
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = row_weight * row_slope + column_weight * column_slope
        row_sum += tl.sum(tl.where(inside, row_term, 0.0), 1)
        column_sum += tl.sum(tl.where(inside, column_term, 0.0), 1)
        scale_sum += tl.sum(tl.where(inside, g * cosine, 0.0), 1)
        if STORE:
            g *= (slab_scale * UNIT * reciprocal) * (UNIT * column_reciprocal)
            tl.store(slab + at + piece * WIDTH, tl.where(inside, g, 0.0).to(slab.dtype.element_ty))
    tiles = row_tiles * column_tiles
    out = sums + row_tile * column_tiles + column_tile
    tl.store(out, tl.sum(row_sum, 0))
    tl.store(out + tiles, tl.sum(column_sum, 0))
    tl.store(out + 2 * tiles, tl.sum(scale_sum, 0))


class _Packed(NamedTuple):
    """A call's tensors as the kernels take them: image, text, scale and tile of the student, then of the teacher."""

    dtype: torch.dtype
    teacher_dtype: torch.dtype
    models: tuple[tuple[PackedRows, PackedRows, Tensor, TileShape], tuple[PackedRows, PackedRows, Tensor, TileShape]]


def _pack(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    workspace_bytes: int,
) -> _Packed:
    check_features(
        student_image=student_image, student_text=student_text, teacher_image=teacher_image, teacher_text=teacher_text
    )
    _checks.check_size("student_text", student_text, 1, student_image.shape[1], "width of `student_image`")
    _checks.check_size("teacher_text", teacher_text, 1, teacher_image.shape[1], "width of `teacher_image`")
    _checks.check_size("teacher_image", teacher_image, 0, student_image.shape[0], "rows of `student_image`")
    _checks.check_size("teacher_text", teacher_text, 0, student_text.shape[0], "rows of `student_text`")
    check_scale("student_scale", student_scale, student_image)
    check_scale("teacher_scale", teacher_scale, student_image)
    check_workspace(workspace_bytes)
    dtype, teacher_dtype = packed_dtype(student_image, student_text), packed_dtype(teacher_image, teacher_text)

    def model(image: Tensor, text: Tensor, scale: Tensor, kind: torch.dtype) -> Any:
        packed = _tiles.pack_rows(image, kind), _tiles.pack_rows(text, kind)
        return *packed, scale.to(torch.float32), _tiles.tile_shape(kind, image.device)

    student = model(student_image, student_text, student_scale, dtype)
    return _Packed(dtype, teacher_dtype, (student, model(teacher_image, teacher_text, teacher_scale, teacher_dtype)))


class _Sums:
    """Memory for the first pass over slabs of rows."""

    def __init__(self, packed: _Packed, workspace_bytes: int) -> None:
        image, text = packed.models[0][:2]
        rows, columns = image.data.shape[0], text.data.shape[0]
        shapes = [side[3] for side in packed.models]
        self.models = packed.models
        self.slab = min(*(rows_of_statistics(columns, 2 * _FIELDS, shape, workspace_bytes) for shape in shapes), rows)
        self.begins = range(0, rows, self.slab)
        self.rows = rows
        self.row_pieces = [columns // shape.columns * shape.pieces for shape in shapes]
        empty = image.scalars.new_empty
        self.row_parts = [empty((pieces, _FIELDS, self.slab)) for pieces in self.row_pieces]
        self.column_parts = [empty((self.slab // shape.rows + 1, _FIELDS, columns)) for shape in shapes]

    def launch(self, begin: int, cosines: Tensor | None) -> tuple[int, int, list[int]]:
        """Leave the slab's parts: its rows, and of the columns' parts the first that counts and how many there are."""
        count = min(self.slab, self.rows - begin)
        for model, (image, text, scale, shape) in enumerate(self.models):
            launch_statistics(
                LOG_SUM.value,
                image,
                text,
                None,
                scale,
                0.0,
                shape,
                begin,
                count,
                self.row_parts[model],
                self.column_parts[model],
                None if cosines is None else cosines[model],
            )
        # Part 0 of the columns is what the slabs before this one gave.
        return count, int(begin == 0), [count // side[3].rows + 1 for side in self.models]

    def merge_columns(self, first: int, counts: list[int], columns: int) -> None:
        """Into part 0."""
        for parts, count in zip(self.column_parts, counts, strict=True):
            merge_columns(LOG_SUM.value, parts, first, count, columns)


@operator
def relation_kl(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of :func:`lcr2s_ext.ops.relation_kl_loss`, as torch.ops.lcr2s.relation_kl."""
    features = student_image, student_text, teacher_image, teacher_text
    packed = _pack(*features, student_scale, teacher_scale, workspace_bytes)
    image, text = packed.models[0][:2]
    rows, columns = image.data.shape[0], text.data.shape[0]
    # float32 cosines are dear; those of halves are formed again sooner than they are read.
    dear = packed.dtype == packed.teacher_dtype == torch.float32
    keep = dear and 2 * 4 * rows * columns <= workspace_bytes
    cosines = image.scalars.new_empty((2, rows, columns)) if keep else None
    row_coefficients = image.scalars.new_empty((_COEFFICIENTS, rows))
    column_coefficients = image.scalars.new_empty((_COEFFICIENTS, columns))

    def finish(parts: list[Tensor], first: int, counts: list[int], begin: int, limit: int, out: Tensor) -> None:
        size = min(parts[0].shape[2], limit - begin)
        wrap_triton(relation_kl_finish_kernel)[(triton.cdiv(size, _MERGE_ROWS),)](
            *parts,
            parts[0].shape[2],
            first,
            *counts,
            begin,
            limit,
            out,
            out.shape[1],
            FIELDS=_FIELDS,
            ROWS=_MERGE_ROWS,
            PARTS=_MERGE_PARTS,
            num_warps=4,
        )

    sums = _Sums(packed, workspace_bytes)
    for begin in sums.begins:
        count, first, counts = sums.launch(begin, cosines)
        finish(sums.row_parts, 0, sums.row_pieces, begin, image.rows, row_coefficients)
        if begin + count < rows:
            sums.merge_columns(first, counts, text.rows)
        else:
            finish(sums.column_parts, first, counts, 0, text.rows, column_coefficients)
    weights = 1 / image.rows, 1 / text.rows
    needs = need_image, need_text, need_scale
    return _gradients(packed, (row_coefficients, column_coefficients), weights, cosines, workspace_bytes, needs)


@operator
def relation_kl_statistics(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The first pass over a block, as torch.ops.lcr2s.relation_kl_statistics; logits are counted in base 2."""
    features = student_image, student_text, teacher_image, teacher_text
    packed = _pack(*features, student_scale, teacher_scale, workspace_bytes)
    image, text = packed.models[0][:2]
    of_rows = image.scalars.new_empty((2 * _FIELDS, image.rows))
    sums = _Sums(packed, workspace_bytes)
    for begin in sums.begins:
        count, first, counts = sums.launch(begin, None)
        inside = min(count, image.rows - begin)
        for model, (parts, pieces) in enumerate(zip(sums.row_parts, sums.row_pieces, strict=True)):
            merge_columns(LOG_SUM.value, parts, 0, pieces, inside)
            of_rows[_FIELDS * model : _FIELDS * (model + 1), begin : begin + inside] = parts[0, :, :inside]
        sums.merge_columns(first, counts, text.rows)
    return of_rows, torch.cat([parts[0, :, : text.rows] for parts in sums.column_parts])


@operator
def relation_kl_gradients(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_weight: float,
    column_weight: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second pass over a block, as torch.ops.lcr2s.relation_kl_gradients; shifts are counted in base 2."""
    features = student_image, student_text, teacher_image, teacher_text
    packed = _pack(*features, student_scale, teacher_scale, workspace_bytes)

    def coefficients(name: str, statistics: Tensor, side: PackedRows) -> Tensor:
        _checks.check_tensor(name, statistics, "(4, rows)", (torch.float32,))
        _checks.check_size(name, statistics, 0, 2 * _FIELDS, "statistics of a row")
        _checks.check_size(name, statistics, 1, side.rows, "rows of that side")
        _checks.check_like(name, statistics, "student_image", student_image, dtype=False)
        top, total, teacher_top, teacher_total = statistics.double()
        delta = LN2.value * (teacher_top - top) + (teacher_total.log() - total.log())
        rows = torch.stack([top, 1 / total, teacher_top, 1 / teacher_total, delta]).float()
        return torch.nn.functional.pad(rows, (0, side.data.shape[0] - side.rows))

    image, text = packed.models[0][:2]
    of_sides = (
        coefficients("row_statistics", row_statistics, image),
        coefficients("column_statistics", column_statistics, text),
    )
    needs = need_image, need_text, need_scale
    return _gradients(packed, of_sides, (row_weight, column_weight), None, workspace_bytes, needs)


def _gradients(
    packed: _Packed,
    coefficients: tuple[Tensor, Tensor],
    weights: tuple[float, float],
    cosines: Tensor | None,
    workspace_bytes: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients, from coefficients of rows and columns and the weights of their terms."""
    dtype, _, ((image, text, student_scale, shape), (soft_image, soft_text, teacher_scale, teacher_shape)) = packed
    rows, columns = image.data.shape[0], text.data.shape[0]
    store = needs[0] or needs[1]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return image.scalars.new_empty(size, dtype=dtype)

    products = SlabProducts(image, text, needs[0], needs[1])
    blocks = _tiles.blocks(image, text, dtype.itemsize, workspace_bytes)
    if cosines is not None:
        slab_tensor = cosines[0]
    else:
        slab_tensor = empty(*(blocks[0].rows, blocks[0].columns) if store else (0, columns), dtype=dtype)
    # |dL/dx| is at most 1 / B + 1 / N.
    largest = sum(weights)
    slab_scale = 2.0 ** (14 - math.floor(math.log2(largest))) if dtype == torch.float16 else 1.0
    tile = shape if dtype == torch.float32 else teacher_shape
    if tile.columns == TILE:
        # Two products at a time.
        tile = tile._replace(columns=TILE // 2)
    totals = empty(3, dtype=torch.float64).zero_()
    for block in blocks:
        row_tiles, column_tiles = block.rows // tile.rows, block.columns // tile.columns
        sums = empty(3, row_tiles * column_tiles)
        wrap_triton(relation_kl_kernel)[(row_tiles * column_tiles,)](
            _tiles.operand(image.data, tile.rows, shape.depth, shape.loads),
            image.scalars,
            _tiles.operand(text.data, tile.columns, shape.depth, shape.loads),
            text.scalars,
            image.data.shape[1],
            _tiles.operand(soft_image.data, tile.rows, teacher_shape.depth, teacher_shape.loads),
            soft_image.scalars,
            _tiles.operand(soft_text.data, tile.columns, teacher_shape.depth, teacher_shape.loads),
            soft_text.scalars,
            soft_image.data.shape[1],
            *coefficients,
            student_scale,
            teacher_scale,
            slab_tensor,
            slab_tensor.shape[1],
            slab_scale,
            slab_tensor if cosines is None else cosines[1],
            sums,
            block.row // tile.rows,
            row_tiles,
            block.column // tile.columns,
            column_tiles,
            image.rows,
            text.rows,
            rows,
            columns,
            *weights,
            KEPT=cosines is not None,
            STORE=store,
            UNIT=2.0 ** _tiles.packed_exponent(dtype),
            TEACHER_DEPTH=teacher_shape.depth,
            TEACHER_LOADS=teacher_shape.loads,
            TEACHER_PRECISION=teacher_shape.precision,
            **{**tile.constants(), "DEPTH": shape.depth, "LOADS": shape.loads, "PRECISION": shape.precision},
        )
        totals.add_(sums.sum(1, dtype=torch.float64))
        if store:
            products.add(slab_tensor, block)
    if products.image is not None:
        _tiles.project(products.image, image, student_scale, slab_scale)
    if products.text is not None:
        _tiles.project(products.text, text, student_scale, slab_scale)
    return (
        (totals[0] * weights[0] + totals[1] * weights[1]).to(torch.float32),
        empty(0) if products.image is None else products.image,
        empty(0) if products.text is None else products.text,
        totals[2].to(torch.float32) if needs[2] else empty(0),
    )
