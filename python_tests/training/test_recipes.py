"""Every configuration in configs/ read and trained for an epoch at miniature width, and the optimiser they describe."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lcr2s_ext.data import generate_corpus
from lcr2s_ext.training import prepare_data, train
from lcr2s_ext.training.config import ConfigError, OptimConfig, TrainConfig, load_config
from lcr2s_ext.training.prepare import make_model, make_teacher
from lcr2s_ext.training.stage import Stage, TrainingError, parameter_groups

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SIDES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SIDES, "vocab_size": 500, "max_position_embeddings": 80}
MINIATURE: dict[str, dict[str, Any]] = {
    "tiny": {},
    "rn50-bert": {
        "width": 16,
        "image_size": [64, 32],
        "image_encoder": {
            "architecture": {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
        },
        "text_encoder": {"architecture": BERT, "width": 8, "output_width": 16, "blocks": 1},
    },
    "clip-vit-b16": {
        "width": 16,
        "image_size": [48, 16],
        "image_encoder": {"architecture": {**SIDES, "patch_size": 8, "image_size": 32, "projection_dim": 16}},
        # 3 ends a caption of the tokenizer that is trained here.
        "text_encoder": {"architecture": {**BERT, "projection_dim": 16, "eos_token_id": 3}},
    },
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_trains(file: Path, tmp_path: Path) -> None:
    written = yaml.safe_load(file.read_text())
    layout = written["data"]["dataset"]
    val = 0 if layout == "icfg-pedes" else 2
    generate_corpus(tmp_path, identities=(8, val, 3), views=3, size=(64, 32), layout=layout)
    config = load_config(
        file,
        ["data.workers=0", "eval_every=1", "loggers=[]", "progress=none", "threads=1", "data.vocab_size=400"],
        base={
            "epochs": 1,
            "device": "cpu",
            "out": str(tmp_path / "out"),
            "data": {"root": str(tmp_path), "batch_size": 8, "identities": 4, "instances": 2},
            "model": {**MINIATURE[written["model"]["preset"]], "heads": 4},
            "teacher": {"epochs": 1, "warm_epochs": 1},
            "optim": {"warmup_epochs": 0},
        },
    )
    said: list[str] = []
    result = train(config, say=said.append)
    assert result.test is not None
    assert 0 <= result.test["text_to_image"]["R@1"] <= 1
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())
    assert any("no val split: the last epoch is kept" in line for line in said) == (val == 0)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"image_encoder": nn.Linear(3, 3), "image_fusion": nn.Linear(3, 3)})
        self.task = nn.Linear(3, 2)


def test_groups_by_name_and_decay() -> None:
    layers = Layers()
    optim = OptimConfig(
        lr=0.5,
        weight_decay=0.1,
        lr_multipliers={"model": 2.0, "model.image_fusion": 4.0, "task": 0.0, "distillation": 3.0},
    )
    groups = parameter_groups(layers, optim)
    found = {(group["lr"], group["weight_decay"]): [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found == {(1.0, 0.1): [(3, 3)], (1.0, 0.0): [(3,)], (2.0, 0.1): [(3, 3)], (2.0, 0.0): [(3,)]}
    with pytest.raises(TrainingError, match="no parameter's name has 'imgae_encoder' in it"):
        parameter_groups(layers, OptimConfig(lr_multipliers={"imgae_encoder": 2.0}))


def factors(optim: OptimConfig, steps: int, *, epochs: int = 4, steps_per_epoch: int = 5) -> list[float]:
    config = TrainConfig(optim=optim)
    stage = Stage(
        config, "s", nn.Linear(2, 2), lambda x, _: x, epochs=epochs, steps_per_epoch=steps_per_epoch, evaluate=None
    )
    made = stage.configure_optimizers()
    found = []
    for _ in range(steps):
        found.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return found


def test_schedules() -> None:
    step = factors(OptimConfig(lr=1.0, warmup_epochs=0, schedule="step", milestones=[1, 3]), 20)
    assert step == pytest.approx([1.0] * 5 + [0.1] * 10 + [0.01] * 5)
    warm = factors(OptimConfig(lr=1.0, warmup_epochs=1, warmup_factor=0.1, schedule="constant"), 7)
    assert warm == pytest.approx([0.1 + 0.9 * n / 6 for n in range(1, 6)] + [1.0, 1.0])
    # Two batches a step: three steps an epoch of five batches.
    accumulated = factors(OptimConfig(lr=1.0, warmup_epochs=0, schedule="step", milestones=[1], accumulate=2), 6)
    assert accumulated == pytest.approx([1.0] * 3 + [0.1] * 3)
    adam = Stage(
        TrainConfig(optim=OptimConfig(optimizer="adam")),
        "s",
        nn.Linear(2, 2),
        lambda x, _: x,
        epochs=1,
        steps_per_epoch=1,
        evaluate=None,
    ).configure_optimizers()["optimizer"]
    assert type(adam) is torch.optim.Adam


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optim.optimizer=sgd", "optim.optimizer: expected one of adamw, adam, got 'sgd'"),
        ("optim.milestones=[3]", "optim.milestones: need optim.schedule=step, got cosine"),
        ("optim.accumulate=0", "optim.accumulate: expected at least 1, got 0"),
        ("optim.lr_multipliers={a: -1}", r"optim.lr_multipliers.a: expected at least 0, got -1"),
        ("optim.lr_multipliers={a: x}", r"optim.lr_multipliers.a: expected float, got 'x'"),
        ("optim.warmup_factor=2", r"optim.warmup_factor: expected a number in \[0, 1\], got 2"),
    ],
)
def test_values_that_are_refused(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [key])


def test_teacher_from_scratch_starts_from_pretrained_weights_where_there_are_any(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    generate_corpus(tmp_path, identities=(4, 2, 2), views=2, size=(64, 32))
    architecture = MINIATURE["rn50-bert"]["image_encoder"]["architecture"]
    ResNetModel(ResNetConfig(**architecture)).save_pretrained(tmp_path / "resnet")
    base = {"data": {"root": str(tmp_path), "vocab_size": 400}, "model": {**MINIATURE["rn50-bert"], "heads": 4}}
    config = load_config(None, ["model.preset=rn50-bert", f"model.image_weights={tmp_path}/resnet"], base=base)
    data = prepare_data(config)
    student, teacher = make_model(config, data).student, make_teacher(config, data).encoders
    pretrained = student.image_encoder.state_dict()
    assert all(torch.equal(value, pretrained[name]) for name, value in teacher.image_encoder.state_dict().items())
