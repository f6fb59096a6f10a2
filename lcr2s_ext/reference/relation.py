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
