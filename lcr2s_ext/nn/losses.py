"""Loss modules: thin, stateful wrappers around :mod:`lcr2s_ext.ops`.

Alignment losses share one call, ``loss(image, text, image_ids, text_ids=None, *, group=None)``, so that a training
script may exchange them. ``group`` makes a loss see the rows of all its ranks, see :func:`lcr2s_ext.ops.sdm_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lcr2s_ext import ops

__all__ = [
    "ALIGNMENT_LOSSES",
    "CMPMLoss",
    "FeatureDistillationLoss",
    "IdentityLoss",
    "InfoNCELoss",
    "RelationFrobeniusLoss",
    "RelationKLLoss",
    "SDMLoss",
    "TALLoss",
    "make_alignment_loss",
]


class _LogitScale(nn.Module):
    """``exp(log_scale)``, fixed (a Python float) or learnt (a float32 parameter, capped at ``maximum``)."""

    def __init__(self, initial: float, learnable: bool, maximum: float) -> None:
        super().__init__()
        if not initial > 0.0 or not math.isfinite(initial):
            raise ValueError(f"logit_scale: expected a positive finite number, got {initial}")
        if learnable and initial > maximum:
            raise ValueError(f"logit_scale: initial value {initial} exceeds max_logit_scale {maximum}")
        self.fixed = float(initial)
        self.maximum = float(maximum)
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial), dtype=torch.float32)) if learnable else None

    def extra_repr(self) -> str:
        return (
            f"{self.fixed:g}" if self.log_scale is None else f"learnable, initial={self.fixed:g}, max={self.maximum:g}"
        )

    def forward(self) -> Tensor | float:
        return self.fixed if self.log_scale is None else self.log_scale.exp().clamp(max=self.maximum)


class InfoNCELoss(nn.Module):
    """Symmetric contrastive cross entropy (CLIP): mean over rows of each direction, the two averaged.

    Args:
        logit_scale: ``1 / tau``; the starting value when learnt.
        learnable: learn ``log(logit_scale)``.
        max_logit_scale: cap of a learnt scale.
        many_to_many: spread the target over all columns of the same identity; ``False`` takes the diagonal alone.
        backend: passed to the operator.
    """

    def __init__(
        self,
        logit_scale: float = 50.0,
        *,
        learnable: bool = False,
        max_logit_scale: float = 100.0,
        many_to_many: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.logit_scale = _LogitScale(logit_scale, learnable, max_logit_scale)
        self.many_to_many = many_to_many
        self.backend = backend

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d)`` and ``(N, d)`` features, normalised inside; without ids B = N and the diagonal."""
        if not self.many_to_many:
            image_ids = text_ids = None
        return ops.info_nce_loss(
            image, text, image_ids, text_ids, logit_scale=self.logit_scale(), backend=self.backend, group=group
        )


class SDMLoss(nn.Module):
    """Similarity distribution matching (IRRA, Jiang and Ye, CVPR 2023): both directions summed.

    Args:
        logit_scale: ``1 / tau``; the starting value when learnt.
        learnable: learn ``log(logit_scale)``.
        max_logit_scale: cap of a learnt scale.
        eps: the constant inside ``log(Q + eps)``.
        backend: passed to the operator.
    """

    def __init__(
        self,
        logit_scale: float = 50.0,
        *,
        learnable: bool = False,
        max_logit_scale: float = 100.0,
        eps: float = 1e-8,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.logit_scale = _LogitScale(logit_scale, learnable, max_logit_scale)
        self.eps = eps
        self.backend = backend

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        text_ids: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d)`` and ``(N, d)`` features with identities ``(B,)``, ``(N,)``."""
        return ops.sdm_loss(
            image,
            text,
            image_ids,
            text_ids,
            logit_scale=self.logit_scale(),
            eps=self.eps,
            backend=self.backend,
            group=group,
        )


class CMPMLoss(nn.Module):
    """Cross-modal projection matching (Zhang and Lu, ECCV 2018).

    Args:
        target: ``"l2"``, the published ``y / |y|_2``, or ``"sum"``, a true distribution.
        eps: the constant inside the logarithm.
        backend: passed to the operator.
    """

    def __init__(self, *, target: str = "l2", eps: float = 1e-8, backend: str | None = None) -> None:
        super().__init__()
        if target not in ("l2", "sum"):
            raise ValueError(f"target: expected 'l2' or 'sum', got {target!r}")
        self.target = target
        self.eps = eps
        self.backend = backend

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        text_ids: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d)`` and ``(N, d)`` features with identities ``(B,)``, ``(N,)``."""
        return ops.cmpm_loss(
            image, text, image_ids, text_ids, target=self.target, eps=self.eps, backend=self.backend, group=group
        )


class TALLoss(nn.Module):
    """Triplet alignment loss (RDE, Qin et al., CVPR 2024), summed over rows and directions.

    Args:
        margin: ``m``.
        tau: temperature of the soft positives and negatives.
        backend: passed to the operator.
    """

    def __init__(self, *, margin: float = 0.1, tau: float = 0.015, backend: str | None = None) -> None:
        super().__init__()
        self.margin = margin
        self.tau = tau
        self.backend = backend

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        text_ids: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d)`` and ``(N, d)`` features with identities ``(B,)``, ``(N,)``."""
        return ops.tal_loss(
            image, text, image_ids, text_ids, margin=self.margin, tau=self.tau, backend=self.backend, group=group
        )


ALIGNMENT_LOSSES: tuple[str, ...] = ("sdm", "info_nce", "cmpm", "tal")


def make_alignment_loss(
    name: str, *, logit_scale: float = 50.0, learnable: bool = False, many_to_many: bool = True
) -> nn.Module:
    """Alignment loss by its name in ``ALIGNMENT_LOSSES``; the ``tau`` of TAL is ``1 / logit_scale``."""
    builders: dict[str, Callable[[], nn.Module]] = {
        "sdm": lambda: SDMLoss(logit_scale, learnable=learnable),
        "info_nce": lambda: InfoNCELoss(logit_scale, learnable=learnable, many_to_many=many_to_many),
        "cmpm": lambda: CMPMLoss(),
        "tal": lambda: TALLoss(tau=1.0 / logit_scale),
    }
    if name not in builders:
        raise ValueError(f"align: expected one of {', '.join(ALIGNMENT_LOSSES)}, got {name!r}")
    if learnable and name not in ("sdm", "info_nce"):
        raise ValueError(f"learn_logit_scale: {name} has no logit scale to learn")
    return builders[name]()


class RelationFrobeniusLoss(nn.Module):
    """``|R_s - R_t|_F^2`` of the image-text cosine matrices; no gradient to the teacher; widths may differ.

    Args:
        reduction: ``"mean"`` over the ``B * N`` entries, ``"row"`` (divided by ``B``) or ``"sum"``.
        backend: passed to the operator.
    """

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__()
        if reduction not in ("mean", "row", "sum"):
            raise ValueError(f"reduction: expected 'mean', 'row' or 'sum', got {reduction!r}")
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d_s)``, ``(N, d_s)`` student and ``(B, d_t)``, ``(N, d_t)`` teacher features."""
        return ops.relation_frobenius_loss(
            student_image,
            student_text,
            teacher_image,
            teacher_text,
            reduction=self.reduction,
            backend=self.backend,
            group=group,
        )


class RelationKLLoss(nn.Module):
    """``KL(teacher || student)`` of softmax relations, both directions: CLIP-KD's relational distillation.

    Args:
        student_scale: ``1 / tau_s``.
        teacher_scale: ``1 / tau_t``.
        backend: passed to the operator.
    """

    def __init__(self, *, student_scale: float = 50.0, teacher_scale: float = 50.0, backend: str | None = None) -> None:
        super().__init__()
        for name, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
            if not scale > 0.0 or not math.isfinite(scale):
                raise ValueError(f"{name}: expected a positive finite number, got {scale}")
        self.student_scale = float(student_scale)
        self.teacher_scale = float(teacher_scale)
        self.backend = backend

    def forward(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d_s)``, ``(N, d_s)`` student and ``(B, d_t)``, ``(N, d_t)`` teacher features."""
        return ops.relation_kl_loss(
            student_image,
            student_text,
            teacher_image,
            teacher_text,
            student_scale=self.student_scale,
            teacher_scale=self.teacher_scale,
            backend=self.backend,
            group=group,
        )


class FeatureDistillationLoss(nn.Module):
    """Intra-modal feature distillation: squared distance of student to teacher features, both modalities added.

    LCR²S: ``L_feat = (1/B) sum_i (|v_i - e^v_i|^2 + |t_i - e^t_i|^2)``. The normalisation before it, the linear
    map and the reductions other than ``"row"`` are open in the paper and options here. No gradient reaches the teacher.

    Args:
        student_width: ``d_s``.
        teacher_width: ``d_t``.
        normalize: L2-normalise both sides first, so that norms need not agree.
        reduction: ``"row"`` sums over the width and averages over rows (the formula above), ``"sum"`` sums over
            everything, ``"mean"`` averages over rows and width.
        projection: map student features to the teacher's width by a trained linear map, one per modality; ``None``
            does so exactly where the widths differ.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        normalize: bool = True,
        reduction: str = "row",
        projection: bool | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("row", "sum", "mean"):
            raise ValueError(f"reduction: expected 'row', 'sum' or 'mean', got {reduction!r}")
        if projection is False and student_width != teacher_width:
            raise ValueError(
                f"projection: student width {student_width} and teacher width {teacher_width} differ, a map is needed"
            )
        needed = student_width != teacher_width if projection is None else projection
        self.normalize = normalize
        self.reduction = reduction
        self.image_map = nn.Linear(student_width, teacher_width) if needed else nn.Identity()
        self.text_map = nn.Linear(student_width, teacher_width) if needed else nn.Identity()

    def forward(
        self,
        student_image: Tensor,
        student_text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        *,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Scalar loss of ``(B, d_s)`` student and ``(B, d_t)`` teacher features of the same rows."""
        return self._one(self.image_map(student_image), teacher_image.detach(), "teacher_image") + self._one(
            self.text_map(student_text), teacher_text.detach(), "teacher_text"
        )

    def _one(self, student: Tensor, teacher: Tensor, name: str) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(f"{name}: expected shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
        if self.normalize:
            student = nn.functional.normalize(student.float(), dim=1)
            teacher = nn.functional.normalize(teacher.float(), dim=1)
        distance = (student - teacher.to(student.dtype)).square()
        if self.reduction == "sum":
            return distance.sum()
        return distance.sum(1).mean() if self.reduction == "row" else distance.mean()


class IdentityLoss(nn.Module):
    """Cross entropy of one linear identity classifier shared by both modalities, ``(CE(image) + CE(text)) / 2``.

    Args:
        width: feature width ``d``.
        num_identities: number of training identities; labels are ``0 .. num_identities - 1``.
        label_smoothing: mass spread evenly over the classes.
    """

    def __init__(self, width: int, num_identities: int, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if num_identities < 1:
            raise ValueError(f"num_identities: expected a positive int, got {num_identities}")
        self.classifier = nn.Linear(width, num_identities)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.label_smoothing = label_smoothing

    def forward(self, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss of ``(B, d)`` features of each modality and their ``(B,)`` labels."""
        if image.shape != text.shape:
            raise ValueError(f"text: expected shape {tuple(image.shape)}, got {tuple(text.shape)}")
        # Both modalities hold B rows, so the mean over the 2 B stacked rows is the mean of the two means.
        logits = self.classifier(torch.cat([image, text]))
        return nn.functional.cross_entropy(
            logits.float(), torch.cat([labels, labels]), label_smoothing=self.label_smoothing
        )
