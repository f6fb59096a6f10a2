"""Memory format, compilation, and the figures of throughput and memory."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lcr2s_ext.training import ConfigError, TrainConfig, TrainingData, fit_student, load_config
from lcr2s_ext.training.acceleration import accelerated
from lcr2s_ext.training.cached_gradients import encode_in_parts
from lcr2s_ext.training.prepare import make_model

Configure = Callable[..., TrainConfig]


def test_channels_last_agrees_with_the_plain_run(config_of: Configure, data: TrainingData) -> None:
    plain = fit_student(config_of("epochs=1"), data)
    other = fit_student(config_of("epochs=1", "channels_last=true"), data)
    expected = plain.model.student.state_dict()
    for name, value in other.model.student.state_dict().items():
        # Adam's step is as long for a tiny gradient as for a large one, so rounding shows where gradients vanish.
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-2, atol=1e-3)


def test_compiled_encoders_give_the_same_gradients_and_are_plain_again_afterwards(
    config_of: Configure, data: TrainingData
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.register_backend(counting, name="counting")
    overrides = ["model.image_encoder={dropout: 0.0}", "model.text_encoder={dropout: 0.0}"]
    student = make_model(config_of(*overrides), data).student.train()
    names = list(student.state_dict())
    images, tokens = torch.randn(8, 3, *data.image_size), data.tokens["train"][:8]

    def gradients() -> dict[str, torch.Tensor]:
        student.zero_grad()
        features = [
            encode_in_parts(encode, (rows,), 4, student)
            for encode, rows in ((student.image_features, images), (student.text_features, tokens))
        ]
        (features[0] @ features[1].T).logsumexp(1).sum().backward()
        return {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}

    expected = gradients()
    with accelerated([student], config_of("compile=counting")):
        compiled = gradients()
        assert len(graphs) >= 2
        assert list(student.state_dict()) == names
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    graphs.clear()
    torch._dynamo.reset()
    gradients()
    assert not graphs


def test_backend_and_mode_reach_the_compiler(
    config_of: Configure, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str | None]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    fit_student(config_of("epochs=1", "compile=inductor", "compile_mode=max-autotune"), data)
    assert asked == 2 * [{"backend": "inductor", "mode": "max-autotune"}]
    with pytest.raises(ConfigError, match="compile_mode: needs a backend"):
        load_config(None, ["compile_mode=max-autotune"])


def test_logs_have_throughput_and_memory(config_of: Configure, data: TrainingData, tmp_path: Path) -> None:
    result = fit_student(config_of("log_every=2", "loggers=[csv]"), data, out=tmp_path)
    (file,) = tmp_path.glob("csv/*/metrics.csv")
    rows = [row for row in csv.DictReader(file.open()) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(2, result.steps + 1, 2))
    for row in rows:
        assert float(row["samples_per_second"]) > 0
        assert 0.01 < float(row["memory_gib"]) < 1000
