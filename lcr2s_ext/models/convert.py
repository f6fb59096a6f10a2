"""CLIP's weights as OpenAI and open_clip distribute them, rewritten as a Hugging Face folder.

Both keep one state dict of the original implementation's names, OpenAI's inside a TorchScript archive. The result is
read by :func:`lcr2s_ext.models.load_encoder`. Conversion ends with a parity check: the original architecture, written
out here from its definition, and the converted model must give the same features.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["convert_clip"]

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
# Buffers of OpenAI's archive that are no weights.
_IGNORED = ("input_resolution", "context_length", "vocab_size")


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"file: {file} does not exist")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(str(file))
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as first:  # a TorchScript archive is refused with various errors
            try:
                state = torch.jit.load(str(file), map_location="cpu").state_dict()
            except RuntimeError:
                raise ValueError(f"file: {file} is neither a state dict nor a TorchScript archive ({first})") from first
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"file: {file} holds no state dict of tensors")
    return {name.removeprefix("module."): value.float() for name, value in state.items() if name not in _IGNORED}


def _rename(name: str) -> str | None:
    for old, new in _SINGLE.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None or block[3] not in _BLOCK:
        return None
    tower = "vision_model" if block[1] else "text_model"
    return f"{tower}.encoder.layers.{block[2]}.{_BLOCK[block[3]]}.{block[4]}"


def _converted(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        fused = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if fused:
            tower = "vision_model" if fused[1] else "text_model"
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                result[f"{tower}.encoder.layers.{fused[2]}.self_attn.{part}_proj.{fused[3]}"] = rows.contiguous()
        elif name in ("visual.proj", "text_projection"):
            target = "visual_projection.weight" if name == "visual.proj" else "text_projection.weight"
            result[target] = value.T.contiguous()
        elif (target_name := _rename(name)) is not None:
            result[target_name] = value.contiguous()
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"file: {file} is no CLIP vision transformer of OpenAI's or open_clip's naming; "
            f"unknown: {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}"
        )
    return result


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    numbers = {int(match[1]) for name in state if (match := re.match(rf"{re.escape(prefix)}resblocks\.(\d+)\.", name))}
    return len(numbers)


def _config(state: dict[str, Tensor], activation: str, file: Path) -> dict[str, Any]:
    needed = ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight", "text_projection")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"file: {file} is no CLIP vision transformer: it has no {', '.join(missing)}")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text_width, dimension = state["text_projection"].shape
    vocabulary = state["token_embedding.weight"].shape[0]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": dimension,
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _layers(state, "visual.transformer."),
            # The original has heads of 64 everywhere.
            "num_attention_heads": max(1, width // 64),
            "image_size": grid * patch,
            "patch_size": patch,
            "hidden_act": activation,
            "projection_dim": dimension,
        },
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _layers(state, "transformer."),
            "num_attention_heads": max(1, text_width // 64),
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "hidden_act": activation,
            "projection_dim": dimension,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
    }


def _transformer(state: dict[str, Tensor], prefix: str, x: Tensor, heads: int, activation: str, causal: bool) -> Tensor:
    def part(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"]

    width = x.shape[-1]
    for number in range(_layers(state, prefix)):
        block = f"{prefix}resblocks.{number}"
        normed = F.layer_norm(x, (width,), *part("ln_1"))
        fused = F.linear(normed, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, *part("attn.out_proj"))
        hidden = F.linear(F.layer_norm(x, (width,), *part("ln_2")), *part("mlp.c_fc"))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if activation == "quick_gelu" else F.gelu(hidden)
        x = x + F.linear(hidden, *part("mlp.c_proj"))
    return x


def _original(state: dict[str, Tensor], images: Tensor, tokens: Tensor, config: dict[str, Any]) -> list[Tensor]:
    """CLIP as its authors define it (Radford et al., arXiv 2103.00020): features of images and of tokens."""
    vision, text = config["vision_config"], config["text_config"]
    x = F.conv2d(images, state["visual.conv1.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    width = (x.shape[-1],)
    x = F.layer_norm(x, width, state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = _transformer(state, "visual.transformer.", x, vision["num_attention_heads"], vision["hidden_act"], causal=False)
    x = F.layer_norm(x[:, 0], width, state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    y = _transformer(state, "transformer.", y, text["num_attention_heads"], text["hidden_act"], causal=True)
    y = F.layer_norm(y, (y.shape[-1],), state["ln_final.weight"], state["ln_final.bias"])
    y = y[torch.arange(len(y)), tokens.argmax(1)]
    return [x @ state["visual.proj"], y @ state["text_projection"]]


def convert_clip(file: str | Path, out: str | Path, *, activation: str = "quick_gelu") -> float:
    """Writes a CLIP checkpoint of OpenAI's or open_clip's naming as a Hugging Face folder, and checks it.

    Args:
        file: OpenAI's TorchScript archive (``ViT-B-16.pt``), or a state dict as ``.pt``, ``.bin`` or ``.safetensors``.
        out: folder for ``config.json`` and ``model.safetensors``; made where it is missing. The tokenizer is CLIP's
            own and not part of a checkpoint: copy a ``tokenizer.json`` beside them.
        activation: "quick_gelu" (OpenAI's weights, open_clip's models named quickgelu) or "gelu" (open_clip's others).
            A checkpoint does not say which it was trained with.

    Returns:
        The largest difference between features of the original and of the converted model on random inputs, relative
        to the features' largest magnitude.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, or the activation is another.
        FileExistsError: ``out`` already holds a model.
        RuntimeError: the features differ; nothing is left in ``out``.
    """
    from safetensors.torch import save_file

    from lcr2s_ext.models.pretrained import load_encoder

    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"activation: expected 'quick_gelu' or 'gelu', got {activation!r}")
    file, out = Path(file).expanduser(), Path(out).expanduser()
    if (out / "config.json").exists() or (out / "model.safetensors").exists():
        raise FileExistsError(f"out: {out} already holds a model")
    state = _read(file)
    config = _config(state, activation, file)
    converted = _converted(state, file)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "config.json", out / "model.safetensors"]
    try:
        written[0].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(converted, str(written[1]))
        generator = torch.Generator().manual_seed(0)
        size = config["vision_config"]["image_size"]
        images = torch.randn(2, 3, size, size, generator=generator)
        length, vocabulary = config["text_config"]["max_position_embeddings"], config["text_config"]["vocab_size"]
        tokens = torch.randint(1, vocabulary - 2, (2, length), generator=generator)
        tokens[:, length // 2] = vocabulary - 1
        with torch.no_grad():
            expected = _original(state, images, tokens, config)
            found = [
                load_encoder("clip_image", out, image_size=(size, size)).eval()(images),
                load_encoder("clip_text", out).eval()(tokens),
            ]
        difference = max(
            float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
            for ours, theirs in zip(found, expected, strict=True)
        )
        if not difference < 1e-4:
            raise RuntimeError(f"the converted model's features differ from the original's by {difference:.1e}")
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return difference
