"""The Frobenius relation loss in Triton: normalisation and its derivative are kernels, the products the vendor's.

R_student - R_teacher = U R' with rows U = [V - E, E], R = [T, T - F] where the widths agree, so that terms that cancel
never appear, and U = [V, E], R = [T, -F] where they differ; V, T are the student's unit rows, E, F the teacher's. Then
    |U R'|^2 = <U'U, R'R>,  dV = 2 U (R'R)[:, T],  dT = 2 R (U'V),
which costs O((B + N) d^2); where that is dearer, U R' itself is formed, a slab of rows at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcr2s_ext import _checks
from lcr2s_ext.triton import INTERPRETED
from lcr2s_ext.triton._launch import operator, wrap_triton
from lcr2s_ext.triton._tiles import product

_ROWS = 32 if INTERPRETED else 4
_WIDTH = 256
_SUMMED = 4096
"""Products that one program of `product_sums_kernel` adds up."""


@triton.jit
def norms(features, stride, row, valid, width, WIDTH: tl.constexpr):
    """Norms of rows in float64, where no square of a float32 leaves the range; NaN where a row is not finite."""
    lane = tl.arange(0, WIDTH)[None, :]
    source = features + row[:, None] * stride
    squares = tl.zeros([row.shape[0], WIDTH], tl.float64)
    for at in range(0, width, WIDTH):
        x = tl.load(source + at + lane, mask=valid[:, None] & (at + lane < width), other=0.0)
        x = x.to(tl.float32).to(tl.float64)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, 1))
    return tl.where(norm < float("inf"), norm, float("nan"))


@triton.jit
def relation_rows_kernel(
    student,
    student_stride,
    student_width,
    teacher,
    teacher_stride,
    teacher_width,
    rows,
    out,
    unit,
    inverse,
    IMAGE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows of U (IMAGE) or R, the student's unit rows, and 1 / |student row|: 0 for a zero row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    student_norm = norms(student, student_stride, row, valid, student_width, WIDTH)
    teacher_norm = norms(teacher, teacher_stride, row, valid, teacher_width, WIDTH)
    student_divisor = tl.where(student_norm == 0, 1.0, student_norm)
    teacher_divisor = tl.where(teacher_norm == 0, 1.0, teacher_norm)
    of_student = tl.where(student_norm == 0, 0.0, 1.0 / student_divisor)
    of_teacher = tl.where(teacher_norm == 0, 0.0, 1.0 / teacher_divisor)
    tl.store(inverse + row, of_student, mask=valid)
    # The difference as (x - y |x| / |y|) / |x|: exactly 0 for equal rows, also where multiplication and subtraction are
    # fused. Rows of zeros count as of norm 1.
    ratio = (student_divisor / teacher_divisor)[:, None]
    of_difference = (1.0 / student_divisor)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    first = out + row[:, None] * (student_width + teacher_width)
    for at in range(0, student_width, WIDTH):
        mask = valid[:, None] & (at + lane < student_width)
        x = tl.load(student + row[:, None] * student_stride + at + lane, mask=mask, other=0.0).to(tl.float32)
        x = x.to(tl.float64)
        own = (x * of_student[:, None]).to(tl.float32)
        if DIFFERENCE:
            y = tl.load(teacher + row[:, None] * teacher_stride + at + lane, mask=mask, other=0.0).to(tl.float32)
            y = y.to(tl.float64)
            difference = ((x - y * ratio) * of_difference).to(tl.float32)
            if IMAGE:
                tl.store(first + at + lane, difference, mask=mask)
                other = (y * of_teacher[:, None]).to(tl.float32)
                tl.store(first + student_width + at + lane, other, mask=mask)
            else:
                tl.store(first + at + lane, own, mask=mask)
                tl.store(first + student_width + at + lane, difference, mask=mask)
        else:
            tl.store(first + at + lane, own, mask=mask)
        if HAS_UNIT:
            tl.store(unit + row[:, None] * student_width + at + lane, own, mask=mask)
    if not DIFFERENCE:
        for at in range(0, teacher_width, WIDTH):
            mask = valid[:, None] & (at + lane < teacher_width)
            y = tl.load(teacher + row[:, None] * teacher_stride + at + lane, mask=mask, other=0.0).to(tl.float32)
            other = (y.to(tl.float64) * of_teacher[:, None]).to(tl.float32)
            tl.store(first + student_width + at + lane, other if IMAGE else -other, mask=mask)


@triton.jit
def product_sums_kernel(a, b, size, sums, SUMMED: tl.constexpr, BLOCK: tl.constexpr):
    """Sums in float64 of SUMMED consecutive elements of a times those of b."""
    begin = tl.program_id(0).to(tl.int64) * SUMMED
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, SUMMED, BLOCK):
        place = begin + at + tl.arange(0, BLOCK)
        x = tl.load(a + place, mask=place < size, other=0.0).to(tl.float64)
        y = tl.load(b + place, mask=place < size, other=0.0).to(tl.float64)
        total += x * y
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def relation_frobenius_loss_kernel(sums, count, divisor, loss, BLOCK: tl.constexpr):
    """The sum of all sums, in one order, divided."""
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        place = at + tl.arange(0, BLOCK)
        total += tl.load(sums + place, mask=place < count, other=0.0)
    tl.store(loss, (tl.sum(total, 0) / divisor).to(tl.float32))


@triton.jit
def relation_project_kernel(
    gradient,
    features,
    stride,
    inverse,
    rows,
    width,
    divisor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """2 / divisor * (g - (g . u) u) / |row| for unit rows u, in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    lane = tl.arange(0, WIDTH)[None, :]
    scale = tl.load(inverse + row, mask=valid, other=0.0)[:, None]
    target = gradient + row[:, None] * width
    source = features + row[:, None] * stride
    products = tl.zeros([ROWS, WIDTH], tl.float64)
    for at in range(0, width, WIDTH):
        mask = valid[:, None] & (at + lane < width)
        u = tl.load(source + at + lane, mask=mask, other=0.0).to(tl.float32).to(tl.float64) * scale
        products += tl.load(target + at + lane, mask=mask, other=0.0).to(tl.float64) * u
    along = tl.sum(products, 1)[:, None]
    factor = 2.0 * scale / divisor
    for at in range(0, width, WIDTH):
        mask = valid[:, None] & (at + lane < width)
        u = tl.load(source + at + lane, mask=mask, other=0.0).to(tl.float32).to(tl.float64) * scale
        g = tl.load(target + at + lane, mask=mask, other=0.0).to(tl.float64)
        tl.store(target + at + lane, (factor * (g - along * u)).to(tl.float32), mask=mask)


class _Side:
    """One modality: features of student and teacher, and their rows of U or R."""

    def __init__(self, student: Tensor, teacher: Tensor, image: bool, need_unit: bool) -> None:
        self.student = student if student.stride(1) == 1 else student.contiguous()
        teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
        self.count, self.width = student.shape
        self.difference = student.shape[1] == teacher.shape[1]
        self.rows = student.new_empty((self.count, self.width + teacher.shape[1]), dtype=torch.float32)
        self.unit = student.new_empty(student.shape if need_unit else (0,), dtype=torch.float32)
        self.inverse = student.new_empty(self.count, dtype=torch.float64)
        wrap_triton(relation_rows_kernel)[(triton.cdiv(self.count, _ROWS),)](
            self.student,
            self.student.stride(0),
            self.width,
            teacher,
            teacher.stride(0),
            teacher.shape[1],
            self.count,
            self.rows,
            self.unit,
            self.inverse,
            IMAGE=image,
            DIFFERENCE=self.difference,
            HAS_UNIT=need_unit,
            ROWS=_ROWS,
            WIDTH=_WIDTH,
        )

    def project(self, gradient: Tensor, divisor: int) -> Tensor:
        """The features' gradient from that of the unit rows, in place, times 2 / divisor."""
        wrap_triton(relation_project_kernel)[(triton.cdiv(self.count, _ROWS),)](
            gradient,
            self.student,
            self.student.stride(0),
            self.inverse,
            self.count,
            self.width,
            divisor,
            ROWS=_ROWS,
            WIDTH=_WIDTH,
        )
        return gradient


def _product_sums(a: Tensor, b: Tensor, sums: Tensor) -> int:
    """Fill the front of `sums`; how many there are."""
    count = triton.cdiv(a.numel(), _SUMMED)
    wrap_triton(product_sums_kernel)[(count,)](a, b, a.numel(), sums, SUMMED=_SUMMED, BLOCK=1024)
    return count


def _loss(sums: Tensor, divisor: int) -> Tensor:
    loss = sums.new_empty((), dtype=torch.float32)
    wrap_triton(relation_frobenius_loss_kernel)[(1,)](sums, sums.numel(), divisor, loss, BLOCK=1024)
    return loss


def _gram(
    image: _Side, text: _Side, divisor: int, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    image_gram, text_gram = (product(side.rows.T, side.rows) for side in (image, text))
    sums = image_gram.new_empty(triton.cdiv(image_gram.numel(), _SUMMED), dtype=torch.float64)
    _product_sums(image_gram, text_gram, sums)
    width = image.width
    grad_image = grad_text = None
    if need_image:
        grad_image = image.project(product(image.rows, text_gram[:, :width]), divisor)
    if need_text:
        of_unit = image_gram[:, :width] + image_gram[:, width:] if image.difference else image_gram[:, :width]
        grad_text = text.project(product(text.rows, of_unit), divisor)
    return _loss(sums, divisor), grad_image, grad_text


def _direct(
    image: _Side, text: _Side, divisor: int, workspace_bytes: int, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    slab = max(workspace_bytes // (4 * text.count), 1)
    sums: list[Tensor] = []
    image_parts: list[Tensor] = []
    grad_text = None
    begin = 0
    while begin < image.count:
        rows = slice(begin, min(begin + slab, image.count))
        begin = rows.stop
        difference = product(image.rows[rows], text.rows.T)
        sums.append(difference.new_empty(triton.cdiv(difference.numel(), _SUMMED), dtype=torch.float64))
        _product_sums(difference, difference, sums[-1])
        if need_image:
            image_parts.append(product(difference, text.rows[:, : text.width]))
        if need_text:
            part = product(difference.T, image.unit[rows])
            grad_text = part if grad_text is None else grad_text.add_(part)
    grad_image = None
    if need_image:
        grad_image = image.project(image_parts[0] if len(image_parts) == 1 else torch.cat(image_parts), divisor)
    if grad_text is not None:
        grad_text = text.project(grad_text, divisor)
    return _loss(torch.cat(sums), divisor), grad_image, grad_text


def _gram_is_cheaper(
    rows: int, columns: int, student_width: int, teacher_width: int, need_image: bool, need_text: bool
) -> bool:
    """By multiplications."""
    width = student_width + teacher_width
    # In PyTorch 2.11 a symbolic size cannot be multiplied by a bool.
    wanted = rows * int(need_image) + columns * int(need_text)
    gram = (rows + columns) * width * width + wanted * width * student_width
    return gram < rows * columns * (width + student_width * (need_image + need_text))


def _check(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    reduction: int,
    workspace_bytes: int,
) -> None:
    features = {
        "student_image": student_image,
        "student_text": student_text,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
    }
    for name, value in features.items():
        _checks.check_tensor(name, value, "(B, d)", (torch.float32, torch.bfloat16, torch.float16))
        _checks.check_nonempty(name, value)
        _checks.check_like(name, value, "student_image", student_image, dtype=False)
    _checks.check_size("student_text", student_text, 1, student_image.shape[1], "width of `student_image`")
    _checks.check_size("teacher_text", teacher_text, 1, teacher_image.shape[1], "width of `teacher_image`")
    _checks.check_size("teacher_image", teacher_image, 0, student_image.shape[0], "rows of `student_image`")
    _checks.check_size("teacher_text", teacher_text, 0, student_text.shape[0], "rows of `student_text`")
    if not 0 <= reduction <= 2:
        raise ValueError(f"`reduction` must be 0 (sum), 1 (row) or 2 (mean), got {reduction}")
    if workspace_bytes < 0:
        raise ValueError(f"`workspace_bytes` must not be negative, got {workspace_bytes}")


@operator
def relation_frobenius(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    reduction: int,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of the student's features, float32; a gradient that is not needed has no elements."""
    _check(student_image, student_text, teacher_image, teacher_text, reduction, workspace_bytes)
    rows, columns = student_image.shape[0], student_text.shape[0]
    gram = _gram_is_cheaper(rows, columns, student_image.shape[1], teacher_image.shape[1], need_image, need_text)
    image = _Side(student_image, teacher_image, True, need_text and not gram)
    text = _Side(student_text, teacher_text, False, False)
    divisor = (1, rows, rows * columns)[reduction]
    if gram:
        loss, *gradients = _gram(image, text, divisor, need_image, need_text)
    else:
        loss, *gradients = _direct(image, text, divisor, workspace_bytes, need_image, need_text)
    grad_image, grad_text = (loss.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, grad_image, grad_text
