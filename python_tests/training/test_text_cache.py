"""What a frozen text backbone computes, kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lcr2s_ext.training import ConfigError, TrainConfig, TrainingData, fit_student, load_config, prepare_data, train
from lcr2s_ext.training.stage import Stage

Configure = Callable[..., TrainConfig]

SIDES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS: dict[str, dict[str, Any]] = {
    "bert": {"type": "bert_textcnn", "architecture": {**SIDES, "vocab_size": 500}, "width": 8, "output_width": 16},
    "clip": {"type": "clip_text", "architecture": {**SIDES, "vocab_size": 500, "projection_dim": 8, "eos_token_id": 3}},
}


@pytest.fixture(scope="module")
def data(config_of: Configure) -> TrainingData:
    return prepare_data(config_of("data.vocab_size=400"))


@pytest.fixture
def configure(config_of: Configure) -> Configure:
    def make(kind: str, *overrides: str, **text: Any) -> TrainConfig:
        config = config_of("data.vocab_size=400", "epochs=1", "teacher.start=scratch", "loggers=[]", "optim.lr=1e-3")
        values = {**TEXTS[kind], **text, **({"blocks": 1} if kind == "bert" else {})}
        config.model.text_encoder = values
        # Keyword arguments of the preset's own text encoder do not belong to this one.
        config.model.preset = "rn50-bert" if kind == "bert" else "clip-vit-b32"
        config.model.image_encoder = (
            {"type": "tiny_image", "widths": [8, 16], "strides": [2], "grid": [4, 2]}
            if kind == "bert"
            else {"architecture": {**SIDES, "patch_size": 8, "image_size": 32, "projection_dim": 8}}
        )
        config.model.image_size = [64, 32]
        return load_config(None, overrides, base=to_plain(config))

    return make


def to_plain(config: TrainConfig) -> dict[str, Any]:
    from lcr2s_ext.training import to_dict

    return to_dict(config)


def test_cached_run_is_the_uncached_one_without_its_backbone(
    configure: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcr2s_ext.models.pretrained import BertTextCNN

    terms: list[dict[str, float]] = []
    inside: list[int] = []
    compute, backbone = Stage.compute, BertTextCNN.backbone
    at_work = [False]

    def noting(self: Stage, *arguments: Any) -> Any:
        at_work[0] = True
        found = compute(self, *arguments)
        at_work[0] = False
        terms.append({name: float(value.detach()) for name, value in found.items()})
        return found

    def counting(self: BertTextCNN, tokens: torch.Tensor) -> torch.Tensor:
        if at_work[0]:
            inside.append(len(tokens))
        return backbone(self, tokens)

    monkeypatch.setattr(Stage, "compute", noting)
    monkeypatch.setattr(BertTextCNN, "backbone", counting)
    micro = "optim.micro_batch=5"
    warm = ["teacher.start=warm", "teacher.warm_epochs=1"]
    plain = train(configure("bert", micro, *warm), data)
    assert inside
    expected, terms[:], inside[:] = terms.copy(), [], []
    cached = train(configure("bert", micro, *warm, f"data.text_cache={tmp_path}"), data)
    assert not inside
    assert len(terms) == len(expected)
    assert terms[0] == pytest.approx(expected[0], rel=1e-6)  # a product's rounding depends on its number of rows
    assert all(a == pytest.approx(b, rel=1e-2) for a, b in zip(terms, expected, strict=True))
    for ours, theirs in zip(cached.model.student.parameters(), plain.model.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    (file,) = tmp_path.iterdir()  # one for student and teacher: their frozen BERT is the same
    assert file.stat().st_size == len(data.tokens["train"]) * data.tokens["train"].shape[1] * 16 * 4
    written = file.stat().st_mtime_ns
    data.text_caches.clear()
    fit_student(configure("bert", micro, f"data.text_cache={tmp_path}"), data)
    assert file.stat().st_mtime_ns == written


def test_kept_in_half_the_memory(configure: Configure, data: TrainingData) -> None:
    data.text_caches.clear()
    fit_student(configure("bert", "data.text_cache=memory", "data.text_cache_dtype=float16"), data)
    (cache,) = data.text_caches.values()
    assert (cache.rows.dtype, cache.dtype) == (torch.float16, torch.float32)
    taken = cache.take(torch.tensor([3, 1]), torch.device("cpu"))
    assert taken.dtype == torch.float32
    assert torch.equal(taken, cache.rows[[3, 1]].float())


def test_encoder_frozen_by_its_learning_rate(configure: Configure, data: TrainingData) -> None:
    frozen = "optim.lr_multipliers={text_encoder.model: 0.0}"
    plain = fit_student(configure("clip", frozen), data)
    cached = fit_student(configure("clip", frozen, "data.text_cache=memory"), data)
    for ours, theirs in zip(cached.model.student.parameters(), plain.model.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_wrong_uses_are_refused(configure: Configure, config_of: Configure, data: TrainingData, tmp_path: Path) -> None:
    out = f"out={tmp_path}/out"
    with pytest.raises(ConfigError, match=r"text backbone is trained \(model\.text_encoder\.model\."):
        train(configure("clip", "data.text_cache=memory", out), data)
    # The teacher's encoders have another name than the student's.
    multipliers = "optim.lr_multipliers={model.text_encoder.model: 0.0}"
    with pytest.raises(ConfigError, match=r"is trained \(model\.encoders\.text_encoder\.model\."):
        train(configure("clip", "data.text_cache=memory", multipliers, out), data)
    with pytest.raises(ConfigError, match="TinyTextEncoder has no backbone"):
        train(config_of("data.text_cache=memory", out))
    assert not (tmp_path / "out").exists()
    multipliers = "optim.lr_multipliers={text_encoder.model: 0.0}"
    with pytest.raises(ConfigError, match="dropout is active inside the frozen text backbone"):
        fit_student(configure("bert", "data.text_cache=memory", multipliers, frozen=False), data)


def test_frozen_backbone_of_the_module_is_left_in_eval_mode(configure: Configure, data: TrainingData) -> None:
    result = fit_student(configure("bert", "data.text_cache=memory"), data)
    encoder: nn.Module = result.model.student.text_encoder
    assert all(not value.requires_grad for value in encoder.model.parameters())  # type: ignore[union-attr]
