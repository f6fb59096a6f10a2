"""CLIP checkpoints of OpenAI's and open_clip's naming, made here in their formats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcr2s_ext.cli import main
from lcr2s_ext.models import convert as module
from lcr2s_ext.models import load_encoder
from lcr2s_ext.models.convert import convert_clip


def block(state: dict[str, Tensor], prefix: str, width: int, random: Any) -> None:
    state[f"{prefix}.attn.in_proj_weight"] = random(3 * width, width)
    state[f"{prefix}.attn.in_proj_bias"] = random(3 * width)
    for name, rows, columns in (("attn.out_proj", width, width), ("mlp.c_fc", 96, width), ("mlp.c_proj", width, 96)):
        state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"] = random(rows, columns), random(rows)
    for name in ("ln_1", "ln_2"):
        state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"] = 1 + random(width), random(width)


def checkpoint() -> dict[str, Tensor]:
    """Two layers, vision width 128 (two heads), text width 64 (one head), patch 8 on 24 x 24."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 6

    state = {
        "visual.class_embedding": random(128),
        "visual.positional_embedding": random(10, 128),
        "visual.conv1.weight": random(128, 3, 8, 8),
        "visual.proj": random(128, 40),
        "token_embedding.weight": random(50, 64),
        "positional_embedding": random(12, 64),
        "text_projection": random(64, 40),
        "logit_scale": torch.tensor(4.6),
    }
    for name, width in (("visual.ln_pre", 128), ("visual.ln_post", 128), ("ln_final", 64)):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(width), random(width)
    for layer in range(2):
        block(state, f"visual.transformer.resblocks.{layer}", 128, random)
        block(state, f"transformer.resblocks.{layer}", 64, random)
    return state


@pytest.mark.parametrize("form", ["pt", "wrapped", "safetensors"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_every_form(form: str, activation: str, tmp_path: Path) -> None:
    state = checkpoint()
    file = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(state, str(file))
    elif form == "pt":
        torch.save({**state, "context_length": torch.tensor(12)}, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    assert convert_clip(file, tmp_path / "out", activation=activation) < 1e-5
    encoder = load_encoder("clip_image", tmp_path / "out", image_size=(48, 16))
    assert encoder(torch.zeros(1, 3, 48, 16)).shape == (1, 40)
    assert encoder.model.config.hidden_act == activation
    found = load_file(str(tmp_path / "out" / "model.safetensors"))
    key = found["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(key, state["transformer.resblocks.1.attn.in_proj_weight"][64:128])
    with pytest.raises(FileExistsError, match="already holds a model"):
        convert_clip(file, tmp_path / "out")


class Archive(nn.Module):
    """Holds half-precision weights under the original's names, as OpenAI's archive does."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            home: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home._modules[part]  # type: ignore[assignment]
            home.register_parameter(last, nn.Parameter(value.half(), requires_grad=False))
        self.register_buffer("input_resolution", torch.tensor(24))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_torchscript_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.jit.script(Archive(checkpoint())).save(str(tmp_path / "ViT.pt"))
    arguments = ["weights", "convert-clip", str(tmp_path / "ViT.pt"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "features differ from the original's by" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_clip(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(ValueError, match="neither a state dict nor a TorchScript archive"):
        convert_clip(tmp_path / "text.pt", tmp_path / "out")
    torch.save({"layer1.weight": torch.ones(2)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"it has no visual\.conv1\.weight"):
        convert_clip(tmp_path / "resnet.pt", tmp_path / "out")
    torch.save({**checkpoint(), "visual.attnpool.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"unknown: visual\.attnpool\.weight"):
        convert_clip(tmp_path / "other.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="activation: expected 'quick_gelu' or 'gelu', got 'relu'"):
        convert_clip(tmp_path / "other.pt", tmp_path / "out", activation="relu")


def test_the_parity_check_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(checkpoint(), tmp_path / "clip.pt")
    swapped = {**module._BLOCK, "ln_1": "layer_norm2", "ln_2": "layer_norm1"}
    monkeypatch.setattr(module, "_BLOCK", swapped)
    with pytest.raises(RuntimeError, match="differ from the original's by"):
        convert_clip(tmp_path / "clip.pt", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
