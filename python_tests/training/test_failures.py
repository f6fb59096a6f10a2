"""Losses and gradients that are not finite: found, harmless, saved, replayed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcr2s_ext.data import PersonBatch
from lcr2s_ext.training import (
    TrainConfig,
    TrainingData,
    TrainingError,
    fit_student,
    load_failed_batch,
    make_loader,
    replay_failed_batch,
    train,
)
from lcr2s_ext.training.failures import FAILED_BATCH_FILE
from lcr2s_ext.training.stage import Stage
from lcr2s_ext.training.stages import OneStage, StudentStage, TeacherStage

Configure = Callable[..., TrainConfig]


def poison(monkeypatch: pytest.MonkeyPatch, cls: type[Stage], steps: set[tuple[int, int]], how: str = "loss") -> None:
    """Makes the loss of some steps NaN, or its gradient alone."""
    losses = cls.losses

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * float("nan")

    def poisoned(self: Any, images: Tensor, batch: PersonBatch) -> dict[str, Tensor]:
        terms = losses(self, images, batch)
        if (batch.epoch, batch.step) in steps:
            terms["align"] = NanGradient.apply(terms["align"]) if how == "gradient" else terms["align"] * float("nan")
        return terms

    monkeypatch.setattr(cls, "losses", poisoned)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def keep_stage(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    stages: list[Stage] = []
    init = Stage.__init__

    def noting(self: Stage, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        stages.append(self)

    monkeypatch.setattr(Stage, "__init__", noting)
    return stages


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_no_update_follows_the_first_bad_step_even_when_it_is_found_later(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As on a GPU, where the device is read every ``log_every`` steps only."""
    stages = keep_stage(monkeypatch)
    before: list[dict[str, Tensor]] = []
    seen: list[int] = []
    step = Stage.training_step

    def noting(self: Stage, batch: PersonBatch, batch_idx: int) -> Tensor:
        before.append(weights(self.model))
        seen.append(batch.step)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Stage, "training_step", noting)
    monkeypatch.setattr(Stage, "reads_every", property(lambda self: 5))
    poison(monkeypatch, StudentStage, {(0, 2), (0, 4)}, how)
    with pytest.raises(
        TrainingError, match=rf"{how} is not finite in stage student, epoch 0, step 2 .*{FAILED_BATCH_FILE}"
    ):
        fit_student(config_of("data.batch_size=8"), data, out=tmp_path)
    assert seen[-1] > 2
    (stage,) = stages
    after = weights(stage.model)
    assert all(torch.equal(after[name], before[2][name]) for name in after)
    assert not all(torch.equal(after[name], before[1][name]) for name in after)
    failed = load_failed_batch(tmp_path / FAILED_BATCH_FILE)
    assert (failed.bad.epoch, failed.bad.step) == (0, 2)
    assert torch.equal(failed.state["model.image_encoder.projection.weight"], after["image_encoder.projection.weight"])


@pytest.mark.parametrize("name", ["teacher", "student", "one_stage"])
def test_saved_batch_is_the_batch_and_is_replayed_to_the_same_terms(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method = "one_stage" if name == "one_stage" else "lcr2s"
    config = config_of(f"method={method}", "teacher.start=scratch", "model.fusion_dropout=0.3", f"out={tmp_path}")
    kind = {"teacher": TeacherStage, "student": StudentStage, "one_stage": OneStage}[name]
    computed: list[dict[str, float]] = []
    compute = Stage.compute

    def noting(self: Stage, *arguments: Any) -> dict[str, Tensor]:
        terms = compute(self, *arguments)
        computed.append({key: float(value.detach()) for key, value in terms.items()})
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "compute", noting)
        poison(patch, kind, {(1, 1)})
        with pytest.raises(TrainingError, match=f"stage {name}, epoch 1, step 1"):
            train(config, data)
    file = tmp_path / name / FAILED_BATCH_FILE
    failed = load_failed_batch(file)
    expected = make_loader(config, data, "drawn").batch(1, 1)
    assert failed.batch.images.dtype == torch.uint8
    for key in ("images", "tokens", "labels", "samples", "captions"):
        assert torch.equal(getattr(failed.batch, key), getattr(expected, key))
    assert failed.batch.text_support is not None
    assert expected.text_support is not None
    assert torch.equal(failed.batch.text_support.indices, expected.text_support.indices)
    assert failed.stage == name
    assert failed.bad.terms["identity"] == computed[-1]["identity"]
    assert math.isnan(failed.bad.terms["loss"])
    again = replay_failed_batch(file, data)
    assert again.keys() == computed[-1].keys()
    assert all(again[key] == computed[-1][key] for key in again if key not in ("loss", "align"))
    assert math.isfinite(again["align"])  # nothing poisons it any more


def test_without_a_folder_the_message_says_that_nothing_was_saved(
    config_of: Configure, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, StudentStage, {(0, 1)})
    with pytest.raises(TrainingError, match=r"step 1 .*batch was not saved, for the run has no folder"):
        fit_student(config_of("optim.accumulate=2"), data)


def test_what_is_no_failed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_failed_batch(tmp_path / "missing.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no failed batch"):
        load_failed_batch(tmp_path / "other.pt")
