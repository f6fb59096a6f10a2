"""Exponential moving average of the weights: the formula, what uses it, resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcr2s_ext.data import TrainingDataset
from lcr2s_ext.training import (
    ConfigError,
    TrainConfig,
    TrainingData,
    evaluate_student,
    fit_one_stage,
    fit_student,
    load_config,
)
from lcr2s_ext.training.ema import WeightAverage
from lcr2s_ext.training.stage import Stage

Configure = Callable[..., TrainConfig]


def test_average_follows_the_formula_and_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(module, 0.5)
    expected = module[0].weight.detach().clone().double()
    for step in range(12):
        module(torch.randn(4, 3))
        with torch.no_grad():
            module[0].weight.add_(torch.randn(2, 3))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module[0].weight.detach().double()
    torch.testing.assert_close(average.state["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert int(average.state["1.num_batches_tracked"]) == 12
    own = module[0].weight.detach().clone()
    with average.applied():
        assert torch.equal(module[0].weight, average.state["0.weight"])
    assert torch.equal(module[0].weight, own)
    again = WeightAverage(module, 0.5)
    again.load_state_dict(average.state_dict())
    assert again.updates == 12
    assert all(torch.equal(again.state[name], value) for name, value in average.state.items())


def test_average_is_what_is_evaluated_and_kept_but_not_what_is_trained(
    config_of: Configure, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[dict[str, Tensor]] = []
    averages: list[dict[str, Tensor]] = []
    finish = Stage.on_train_epoch_end

    def noting(self: Stage) -> None:
        finish(self)
        trained.append({name: value.clone() for name, value in self.model.state_dict().items()})
        averages.extend({name: value.clone() for name, value in a.state.items()} for a in self._averages)

    monkeypatch.setattr(Stage, "on_train_epoch_end", noting)
    plain = fit_student(config_of(), data)
    raw = trained.copy()
    trained.clear()
    assert not averages
    kept = fit_student(config_of("optim.ema_decay=0.8"), data)
    assert plain.steps == kept.steps
    # Training itself does not know of the average.
    for a, b in zip(raw, trained, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    best = averages[kept.best_epoch - 1]
    state = kept.model.student.state_dict()
    assert all(torch.equal(state[name], best[name]) for name in best)
    assert any(not torch.equal(state[name], trained[kept.best_epoch - 1][name]) for name in best)
    assert kept.val == evaluate_student(kept.model, data, "val")


def test_resumed_average_is_the_same_to_the_bit(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        "optim.ema_decay=0.9", "checkpoint_every=2", "method=one_stage", "optim.micro_batch=7", "data.batch_size=12"
    )
    whole, whole_teacher = fit_one_stage(config, data, out=tmp_path / "whole")
    make_batch = TrainingDataset.make_batch

    def crashing(self: TrainingDataset, samples: Any, *rest: Any) -> Any:
        if (samples.epoch, samples.step) == (1, 3):
            raise RuntimeError("crash")
        return make_batch(self, samples, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDataset, "make_batch", crashing)
        with pytest.raises(RuntimeError, match="crash"):
            fit_one_stage(config, data, out=tmp_path / "parts")
    checkpoint = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    steps = checkpoint["global_step"]
    assert steps % (whole.steps // 2) == 2  # inside the second epoch
    parts, parts_teacher = fit_one_stage(config, data, out=tmp_path / "parts", resume=True)
    for ours, theirs in ((parts.model.student, whole.model.student), (parts_teacher, whole_teacher)):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert parts.history == whole.history
    assert parts.steps == whole.steps


def test_impossible_averages_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.ema_decay: expected a number in \[0, 1\), got 1"):
        load_config(None, ["optim.ema_decay=1"])
    with pytest.raises(ConfigError, match=r"optim\.ema_decay: sharded"):
        load_config(None, ["optim.ema_decay=0.9", "strategy=fsdp"])
