"""Runs that one process and several must agree on, made alike by test_distributed.py and by its workers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcr2s_ext.data import TrainingDataset
from lcr2s_ext.models import TokenFeatures, register_encoder
from lcr2s_ext.training import TrainConfig, TrainingData, fit_one_stage, fit_student, fit_teacher, load_config
from lcr2s_ext.training.prepare import make_model, make_teacher
from lcr2s_ext.training.stage import Stage

SETTINGS = [
    "progress=none",
    "loggers=[]",
    "epochs=1",
    "eval_every=1",
    "log_every=1",
    "threads=1",
    "device=cpu",
    "precision=64-true",
    "data.batch_size=12",
    "data.max_support=2",
    # Of the augmentations the one that works in float64.
    "data.pad=0",
    "data.flip=0",
    "data.erasing=0.5",
    "model.width=16",
    "model.heads=4",
    "model.image_encoder={type: test_patches}",
    "model.text_encoder={width: 16, hidden: 16, dropout: 0.0}",
    "optim.lr=0.01",
]
PAIRS = ["data.sampler=identity", "data.identities=4", "data.instances=3", "data.support=batch"]
LONGER = ["precision=32-true", "epochs=3"]
FLOAT32 = ["precision=32-true", "distill.feature_reduction=row", "distill.feature_normalize=true"]
# No batch normalisation, no dropout: with them processes differ from one by what they are.
CASES: dict[str, list[str]] = {
    "student": [
        "loss.align={info_nce: 1.0, tal: 0.5}",
        "loss.learn_logit_scale=true",
        "loss.mlm_weight=0.7",
        "loss.mlm_layers=1",
        "loss.mlm_heads=4",
        "optim.accumulate=2",
        "optim.grad_clip=0.5",
    ],
    "teacher": [*PAIRS, "teacher.start=auxiliary"],
    "frozen": ["teacher.start=frozen", "data.support=batch"],
    "distilled": [
        "distill.intra_weight=10",
        "distill.feature_reduction=sum",
        "distill.feature_normalize=false",
        "optim.micro_batch=4",
    ],
    "one_stage": [
        "data.support=bank",
        "data.bank_size=50",
        "distill.relation=kl",
        "distill.relation_weight=1",
        "distill.feature_normalize=false",
    ],
}


@register_encoder("test_patches")
class Patches(nn.Module):
    """Means of image patches, through two linear maps."""

    def __init__(self, output_width: int, **unused: Any) -> None:
        super().__init__()
        self.config = {"output_width": output_width}
        self.output_width = output_width
        self.token_width = 3
        self.layers = nn.ModuleList([nn.Linear(96, 24), nn.Linear(24, output_width)])

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.adaptive_avg_pool2d(images, (8, 4)).flatten(1).to(self.layers[0].weight.dtype)
        return self.layers[1](torch.tanh(self.layers[0](patches)))

    def token_features(self, images: Tensor) -> TokenFeatures:
        cells = nn.functional.adaptive_avg_pool2d(images, (8, 4)).flatten(2).transpose(1, 2)
        mask = torch.ones(cells.shape[:2], dtype=torch.bool)
        return TokenFeatures(self(images), cells.to(self.layers[0].weight.dtype), mask)


def config_of(corpus: str, *overrides: str) -> TrainConfig:
    return load_config(None, [f"data.root={corpus}", *SETTINGS, *overrides])


class PlainSGD(torch.optim.SGD):
    """For float32: Adam divides by the gradient's own size, and makes steps of rounding where it should be zero."""

    # What a stage asks of a fused optimiser only, which SGD on sharded weights is not.
    found_inf = property(lambda self: None, lambda self, value: None)


@contextlib.contextmanager
def plain_sgd() -> Iterator[None]:
    """Stages are trained with SGD inside."""
    kept = Stage.configure_optimizers
    Stage.configure_optimizers = lambda self: PlainSGD(self.parameters(), lr=0.005)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stage.configure_optimizers = kept  # type: ignore[method-assign]


def trained(name: str, corpus: str, data: TrainingData, *overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after the steps of a case."""
    config = config_of(corpus, *CASES[name], *overrides)
    model = make_model(config, data)
    if name in ("teacher", "frozen"):
        start = make_teacher(config, data, model.student)
        result: nn.Module = fit_teacher(config, data, init=model.student).model
        return start.state_dict(), result.state_dict()
    if name == "one_stage":
        stage, teacher = fit_one_stage(config, data)
        ends = {f"teacher.{key}": value for key, value in teacher.state_dict().items()}
        starts = {f"teacher.{key}": value for key, value in make_teacher(config, data).state_dict().items()}
        student = stage.model.student.state_dict()
        return {**model.student.state_dict(), **starts}, {**student, **ends}
    teacher = make_teacher(config_of(corpus, "seed=3"), data).double() if name == "distilled" else None
    fitted = fit_student(config, data, teacher=teacher)
    return model.student.state_dict(), fitted.model.student.state_dict()


class CutError(Exception):
    """Where a run is cut."""


@contextlib.contextmanager
def cut(epoch: int, step: int) -> Iterator[None]:
    """Every process fails when it makes this batch."""
    kept = TrainingDataset.make_batch

    def failing(self: TrainingDataset, samples: Any, *rest: Any) -> Any:
        if (samples.epoch, samples.step) == (epoch, step):
            raise CutError
        return kept(self, samples, *rest)

    TrainingDataset.make_batch = failing  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingDataset.make_batch = kept  # type: ignore[method-assign]


def run_config(corpus: str, out: Path | str, *overrides: str) -> TrainConfig:
    """A whole run of three short stages."""
    return config_of(corpus, "epochs=2", "teacher.epochs=1", "teacher.warm_epochs=1", f"out={out}", *overrides)
