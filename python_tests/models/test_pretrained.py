"""The encoders built by transformers against transformers' own forward, and their weights from local folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lcr2s_ext.models import (
    LCR2S,
    BertTextCNN,
    ClipImageEncoder,
    ResNetImageEncoder,
    SavedTokenizer,
    SiglipTextEncoder,
    build_encoder,
    encoder_spec,
    load_encoder,
)
from lcr2s_ext.models.pretrained import load_weights, resize_positions

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
CLIP_TEXT = {**TEXT, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 2], "layer_type": "bottleneck"}
BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
TALL = (48, 16)


def randomised(model: Any) -> Any:
    """Weights that leave nothing near zero: fresh CLIP weights are so small that errors would hide."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.2, generator=generator)
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.CLIPConfig(vision_config=VISION, text_config=CLIP_TEXT, projection_dim=24)
    folder = tmp_path_factory.mktemp("clip")
    randomised(transformers.CLIPModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 32})
    folder = tmp_path_factory.mktemp("siglip")
    randomised(transformers.SiglipModel(config)).save_pretrained(folder)
    return folder


def pictures(size: tuple[int, int]) -> Tensor:
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))


def clip_tokens(length: int = 9) -> Tensor:
    tokens = torch.randint(1, 57, (3, length), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 58
    for row, end in enumerate((4, 8, 6)):
        tokens[row, end] = 59
        tokens[row, end + 1 :] = 0
    return tokens


@pytest.mark.parametrize("size", [(32, 32), TALL], ids=str)
def test_clip_image(clip_folder: Path, size: tuple[int, int]) -> None:
    encoder = load_encoder("clip_image", clip_folder, image_size=size).eval()
    theirs = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    expected = theirs.visual_projection(
        theirs.vision_model(pixel_values=pictures(size), interpolate_pos_encoding=size != (32, 32)).pooler_output
    )
    assert encoder.output_width == 24
    torch.testing.assert_close(encoder(pictures(size)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), TALL], ids=str)
def test_siglip_image(siglip_folder: Path, size: tuple[int, int]) -> None:
    encoder = load_encoder("siglip_image", siglip_folder, image_size=size).eval()
    theirs = transformers.SiglipModel.from_pretrained(siglip_folder).eval()
    expected = theirs.vision_model(pixel_values=pictures(size), interpolate_pos_encoding=size != (32, 32)).pooler_output
    torch.testing.assert_close(encoder(pictures(size)), expected, rtol=1e-4, atol=1e-5)


def test_clip_text_ignores_what_follows_the_end(clip_folder: Path) -> None:
    encoder = load_encoder("clip_text", clip_folder).eval()
    theirs = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokens = clip_tokens()
    expected = theirs.text_projection(theirs.text_model(input_ids=torch.where(tokens == 0, 59, tokens)).pooler_output)
    torch.testing.assert_close(encoder(tokens), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(tokens[:1, :5]), expected[:1], rtol=1e-4, atol=1e-5)


def test_siglip_text_reads_its_own_padding(siglip_folder: Path) -> None:
    encoder = load_encoder("siglip_text", siglip_folder).eval()
    theirs = transformers.SiglipTextModel.from_pretrained(siglip_folder).eval()
    tokens = torch.tensor([[7, 0, 9, 5, 0, 0], [3, 4, 5, 6, 8, 2]])  # an inner 0 is a token
    padded = torch.full((2, 12), 1)
    padded[0, :4], padded[1, :6] = tokens[0, :4], tokens[1]
    torch.testing.assert_close(encoder(tokens), theirs(input_ids=padded).pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "resnet."])
def test_resnet(prefix: str, tmp_path: Path) -> None:
    theirs: Any = transformers.ResNetModel(transformers.ResNetConfig(**RESNET))
    if prefix:
        theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET))
    randomised(theirs).save_pretrained(tmp_path)
    plain = theirs.resnet if prefix else theirs
    images = pictures((64, 32))
    same = load_encoder("resnet", tmp_path, last_stride=2, pool="avg").eval()
    expected = plain(images).last_hidden_state
    torch.testing.assert_close(same(images), expected.mean((2, 3)), rtol=1e-4, atol=1e-4)
    # At stride 1 the last map is twice as large each way, and its maximum at least that of the cells both have.
    fine = load_encoder("resnet", tmp_path).eval()
    maps: list[Tensor] = []
    fine.model.encoder.register_forward_hook(lambda _, __, output: maps.append(output.last_hidden_state))
    assert fine(images).shape == (3, 32)
    assert maps[0].shape[-2:] == (4, 2)
    assert expected.shape[-2:] == (2, 1)
    assert {m.stride for m in fine.model.encoder.stages[-1].modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}


def test_bert_textcnn(tmp_path: Path) -> None:
    theirs = randomised(transformers.BertModel(transformers.BertConfig(**BERT)))
    theirs.save_pretrained(tmp_path)
    encoder = load_encoder("bert_textcnn", tmp_path, width=16, output_width=24, max_length=10).eval()
    assert isinstance(encoder, BertTextCNN)
    tokens = torch.tensor([[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]])
    hidden = theirs(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    inner = encoder.model(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    torch.testing.assert_close(inner, hidden)
    # A caption's feature does not depend on how far its batch was padded.
    torch.testing.assert_close(encoder(tokens)[0], encoder(tokens[:1, :3])[0], rtol=1e-4, atol=1e-5)
    assert bool(encoder(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all())
    # Frozen: no gradient, no dropout in training; the head learns.
    encoder.train()
    assert not encoder.model.training
    assert encoder.head.training
    encoder(tokens).sum().backward()
    assert all(value.grad is None for value in encoder.model.parameters())
    assert all(value.grad is not None for value in encoder.blocks.parameters())
    open_one = BertTextCNN(BERT, frozen=False, width=16, output_width=24, max_length=10)
    open_one(tokens).sum().backward()
    assert any(value.grad is not None for value in open_one.model.parameters())


def test_positions() -> None:
    weight = torch.randn(1 + 16, 5)
    assert torch.equal(resize_positions(weight, (4, 4), 1), weight)
    tall = resize_positions(weight, (6, 2), 1)
    assert tall.shape == (13, 5)
    assert torch.equal(tall[0], weight[0])
    flat = torch.ones(9, 2)
    torch.testing.assert_close(resize_positions(flat, (5, 7)), torch.ones(35, 2))
    with pytest.raises(ValueError, match="square grid of patches, got 16 rows"):
        resize_positions(torch.randn(16, 5), (4, 4), 1)


def test_specs_rebuild_the_encoder(clip_folder: Path) -> None:
    encoder = load_encoder("clip_image", clip_folder, image_size=TALL).eval()
    again = build_encoder(encoder_spec(encoder)).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(pictures(TALL)), encoder(pictures(TALL)))


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (
            "clip-vit-b16",
            {"image": {"architecture": {**VISION, "projection_dim": 24}}, "text": {"architecture": CLIP_TEXT}},
        ),
        ("siglip-b16", {"image": {"architecture": VISION}, "text": {"architecture": {**TEXT, "projection_size": 32}}}),
        (
            "rn50-bert",
            {"image": {"architecture": RESNET}, "text": {"architecture": BERT, "width": 16, "output_width": 24}},
        ),
    ],
)
def test_presets_are_saved_and_loaded(preset: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = LCR2S.from_preset(
        preset,
        vocab_size=60,
        seed=4,
        width=20,
        image_size=TALL,
        max_length=12,
        image_encoder=options["image"],
        text_encoder=options["text"],
    ).eval()
    made.save_pretrained(tmp_path)
    loaded = LCR2S.from_pretrained(tmp_path)
    tokens = clip_tokens()
    images = torch.rand(2, 3, *TALL)
    assert made.encode_image(images).shape == (2, 20)
    assert torch.equal(loaded.encode_image(images), made.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), made.encode_text(tokens))
    teacher = made.make_teacher(num_heads=4)
    assert teacher.output_width == 20


def test_a_preset_with_weights(clip_folder: Path) -> None:
    model = LCR2S.from_preset(
        "clip-vit-b32", vocab_size=60, image_size=TALL, width=24, image_weights=clip_folder, text_weights=clip_folder
    ).eval()
    encoder = load_encoder("clip_image", clip_folder, image_size=TALL).eval()
    assert torch.equal(model.student.image_features(pictures(TALL)), encoder(pictures(TALL)))


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"!": 0, "<s>": 58, "</s>": 59, "a": 1, "man": 2, "in": 3, "red": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 58), ("</s>", 59)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = SavedTokenizer.from_pretrained(tmp_path, 5)
    assert tokenizer.encode(["a man", "a man in red red"]).tolist() == [[58, 1, 2, 59, 0], [58, 1, 2, 3, 59]]
    tokenizer.save(tmp_path / "saved.json")
    assert SavedTokenizer(tmp_path / "saved.json").encode(["a man"]).tolist() == [[58, 1, 2, 59]]
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        SavedTokenizer.from_pretrained(tmp_path / "none", 5)


def test_refusals(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size: expected two multiples of the patch size 8.*\(50, 16\)"):
        ClipImageEncoder(VISION, image_size=(50, 16))
    with pytest.raises(ValueError, match="images: expected 48 x 16 pixels, got 32 x 32"):
        ClipImageEncoder(VISION, image_size=TALL)(pictures((32, 32)))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(B, L <= 12\), got \(1, 13\)"):
        SiglipTextEncoder({**TEXT, "projection_size": 32})(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"kind: expected one of resnet.*got 'vgg'"):
        load_encoder("vgg", clip_folder)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_encoder("resnet", tmp_path)
    with pytest.raises(ValueError, match=r"last_stride: expected 1 or 2, got 3"):
        ResNetImageEncoder(RESNET, last_stride=3)
    wrong = ClipImageEncoder({**VISION, "intermediate_size": 40, "projection_dim": 24}, image_size=TALL)
    with pytest.raises(ValueError, match=r"do not fit ClipImageEncoder: .*fc1.* has shape \(48, 32\), expected \(40"):
        load_weights(wrong, clip_folder)
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load_encoder("clip_image", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_encoder("clip_image", tmp_path)
