"""What every kernel over a cosine matrix needs: packed rows, tiles of dot products, gradients of unit rows.

Features are copied once into *packed rows*: each row times a power of two that brings its norm into [1, 2), or
[2^14, 2^15) for float16. That is exact, unlike a division by the norm, so a cosine is the dot product of two packed
rows times their two reciprocal norms, and tensor cores see the features' own digits. Packed rows are padded with zeros
to whole tiles, so loads need no mask.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lcr2s_ext.triton import INTERPRETED, _launch, requested_loads
from lcr2s_ext.triton._launch import input_precision, wrap_triton

TILE = 128
"""Rows and columns of a tile of cosines, at most; packed rows are padded to a multiple of it."""

_WIDTH = 64
# Rows a program; the interpreter's time goes by programs, not by elements.
_PACK_ROWS = 64 if INTERPRETED else 4
_PACK_WIDTH = 256
_GROUP = tl.constexpr(8)
_INTERPRETED = tl.constexpr(INTERPRETED)

POINTERS = tl.constexpr(0)
DESCRIPTORS = tl.constexpr(1)
SPECIALIZED = tl.constexpr(2)  # by descriptors, and by warps that do nothing else


class PackedRows(NamedTuple):
    """Packed rows of one (rows, width) tensor of features."""

    data: Tensor
    """(padded rows, padded width), float32, bfloat16 or float16."""
    scalars: Tensor
    """(3, padded rows) float32: reciprocal norm of the packed row, the power of two, norm of the original row. The
    first two are 0 for a zero row, and NaN where the row has a NaN or an infinity."""
    rows: int
    width: int


class TileShape(NamedTuple):
    """Compile-time parameters of a kernel over tiles of dot products."""

    rows: int
    columns: int
    pieces: int
    depth: int
    loads: int
    precision: str
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int | str]:
        """As keyword arguments of a launch."""
        return {
            "TILE_ROWS": self.rows,
            "TILE_COLUMNS": self.columns,
            "PIECES": self.pieces,
            "DEPTH": self.depth,
            "LOADS": self.loads,
            "PRECISION": self.precision,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


def packed_exponent(dtype: torch.dtype) -> int:
    """Packed rows of `dtype` have norms in [2^e, 2^(e+1)): in float16 large ones, so that small elements stay exact."""
    return 14 if dtype == torch.float16 else 0


def pack_rows(features: Tensor, dtype: torch.dtype) -> PackedRows:
    """Pack (rows, width) features as `dtype`, which holds theirs exactly."""
    rows, width = features.shape
    if features.stride(1) != 1:
        features = features.contiguous()
    padded_rows, padded_width = round_up(rows, TILE), round_up(width, _WIDTH)
    data = features.new_empty((padded_rows, padded_width), dtype=dtype)
    scalars = features.new_empty((3, padded_rows), dtype=torch.float32)
    wrap_triton(pack_rows_kernel)[(padded_rows // _PACK_ROWS,)](
        features,
        features.stride(0),
        rows,
        width,
        data,
        scalars,
        padded_rows,
        padded_width,
        EXPONENT=packed_exponent(dtype),
        ROWS=_PACK_ROWS,
        WIDTH=_PACK_WIDTH,
        num_warps=4,
    )
    return PackedRows(data, scalars, rows, width)


@triton.jit(do_not_specialize=["rows"])
def pack_rows_kernel(
    features,
    stride,
    rows,
    width,
    data,
    scalars,
    padded_rows,
    padded_width,
    EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Packed rows and their scalars, ROWS rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = features + row[:, None].to(tl.int64) * stride
    target = data + row[:, None].to(tl.int64) * padded_width
    lane = tl.arange(0, WIDTH)[None, :]
    # In float64 no square of a float32 overflows or underflows.
    squares = tl.zeros([ROWS, WIDTH], tl.float64)
    for at in range(0, width, WIDTH):
        x = tl.load(source + at + lane, mask=(row < rows)[:, None] & (at + lane < width), other=0.0)
        x = x.to(tl.float32).to(tl.float64)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, 1))
    exponent = ((norm.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    power = tl.minimum(tl.maximum(EXPONENT - exponent, -126), 126).to(tl.int32)
    step = ((power + 127) << 23).to(tl.float32, bitcast=True)
    reciprocal = (1.0 / tl.where(norm > 0, norm * step.to(tl.float64), 1.0)).to(tl.float32)
    # Not a number, rather than 0, where the norm is infinite.
    defined = tl.where(norm < float("inf"), tl.where(norm > 0, 1.0, 0.0), float("nan")).to(tl.float32)
    step *= defined
    tl.store(scalars + row, reciprocal * defined)
    tl.store(scalars + padded_rows + row, step)
    tl.store(scalars + 2 * padded_rows + row, norm.to(tl.float32))
    for at in range(0, padded_width, WIDTH):
        x = tl.load(source + at + lane, mask=(row < rows)[:, None] & (at + lane < width), other=0.0)
        packed = (x.to(tl.float32) * step[:, None]).to(data.dtype.element_ty)
        tl.store(target + at + lane, packed, mask=at + lane < padded_width)


@triton.jit
def tile_position(index, row_tiles, column_tiles):
    """(row tile, column tile) of the index-th tile: down _GROUP tiles of a column, then the next column, so that tiles
    in flight together share their rows and columns in L2."""
    strip = index // (_GROUP * column_tiles)
    first = strip * _GROUP
    height = tl.minimum(row_tiles - first, _GROUP)
    within = index - first * column_tiles
    return first + within % height, within // height


@triton.jit
def multiply_add(x, y, total, PRECISION: tl.constexpr):
    """x @ y + total."""
    if _INTERPRETED:
        # The interpreter's dot takes bfloat16 for integers; a product of halves is exact in float32 anyway.
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def tile_product(
    a,
    a_row,
    b,
    b_row,
    width,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products (TILE_ROWS, TILE_COLUMNS) of packed rows: of `a` from a_row on with `b` from b_row on, both as
    :func:`operand` made them."""
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    if LOADS == POINTERS:
        depth = tl.arange(0, DEPTH)
        a += a_row.to(tl.int64) * width
        b += b_row.to(tl.int64) * width
        a += tl.arange(0, TILE_ROWS)[:, None] * width + depth[None, :]
        b += tl.arange(0, TILE_COLUMNS)[None, :] * width + depth[:, None]
        for _ in range(0, width, DEPTH):
            total = multiply_add(tl.load(a), tl.load(b), total, PRECISION)
            a += DEPTH
            b += DEPTH
    else:
        for at in range(0, width, DEPTH):
            total = multiply_add(a.load([a_row, at]), tl.trans(b.load([b_row, at])), total, PRECISION)
    return total


@triton.jit
def rounded_product(a, b):
    """a * b as one rounded value, not contracted with the sum it goes into: where it is formed twice, in two kernels or
    for two equal operands, it is the same."""
    if _INTERPRETED:
        return a * b
    else:  # noqa: RET505 - the other branch does not exist only for an else
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """A (ROWS, COLUMNS) tile as one piece or as four pieces of columns, in order. What follows a product holds several
    values a column; taking a piece at a time keeps them in registers."""
    if PIECES == 1:
        return (tile,)
    else:  # noqa: RET505 - the other branch does not exist only for an else
        left, right = tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        first, second = tl.split(tl.permute(tl.reshape(left, [ROWS, 2, COLUMNS // 4]), [0, 2, 1]))
        third, fourth = tl.split(tl.permute(tl.reshape(right, [ROWS, 2, COLUMNS // 4]), [0, 2, 1]))
        return first, second, third, fourth


def loads(dtype: torch.dtype, device: torch.device) -> int:
    """How a matrix kernel loads tiles of `dtype` that are asked for by descriptor, where `device` and Triton can.

    Exact float32 products take no tensor cores; fed by descriptors, their kernels spill.
    """
    exact = dtype == torch.float32 and input_precision(dtype) == "ieee"
    if requested_loads() == "pointers" or exact or _launch.capability(device) < 90:
        return POINTERS.value
    return POINTERS.value if _launch.is_traced(pack_rows_kernel) else DESCRIPTORS.value


def tile_shape(dtype: torch.dtype, device: torch.device) -> TileShape:
    """Tiles for one product of packed rows of `dtype` in flight."""
    by = loads(dtype, device)
    if dtype == torch.float32:
        side = TILE if INTERPRETED else 64
        return TileShape(side, side, 1 if INTERPRETED else 4, 32, by, input_precision(dtype), num_warps=4, num_stages=3)
    # The interpreter takes one of the halves in pieces, to go both ways.
    pieces = 1 if INTERPRETED and dtype == torch.float16 else 4
    return TileShape(TILE, TILE, pieces, _WIDTH, by, "ieee", num_warps=8, num_stages=3)


def operand(rows: Tensor, tile_rows: int, depth: int, by: int) -> "Tensor | TensorDescriptor":
    """What a kernel that loads (tile_rows, depth) tiles of (n, width) rows takes: the rows, or their descriptor."""
    if by == POINTERS.value:
        return rows
    return TensorDescriptor.from_tensor(rows, [tile_rows, depth])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, accumulated in float32, by the vendor's library."""
    if a.dtype == torch.float32:
        # The out= form, because autocast would make a half product of the other.
        return torch.mm(a, b, out=a.new_empty((a.shape[0], b.shape[1])))
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())


class Block(NamedTuple):
    """A part of the cosine matrix in whole tiles, which may reach into the padding."""

    row: int
    rows: int
    column: int
    columns: int


def blocks(image: PackedRows, text: PackedRows, itemsize: int, workspace_bytes: int) -> list[Block]:
    """Parts that cover the cosine matrix, each of at most `workspace_bytes` (but at least one tile) of `itemsize`.

    Near squares, because what is read and written beside the products grows with a part's rows plus columns.
    """
    rows, columns = image.data.shape[0], text.data.shape[0]
    area = max(workspace_bytes // (itemsize * TILE * TILE), 1)
    height, width = rows // TILE, columns // TILE
    if height * width > area:
        side = max(math.isqrt(area), 1)
        width = min(width, max(side, area // height))
        height = min(height, max(area // width, 1))
    return [
        Block(i * TILE, min(height * TILE, rows - i * TILE), j * TILE, min(width * TILE, columns - j * TILE))
        for i in range(0, rows // TILE, height)
        for j in range(0, columns // TILE, width)
    ]


class SlabProducts:
    """slab @ text rows and slab.T @ image rows, summed over the blocks; a product that is not needed stays None."""

    def __init__(self, image: PackedRows, text: PackedRows, need_image: bool, need_text: bool) -> None:
        self._image, self._text = image, text
        self._need_image, self._need_text = need_image, need_text
        self.image: Tensor | None = None
        self.text: Tensor | None = None

    def add(self, slab: Tensor, block: Block) -> None:
        """Add what `block` gives; its slab is in the corner of `slab`, zero in the padding."""
        image, text = self._image, self._text
        rows, columns = min(block.rows, image.rows - block.row), min(block.columns, text.rows - block.column)
        slab = slab[: block.rows, : block.columns]
        if self._need_image:
            part = product(slab[:rows], text.data[block.column : block.column + block.columns, : text.width])
            self.image = _add(self.image, part, block.row, image.rows, block.column == 0)
        if self._need_text:
            part = product(slab[:, :columns].T, image.data[block.row : block.row + block.rows, : image.width])
            self.text = _add(self.text, part, block.column, text.rows, block.row == 0)


def _add(total: Tensor | None, part: Tensor, begin: int, rows: int, first: bool) -> Tensor:
    if total is None:
        if part.shape[0] == rows:
            return part
        total = part.new_empty((rows, part.shape[1]))
    target = total[begin : begin + part.shape[0]]
    if first:
        target.copy_(part)
    else:
        target.add_(part)
    return total


def project(
    gradient: Tensor,
    rows: PackedRows,
    scale: Tensor | None,
    slab_scale: Tensor | float = 1.0,
    norm_gradient: Tensor | None = None,
) -> None:
    """From the slab products of :class:`SlabProducts` to the gradient of the features, in place.

    Args:
        gradient: (rows, width) float32.
        rows: the features.
        scale: () float32 factor of the gradient, or None for 1.
        slab_scale: what the slabs were multiplied by; () float32 where the device chose it.
        norm_gradient: (rows,) float32, dL/d(norm of the row), or None for 0.
    """
    one, unit = rows.scalars, 4.0 ** -packed_exponent(rows.data.dtype)
    wrap_triton(project_kernel)[(triton.cdiv(rows.rows, _PACK_ROWS),)](
        gradient,
        rows.data,
        rows.scalars,
        one if scale is None else scale,
        slab_scale if isinstance(slab_scale, Tensor) else one,
        one if norm_gradient is None else norm_gradient,
        rows.rows,
        rows.width,
        rows.data.shape[0],
        rows.data.shape[1],
        unit / (1.0 if isinstance(slab_scale, Tensor) else slab_scale),
        HAS_SCALE=scale is not None,
        HAS_SLAB_SCALE=isinstance(slab_scale, Tensor),
        HAS_NORM=norm_gradient is not None,
        ROWS=_PACK_ROWS,
        WIDTH=_PACK_WIDTH,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    gradient,
    data,
    scalars,
    scale,
    slab_scale,
    norm_gradient,
    rows,
    width,
    padded_rows,
    padded_width,
    unscale,
    HAS_SCALE: tl.constexpr,
    HAS_SLAB_SCALE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(g - (g . u) u) / |row| for unit rows u, ROWS rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    source = gradient + row[:, None].to(tl.int64) * width
    packed = data + row[:, None].to(tl.int64) * padded_width
    along = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(0, width, WIDTH):
        mask = inside & (at + lane < width)
        g = tl.load(source + at + lane, mask=mask, other=0.0)
        along += g * tl.load(packed + at + lane, mask=mask, other=0.0).to(tl.float32)
    reciprocal = tl.load(scalars + row)
    by = unscale * tl.load(scalars + padded_rows + row)
    if HAS_SLAB_SCALE:
        by /= tl.load(slab_scale)
    if HAS_SCALE:
        by *= tl.load(scale)
    along_row = -by * tl.sum(along, 1) * reciprocal * reciprocal
    if HAS_NORM:
        along_row += tl.load(norm_gradient + row, mask=row < rows, other=0.0) * reciprocal
    for at in range(0, width, WIDTH):
        mask = inside & (at + lane < width)
        g = tl.load(source + at + lane, mask=mask, other=0.0)
        r = tl.load(packed + at + lane, mask=mask, other=0.0).to(tl.float32)
        tl.store(source + at + lane, by[:, None] * g + along_row[:, None] * r, mask=mask)
