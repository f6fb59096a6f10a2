"""LCR2S: inputs, saving and loading, and the teacher around its encoders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lcr2s_ext
from lcr2s_ext.data import CaptionTokenizer
from lcr2s_ext.models import LCR2S
from lcr2s_ext.ops import SupportIndex

CAPTIONS = ["a man in a red coat", "a woman with a green bag and blue trousers", "someone in black"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=80, max_length=16)


@pytest.fixture
def model(tokenizer: CaptionTokenizer) -> LCR2S:
    return LCR2S.from_preset("tiny", tokenizer=tokenizer, seed=3).eval()


def test_is_exported_by_the_package() -> None:
    assert lcr2s_ext.LCR2S is LCR2S


def test_one_image_in_many_forms_is_one_vector(model: LCR2S, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "x.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = model.encode_image(picture)
    assert expected.shape == (1, 128)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(1))
    for form in (tmp_path / "x.png", str(tmp_path / "x.png"), [picture], tensor, tensor[None], tensor.float() / 255):
        torch.testing.assert_close(model.encode_image(form), expected, rtol=1e-4, atol=1e-5)
    assert model.encode_image([picture, tmp_path / "x.png"]).shape == (2, 128)


def test_other_sizes_are_resized_alike(model: LCR2S) -> None:
    smooth = torch.linspace(0, 255, 128)[None, :, None].expand(3, 128, 64).round().to(torch.uint8)
    picture = Image.fromarray(smooth.permute(1, 2, 0).numpy())
    torch.testing.assert_close(model.encode_image(picture), model.encode_image(smooth), rtol=0, atol=0.02)


def test_refuses_what_is_no_image(model: LCR2S) -> None:
    with pytest.raises(TypeError, match="images"):
        model.encode_image(3)
    with pytest.raises(ValueError, match="images"):
        model.encode_image(torch.zeros(1, 64, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8 or a floating"):
        model.encode_image(torch.zeros(3, 64, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one"):
        model.encode_image([])


def test_encode_text_takes_strings_and_tokens(model: LCR2S, tokenizer: CaptionTokenizer) -> None:
    features = model.encode_text(CAPTIONS)
    assert features.shape == (3, 128)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_text(tokenizer.encode(CAPTIONS)), features)
    torch.testing.assert_close(model.encode_text(CAPTIONS[1]), features[1:2])
    torch.testing.assert_close(model.encode_text(tokenizer.encode(CAPTIONS)[0]), features[:1])
    with pytest.raises(TypeError, match="captions"):
        model.encode_text([])
    with pytest.raises(ValueError, match="need a tokenizer"):
        LCR2S.from_preset("tiny", vocab_size=80).encode_text("a man")


def test_presets(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of tiny, small, .*got 'huge'"):
        LCR2S.from_preset("huge", vocab_size=10)
    with pytest.raises(ValueError, match="vocab_size"):
        LCR2S.from_preset("tiny")
    small = LCR2S.from_preset("small", tokenizer=tokenizer, width=48, image_encoder={"widths": [8, 8], "strides": [2]})
    assert small.encode_image(torch.zeros(1, 3, 20, 10)).shape == (1, 48)
    a, b = (LCR2S.from_preset("tiny", tokenizer=tokenizer, seed=7) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_round_trip(model: LCR2S, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    again = LCR2S.from_pretrained(tmp_path / "m")
    assert not again.training
    assert again.config() == model.config()
    images = torch.randint(0, 256, (4, 3, 64, 32), dtype=torch.uint8)
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    again.save_pretrained(tmp_path / "n")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()


def test_teacher_stays_out_of_the_students_checkpoint(model: LCR2S, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    teacher = model.make_teacher(num_heads=4)
    model.save_pretrained(tmp_path)
    assert set(load_file(str(tmp_path / "model.safetensors"))) == set(model.student.state_dict())
    assert not any("fusion" in name for name in model.student.state_dict())
    assert any("fusion" in name for name in teacher.state_dict())


def test_clear_errors_of_damaged_folders(model: LCR2S, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        LCR2S.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        LCR2S.from_pretrained(tmp_path)
    folder = model.save_pretrained(tmp_path / "m")
    config, weights = folder / "config.json", folder / "model.safetensors"
    good, good_weights = config.read_text(), weights.read_bytes()

    def broken(text: str, match: str) -> None:
        config.write_text(text)
        with pytest.raises(ValueError, match=match):
            LCR2S.from_pretrained(folder)
        config.write_text(good)

    broken("{", "not valid JSON")
    broken("[]", "format 'lcr2s'")
    broken(json.dumps({**json.loads(good), "version": 99}), "version 1, got 99")
    broken(json.dumps({key: value for key, value in json.loads(good).items() if key != "mean"}), "incomplete")
    other = json.loads(good)
    other["text_encoder"]["width"] = 32
    broken(json.dumps(other), r"text_encoder.*has shape .* the configuration asks for")
    other = json.loads(good)
    other["text_encoder"]["layers"] = 2
    broken(json.dumps(other), "is missing")
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    with pytest.raises(ValueError, match="damaged"):
        LCR2S.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        LCR2S.from_pretrained(folder)
    weights.write_bytes(good_weights)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        LCR2S.from_pretrained(folder)


def test_teacher_fuses_anchors_and_returns_the_single_features(model: LCR2S) -> None:
    teacher = model.make_teacher(num_heads=4).eval()
    images, tokens = torch.randn(5, 3, 64, 32), torch.randint(1, 30, (6, 8))
    image_support = SupportIndex(torch.tensor([0, 3, 4, 6]), torch.tensor([0, 3, 4, 1, 2, 0]), 5)
    text_support = SupportIndex(torch.tensor([0, 1, 3, 6]), torch.tensor([0, 1, 5, 2, 3, 4]), 6)
    made = teacher(images, tokens, image_support, text_support)
    assert all(part.shape == (3, 128) for part in made)
    single = teacher.encoders(images, tokens)
    torch.testing.assert_close(made.single_image, single[0][:3])
    torch.testing.assert_close(made.single_text, single[1][:3])
    torch.testing.assert_close(made.image[1], teacher(images, tokens).image[1])
    assert (made.image[0] - teacher(images, tokens).image[0]).abs().max() > 1e-4
