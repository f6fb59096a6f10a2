"""Relation distillation losses in plain PyTorch; every function forms the B x N cosine matrices."""

import torch
from torch import Tensor

from lcr2s_ext.reference.similarity import _cosine


def _relations(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines of the student and of the teacher in the widest dtype of the four; no gradient to the teacher."""
    features = (student_image, student_text, teacher_image, teacher_text)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in features) else torch.float32
    image, text, soft_image, soft_text = (tensor.to(dtype) for tensor in features)
    return _cosine(image, text)[0], _cosine(soft_image, soft_text)[0].detach()


def relation_frobenius_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor, reduction: str
) -> Tensor:
    """See :func:`lcr2s_ext.ops.relation_frobenius_loss`."""
    with torch.autocast(student_image.device.type, enabled=False):
        student, teacher = _relations(student_image, student_text, teacher_image, teacher_text)
        difference = student - teacher
        total = difference.square().sum()
        rows, columns = difference.shape
        return total / {"sum": 1, "row": rows, "mean": rows * columns}[reduction]


def _divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(teacher) || softmax(student))."""
    log_teacher = torch.log_softmax(teacher_logits, 1)
    log_student = torch.log_softmax(student_logits, 1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()


def relation_kl_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
) -> Tensor:
    """See :func:`lcr2s_ext.ops.relation_kl_loss`."""
    with torch.autocast(student_image.device.type, enabled=False):
        student, teacher = _relations(student_image, student_text, teacher_image, teacher_text)
        student, teacher = student_scale * student, teacher_scale * teacher
        return _divergence(student, teacher) + _divergence(student.T, teacher.T)


# The same loss of matrices that are cut into blocks, in two passes over them: sums of exponentials of every row and
# column, which merge; then the loss and gradients.


def _sums(logits: Tensor) -> list[Tensor]:
    top = logits.amax(1)
    return [top, (logits - top[:, None]).exp().sum(1)]


def relation_kl_statistics(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Statistics (4, B) of the rows and (4, N) of the columns of a block, for :func:`merge_kl_statistics`: a shift and
    the sum of e^(logit - shift), of the student's logits and of the teacher's."""
    with torch.autocast(student_image.device.type, enabled=False), torch.no_grad():
        x, z = _relations(student_image, student_text, teacher_image, teacher_text)
        x, z = student_scale * x, teacher_scale * z
        return torch.stack([*_sums(x), *_sums(z)]), torch.stack([*_sums(x.T), *_sums(z.T)])


def merge_kl_statistics(first: Tensor, second: Tensor, unit: float = 1.0) -> Tensor:
    """Statistics (rows, 4) of two blocks as those of both; their logits are counted in `unit`."""
    merged = []
    for model in (slice(0, 2), slice(2, 4)):
        (shift, total), (other_shift, other_total) = first[:, model].unbind(1), second[:, model].unbind(1)
        top = torch.maximum(shift, other_shift)
        merged += [top, total * (unit * (shift - top)).exp() + other_total * (unit * (other_shift - top)).exp()]
    return torch.stack(merged, 1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a block contributes to the loss () and to its gradients with respect to the student's images (B, d), texts
    (N, d) and scale ().

    Args:
        student_image, student_text, teacher_image, teacher_text, student_scale, teacher_scale: of the block.
        row_statistics, column_statistics: (4, B) and (4, N) of whole rows and columns.
        row_weight, column_weight: 1 / rows and 1 / columns of the whole matrix.
    """
    with torch.autocast(student_image.device.type, enabled=False), torch.enable_grad():
        dtype = row_statistics.dtype
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (student_image, student_text, student_scale)]
        cosine, z = _relations(leaves[0], leaves[1], teacher_image.to(dtype), teacher_text.to(dtype))
        logits = leaves[2] * cosine
        x, z = logits.detach(), teacher_scale * z
        loss = torch.zeros((), dtype=dtype, device=x.device)
        slope = torch.zeros_like(x)
        for statistics, weight in (
            (row_statistics[:, :, None], row_weight),
            (column_statistics[:, None, :], column_weight),
        ):
            log_student = x - (statistics[0] + statistics[1].log())
            log_teacher = z - (statistics[2] + statistics[3].log())
            difference = log_student.exp() - log_teacher.exp()
            # Summed over whole rows the difference is 0; with it every term is above 0.
            loss = loss + weight * (log_teacher.exp() * (log_teacher - log_student) + difference).sum()
            slope = slope + weight * difference
        found = torch.autograd.grad([logits], leaves, [slope])
        return loss, found[0], found[1], found[2]
