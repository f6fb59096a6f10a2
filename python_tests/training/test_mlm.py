"""Masked language modelling with the image at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcr2s_ext.data import BatchAugment, TrainingDataset
from lcr2s_ext.models import LCR2S, DualEncoder, TinyTextEncoder, TokenFeatures, build_encoder
from lcr2s_ext.nn import MaskedLanguageHead
from lcr2s_ext.training import ConfigError, TrainConfig, TrainingData, fit_one_stage, fit_student, fit_teacher, train
from lcr2s_ext.training.mlm import MaskedLanguageModel, Masking
from lcr2s_ext.training.prepare import make_loader, make_model, make_teacher
from lcr2s_ext.training.stages import StudentStage, TeacherStage

Configure = Callable[..., TrainConfig]

MLM = ["loss.mlm_weight=0.5", "loss.mlm_layers=1", "loss.mlm_heads=2"]
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, "[EOS]": 3}


def captions(rows: int = 300, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 90, (rows, length), generator=generator)
    tokens[:, 0], tokens[:, -6], tokens[:, -5:] = 2, 3, 0
    tokens[1, 1:] = torch.tensor([3] + [0] * (length - 2))  # an empty caption
    tokens[2, 1:] = torch.tensor([7, 3] + [0] * (length - 3))  # of one word
    return tokens


def test_masking() -> None:
    tokens, samples = captions(), torch.arange(300)
    masking = Masking(SPECIAL, 90, 0.15, seed=3)
    masked, chosen = masking(tokens, samples, epoch=2)
    ordinary = tokens > 3
    assert not bool((chosen & ~ordinary).any())
    assert torch.equal(masked[~chosen], tokens[~chosen])
    assert bool(chosen.any(1)[ordinary.any(1)].all())
    assert not bool(chosen[1].any())
    assert abs(float(chosen.sum() / ordinary.sum()) - 0.15) < 0.02
    became = masked[chosen]
    assert masking.mask_id == 1  # this vocabulary has no mask token: the unknown word's
    assert abs(float((became == 1).float().mean()) - 0.8) < 0.05
    assert abs(float((became == tokens[chosen]).float().mean()) - 0.1) < 0.05
    assert bool((became[became != 1] > 3).all())
    # A caption's masking does not depend on the batch, and is another in another epoch and under another seed.
    part = masking(tokens[10:20], samples[10:20], epoch=2)
    assert torch.equal(part[0], masked[10:20])
    assert not torch.equal(masking(tokens, samples, epoch=3)[1], chosen)
    assert not torch.equal(Masking(SPECIAL, 90, 0.15, seed=4)(tokens, samples, 2)[1], chosen)


def test_mask_token_of_other_vocabularies() -> None:
    assert Masking({"[CLS]": 5, "[MASK]": 6, "[UNK]": 7}, 90, 0.15, 0).mask_id == 6
    clip = Masking({"<|startoftext|>": 88, "<|endoftext|>": 89}, 90, 0.5, 0)
    assert clip.mask_id == 87
    tokens = torch.tensor([[88, 87, 5, 87, 89, 0]])
    assert clip(tokens, torch.tensor([0]), 0)[1].tolist() == [[False, False, True, False, False, False]]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
TEXT = {**SIZES, "vocab_size": 90}
CLIP_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 3}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
ENCODERS: dict[str, dict[str, Any]] = {
    "tiny_image": {"output_width": 20, "widths": [8, 16], "strides": [2], "grid": [4, 2]},
    "resnet": {"architecture": RESNET},
    "clip_image": {"architecture": {**VISION, "projection_dim": 24}, "image_size": [48, 16]},
    "siglip_image": {"architecture": VISION, "image_size": [48, 16]},
    "tiny_text": {"vocab_size": 90, "output_width": 20, "width": 16},
    "bert_textcnn": {"architecture": TEXT, "width": 16, "output_width": 24, "blocks": 1},
    "clip_text": {"architecture": {**TEXT, **CLIP_IDS, "projection_dim": 24, "max_position_embeddings": 24}},
    "siglip_text": {"architecture": {**TEXT, "projection_size": 20, "max_position_embeddings": 30}},
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_give_tokens(kind: str) -> None:
    torch.manual_seed(0)
    encoder: Any = build_encoder({"type": kind, **ENCODERS[kind]}).eval()
    is_text = kind in ("tiny_text", "bert_textcnn", "clip_text", "siglip_text")
    inputs = captions(6) if is_text else torch.randn(3, 3, 48, 16)
    made = encoder.token_features(inputs)
    torch.testing.assert_close(made.pooled, encoder(inputs), rtol=1e-5, atol=1e-6)
    assert made.tokens.shape == (len(inputs), made.mask.shape[1], encoder.token_width)
    if is_text:
        assert torch.equal(made.mask, (inputs != 0)[:, : made.mask.shape[1]])
        assert bool((inputs[:, made.mask.shape[1] :] == 0).all())
    else:
        assert bool(made.mask.all())
        assert made.mask.shape[1] > 1
    spread = made.tokens.detach()[0, :, :].std(0).mean()
    assert float(spread) > 0  # one vector a token, not one for all


def test_padding_and_other_rows_do_not_reach_a_prediction() -> None:
    torch.manual_seed(1)
    head = MaskedLanguageHead(12, 16, 90, width=8, layers=2, heads=2)
    image, text = torch.randn(3, 5, 12), torch.randn(3, 7, 16)
    image_mask, text_mask = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
    text_mask[0, 4:] = False
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[0, 1] = chosen[2, 3] = True
    first = head(image, image_mask, text, text_mask, chosen)
    assert first.shape == (2, 90)
    text[0, 4:], text[1], image[1] = 9.0, 9.0, 9.0
    torch.testing.assert_close(head(image, image_mask, text, text_mask, chosen), first)
    image[2] += 1.0 * torch.randn(5, 12)
    assert not torch.allclose(head(image, image_mask, text, text_mask, chosen)[1], first[1], atol=1e-4)
    with pytest.raises(ValueError, match="heads: expected a positive divisor of width 8"):
        MaskedLanguageHead(12, 16, 90, width=8, heads=3)


def term(stage: Any, data: TrainingData, config: TrainConfig) -> Tensor:
    batch = next(iter(make_loader(config, data, config.data.support)))
    return stage.losses(BatchAugment(data.image_size)(batch.images, 1), batch)["mlm"]


def test_the_term_reaches_both_encoders_and_its_head_stays_behind(config_of: Configure, data: TrainingData) -> None:
    config = config_of(*MLM, "data.support=batch", "data.sampler=identity", "data.identities=4", "data.instances=3")
    options: dict[str, Any] = {
        "num_identities": data.splits["train"].num_identities,
        "tokenizer": data.tokenizer,
        "epochs": 1,
        "steps_per_epoch": 1,
        "evaluate": None,
    }
    augment = BatchAugment(data.image_size)
    student = StudentStage(config, "student", make_model(config, data).student, augment, **options)
    teacher = TeacherStage(config, "teacher", make_teacher(config, data), augment, **options)
    for stage, encoders in ((student, student.model), (teacher, teacher.model.encoders)):
        term(stage, data, config).backward()
        for module in (encoders.image_encoder.features, encoders.text_encoder.tokens, stage.mlm):
            gradients = [value.grad for value in module.parameters()]
            assert all(gradient is not None and bool(gradient.any()) for gradient in gradients[:2])
        assert not any("mlm" in name for name in stage.model.state_dict())
        assert any(name.startswith("mlm.") for name in stage.state_dict())
    frozen = TeacherStage(config, "teacher", make_teacher(config, data), augment, train_encoders=False, **options)
    assert frozen.mlm is None


class CrashError(Exception):
    pass


def test_training_with_it_resumes_to_the_bit(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(*MLM, "loggers=[]", "eval_every=2")
    whole = fit_student(config, data, out=tmp_path / "whole")
    make_batch = TrainingDataset.make_batch

    def crashing(self: TrainingDataset, samples: Any, *rest: Any) -> Any:
        if (samples.epoch, samples.step) == (1, 1):
            raise CrashError
        return make_batch(self, samples, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDataset, "make_batch", crashing)
        with pytest.raises(CrashError):
            fit_student(config, data, out=tmp_path / "parts")
    fit_student(config, data, out=tmp_path / "parts", resume=True)
    saved = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "parts")]
    assert any(name.startswith("mlm.head.classifier") for name in saved[0])
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert isinstance(whole.model, LCR2S)
    assert not any("mlm" in name for name in whole.model.state_dict())


def test_every_kind_of_stage_trains_with_it(config_of: Configure, data: TrainingData) -> None:
    config = config_of(*MLM, "teacher.start=scratch", "data.support=bank", "data.bank_size=30", "epochs=1")
    assert fit_teacher(config, data).steps > 0
    assert fit_one_stage(config, data)[0].steps > 0


def test_words_are_learnt_from_the_image() -> None:
    """Captions of one word that only the image tells."""
    torch.manual_seed(0)
    words = torch.arange(64) % 8 + 4
    images = nn.functional.one_hot(words, 12).float()
    tokens = torch.stack([torch.full((64,), 2), words, torch.full((64,), 3)], 1)

    class OneHot(nn.Module):
        output_width = token_width = 12

        def token_features(self, rows: Tensor) -> Any:
            return rows, rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool)

    dual = DualEncoder(OneHot(), TinyTextEncoder(12, 8, max_length=4, width=8, hidden=8), 12)
    config = TrainConfig().loss
    config.mlm_weight, config.mlm_layers, config.mlm_heads, config.mlm_width = 1.0, 1, 2, 16

    class Words:
        def special_tokens(self) -> dict[str, int]:
            return SPECIAL

    model = MaskedLanguageModel(config, dual, Words(), 0)
    optimizer = torch.optim.Adam([*model.parameters(), *dual.parameters()], lr=1e-2)
    losses = []
    for step in range(60):
        image = TokenFeatures(*dual.image_encoder.token_features(images))
        loss = model(dual, image, tokens, torch.arange(64), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < 1.5 < losses[0]


def test_refuses_what_cannot_work(config_of: Configure, data: TrainingData, tmp_path: Path) -> None:
    class Plain(nn.Module):
        output_width = 32

    config = config_of(*MLM)
    dual = DualEncoder(Plain(), make_model(config, data).student.text_encoder)
    with pytest.raises(ConfigError, match="image_encoder Plain has no token_features, no token_width"):
        MaskedLanguageModel(config.loss, dual, data.tokenizer, 0)
    with pytest.raises(ConfigError, match=r"loss\.mlm_heads: expected a divisor of the head's width 32, got 5"):
        train(config_of("loss.mlm_weight=1", "loss.mlm_heads=5", f"out={tmp_path}/run"), data)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"optim\.micro_batch"):
        config_of(*MLM, "optim.micro_batch=4")
    with pytest.raises(ConfigError, match="strategy=fsdp"):
        config_of(*MLM, "strategy=fsdp")
