"""The stages of training: a plain or distilled student, a teacher, and both at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lcr2s_ext.data import PersonBatch
from lcr2s_ext.models import DualEncoder, Student, Teacher
from lcr2s_ext.training.config import TrainConfig
from lcr2s_ext.training.losses import DistillationLoss, TaskLoss
from lcr2s_ext.training.stage import Stage, freeze

__all__ = ["OneStage", "StudentStage", "TeacherStage"]


class StudentStage(Stage):
    """A dual encoder on single inputs; with a teacher, the distillation terms as well.

    The teacher is frozen, sees the same augmented anchors, and may be a :class:`Teacher` or, for controls, any plain
    :class:`DualEncoder`.
    """

    model: Student

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        model: Student,
        augment: Callable[[Tensor, int], Tensor],
        *,
        num_identities: int,
        teacher: Teacher | DualEncoder | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(config, name, model, augment, **options)
        self.task = TaskLoss(config.loss, model.output_width, num_identities)
        self.keep_mlm(model, tokenizer)
        self.distillation: DistillationLoss | None = None
        if teacher is not None:
            self.__dict__["_teacher"] = freeze(teacher)
            self.keep_bank(teacher)
            self.distillation = DistillationLoss(config.distill, model.output_width, teacher.output_width)

    def losses(self, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        rows = len(batch.labels)
        student, masked = self.encode_trained(self.model, images, batch, rows)
        terms = self.task(*student, batch.labels, self.group) | masked
        if self.teacher is not None and self.distillation is not None:
            ramp = _ramp(self.config.distill.ramp_epochs, batch.epoch, batch.step, self.steps_per_epoch)
            terms |= self.distillation(student, self._targets(images, batch, rows), ramp, self.group)
        return terms

    @torch.no_grad()
    def _targets(self, images: Tensor, batch: PersonBatch, rows: int) -> tuple[Tensor, Tensor]:
        if isinstance(self.teacher, Teacher):
            encoded = self.encode(self.teacher.encoders, images, batch)
            made = self.fuse(self.teacher, encoded, batch)
            return made.image, made.text
        plain: Any = self.teacher
        return self.encode(plain, images, batch, rows)


class TeacherStage(Stage):
    """Encoders and fusion, losses on the fused features; on the single features too where ``auxiliary_weight`` is
    given.

    With ``train_encoders=False`` the encoders stay frozen and only the fusion learns. The masked language term is that
    of the encoders' single features of the anchors.
    """

    model: Teacher

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        model: Teacher,
        augment: Callable[[Tensor, int], Tensor],
        *,
        num_identities: int,
        auxiliary_weight: float = 0.0,
        train_encoders: bool = True,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(config, name, model, augment, **options)
        self.task = TaskLoss(config.loss, model.output_width, num_identities)
        self.auxiliary = TaskLoss(config.loss, model.output_width, num_identities) if auxiliary_weight else None
        self.auxiliary_weight = auxiliary_weight
        self.train_encoders = train_encoders
        self.keep_bank(model)
        if train_encoders:
            self.keep_mlm(model.encoders, tokenizer)
        else:
            freeze(model.encoders)

    def train(self, mode: bool = True) -> TeacherStage:
        super().train(mode)
        if not self.train_encoders:
            self.model.encoders.eval()
        return self

    def losses(self, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        encoded, masked = self.encode_trained(self.model.encoders, images, batch)
        made = self.fuse(self.model, encoded, batch)
        terms = self.task(made.image, made.text, batch.labels, self.group) | masked
        if self.auxiliary is not None:
            single = self.auxiliary(made.single_image, made.single_text, batch.labels, self.group)
            terms |= {f"single_{key}": self.auxiliary_weight * value for key, value in single.items()}
        return terms


class OneStage(Stage):
    """Teacher and student trained together; the teacher's features are detached for the student's losses. The masked
    language term is the student's alone.
    """

    model: Student

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        model: Student,
        augment: Callable[[Tensor, int], Tensor],
        *,
        num_identities: int,
        teacher: Teacher,
        auxiliary_weight: float = 0.0,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(config, name, model, augment, **options)
        # A submodule here, for it is trained; `model`, the only thing that leaves the stage, is the student alone.
        self.joint_teacher = teacher
        self.keep_bank(teacher)
        self.keep_mlm(model, tokenizer)
        self.task = TaskLoss(config.loss, model.output_width, num_identities)
        self.teacher_task = TaskLoss(config.loss, teacher.output_width, num_identities)
        self.auxiliary = TaskLoss(config.loss, teacher.output_width, num_identities) if auxiliary_weight else None
        self.auxiliary_weight = auxiliary_weight
        self.distillation = DistillationLoss(config.distill, model.output_width, teacher.output_width)

    def averaged_modules(self) -> list[nn.Module]:
        return [self.model, self.joint_teacher]

    def losses(self, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        rows = len(batch.labels)
        encoded = self.encode(self.joint_teacher.encoders, images, batch)
        made = self.fuse(self.joint_teacher, encoded, batch)
        student, masked = self.encode_trained(self.model, images, batch, rows)
        ramp = _ramp(self.config.distill.ramp_epochs, batch.epoch, batch.step, self.steps_per_epoch)
        terms = self.task(*student, batch.labels, self.group) | masked
        terms |= self.distillation(student, (made.image.detach(), made.text.detach()), ramp, self.group)
        fused = self.teacher_task(made.image, made.text, batch.labels, self.group)
        terms |= {f"teacher_{key}": value for key, value in fused.items()}
        if self.auxiliary is not None:
            single = self.auxiliary(made.single_image, made.single_text, batch.labels, self.group)
            terms |= {f"single_{key}": self.auxiliary_weight * value for key, value in single.items()}
        return terms


def _ramp(epochs: int, epoch: int, step: int, steps_per_epoch: int) -> float:
    if not epochs:
        return 1.0
    return min(1.0, (epoch * steps_per_epoch + step + 1) / (epochs * steps_per_epoch))
