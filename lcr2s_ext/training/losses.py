"""The losses of a stage: of its task, and of a student against its teacher."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext.nn import (
    FeatureDistillationLoss,
    IdentityLoss,
    RelationFrobeniusLoss,
    RelationKLLoss,
    make_alignment_loss,
)
from lcr2s_ext.training import distributed
from lcr2s_ext.training.config import DistillConfig, LossConfig

__all__ = ["DistillationLoss", "TaskLoss"]


class TaskLoss(nn.Module):
    """``align_weight * align(image, text, p) + identity_weight * id`` of one pair of feature batches; ``align`` may be
    a weighted sum, each of whose terms is reported.
    """

    def __init__(self, config: LossConfig, width: int, num_identities: int) -> None:
        super().__init__()
        self.align_terms = config.align_terms
        self.align = nn.ModuleDict(
            {
                name: make_alignment_loss(
                    name,
                    logit_scale=config.logit_scales.get(name, config.logit_scale),
                    learnable=config.learn_logit_scale and name in ("sdm", "info_nce"),
                    many_to_many=config.many_to_many,
                )
                for name in self.align_terms
            }
        )
        self.identity = (
            IdentityLoss(width, num_identities, label_smoothing=config.label_smoothing)
            if config.identity_weight
            else None
        )
        self.align_weight = config.align_weight
        self.identity_weight = config.identity_weight

    def forward(
        self, image: Tensor, text: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms of ``(B, d)`` features and ``(B,)`` labels; with a ``group`` of ranks that hold equal parts of
        the batch, the mean of their gradients is that of the batch's terms.
        """
        terms = {
            "align" if len(self.align_terms) == 1 else f"align_{name}": self.align_weight
            * weight
            * distributed.whole(self.align[name](image, text, labels, group=group), group)
            for name, weight in self.align_terms.items()
        }
        if self.identity is not None:
            terms["identity"] = self.identity_weight * self.identity(image, text, labels)
        return terms


class DistillationLoss(nn.Module):
    """``w_f L_feat + w_r L_rel`` (and the intra-modal relations, where weighted) of student against teacher
    features.
    """

    def __init__(self, config: DistillConfig, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.config = config
        self.features = (
            FeatureDistillationLoss(
                student_width,
                teacher_width,
                normalize=config.feature_normalize,
                reduction=config.feature_reduction,
            )
            if config.feature_weight
            else None
        )
        relation: nn.Module | None = None
        if config.relation == "frobenius":
            relation = RelationFrobeniusLoss(reduction=config.relation_reduction)
        elif config.relation == "kl":
            relation = RelationKLLoss(student_scale=config.student_scale, teacher_scale=config.teacher_scale)
        self.relation = relation

    def forward(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        ramp: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms; ``ramp`` in 0..1 multiplies them, ``group`` is as for :class:`TaskLoss`."""
        config, terms = self.config, {}
        if self.features is not None:
            # A mean over rows is one of equal parts; a sum is as many times theirs as there are.
            parts = distributed.ranks() if group is not None and config.feature_reduction == "sum" else 1
            terms["feature"] = ramp * parts * config.feature_weight * self.features(*student, *teacher)
        relation = self.relation
        if relation is not None and config.relation_weight:
            of_batch = distributed.whole(relation(*student, *teacher, group=group), group)
            terms["relation"] = ramp * config.relation_weight * of_batch
        if relation is not None and config.intra_weight:
            within = [
                distributed.whole(relation(s, s, t, t, group=group), group)
                for s, t in zip(student, teacher, strict=True)
            ]
            terms["intra"] = ramp * config.intra_weight * (within[0] + within[1])
        return terms
