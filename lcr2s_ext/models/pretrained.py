"""Encoders that are known from elsewhere: ResNet, BERT with a TextCNN, CLIP and SigLIP, built by transformers.

An encoder's ``config`` holds the whole architecture, so that a saved model needs nothing but its own folder.
:func:`load_encoder` reads architecture and weights from a local Hugging Face folder. Text encoders take tokens padded
with 0; what their own vocabulary pads with is put in inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lcr2s_ext.models.encoders import TokenFeatures, map_tokens, register_encoder

__all__ = [
    "BertTextCNN",
    "ClipImageEncoder",
    "ClipTextEncoder",
    "ResNetImageEncoder",
    "SiglipImageEncoder",
    "SiglipTextEncoder",
    "load_encoder",
    "load_weights",
    "read_architecture",
    "resize_positions",
]


def _architecture(config: Any, own: type) -> dict[str, Any]:
    """The entries of a transformers configuration that differ from its class's defaults."""
    default = own().to_dict()
    ignored = {"transformers_version", "architectures", "torch_dtype", "dtype", "_name_or_path", "model_type"}
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ignored and (key not in default or default[key] != value)
    }


def resize_positions(weight: Tensor, grid: tuple[int, int], extra: int = 0) -> Tensor:
    """Position embeddings of a square grid of patches, bicubically resized to another grid.

    Args:
        weight: ``(extra + n * n, width)``: ``extra`` rows (a class token) that are kept, then the grid row by row.
        grid: rows and columns of the new grid.
        extra: number of leading rows that are no patches.

    Returns:
        ``(extra + rows * columns, width)``.

    Raises:
        ValueError: the patches form no square.
    """
    patches = weight.shape[0] - extra
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"weight: expected {extra} rows and a square grid of patches, got {weight.shape[0]} rows")
    if (side, side) == tuple(grid):
        return weight
    square = rearrange(weight[extra:].float(), "(y x) d -> 1 d y x", y=side)
    resized = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([weight[:extra], rearrange(resized, "1 d y x -> (y x) d").to(weight.dtype)])


def _grid(image_size: Sequence[int], patch: int) -> tuple[int, int]:
    if len(image_size) != 2 or min(image_size) < patch or any(side % patch for side in image_size):
        raise ValueError(
            f"image_size: expected two multiples of the patch size {patch} (height, width), got {tuple(image_size)}"
        )
    return image_size[0] // patch, image_size[1] // patch


def _check_images(images: Tensor, image_size: tuple[int, int]) -> None:
    if tuple(images.shape[-2:]) != image_size:
        raise ValueError(
            f"images: expected {image_size[0]} x {image_size[1]} pixels, got {images.shape[-2]} x {images.shape[-1]}"
        )


def _check_tokens(tokens: Tensor, max_length: int) -> None:
    if tokens.dim() != 2 or tokens.shape[1] > max_length:
        raise ValueError(f"tokens: expected shape (B, L <= {max_length}), got {tuple(tokens.shape)}")


class _Positions(nn.Module):
    """Patch embeddings of a rectangular image: a convolution, an optional class token, a position for each of them."""

    def __init__(self, old: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.patch_embedding = old.patch_embedding
        self.has_class = hasattr(old, "class_embedding")
        if self.has_class:
            self.class_embedding = old.class_embedding
        positions = grid[0] * grid[1] + self.has_class
        width = old.position_embedding.weight.shape[1]
        self.position_embedding = nn.Embedding(positions, width)
        with torch.no_grad():
            self.position_embedding.weight.copy_(
                resize_positions(old.position_embedding.weight, grid, int(self.has_class))
            )

    def forward(self, pixel_values: Tensor, **_: Any) -> Tensor:
        patches = rearrange(self.patch_embedding(pixel_values), "b d y x -> b (y x) d")
        if self.has_class:
            patches = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1)
        return patches + self.position_embedding.weight


def _replace_positions(model: nn.Module, grid: tuple[int, int]) -> None:
    """Put :class:`_Positions` where transformers keeps the embeddings, which its releases name differently."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "patch_embedding") and hasattr(module, "position_embedding"):
            model.set_submodule(name, _Positions(module, grid))
            return
    raise RuntimeError(f"{type(model).__name__} of this transformers has no patch and position embeddings")


@register_encoder("resnet")
class ResNetImageEncoder(nn.Module):
    """ResNet with its last stage at full resolution and a global pool (TIPCB's image encoder).

    Args:
        architecture: entries of transformers' ``ResNetConfig``; none: ResNet-50.
        last_stride: stride of the last stage: 1, or 2 as in classification.
        pool: ``"max"`` or ``"avg"`` over the last map.
    """

    def __init__(
        self, architecture: Mapping[str, Any] | None = None, *, last_stride: int = 1, pool: str = "max"
    ) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        if last_stride not in (1, 2):
            raise ValueError(f"last_stride: expected 1 or 2, got {last_stride!r}")
        if pool not in ("max", "avg"):
            raise ValueError(f"pool: expected 'max' or 'avg', got {pool!r}")
        self.config = {"architecture": dict(architecture or {}), "last_stride": last_stride, "pool": pool}
        model: Any = ResNetModel(ResNetConfig(**self.config["architecture"]))  # type: ignore[arg-type]
        model.pooler = nn.Identity()
        self.model = model
        self.output_width = int(model.config.hidden_sizes[-1])
        self.pool = pool
        if last_stride == 1:
            for module in model.encoder.stages[-1].modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised floats to ``(B, output_width)``."""
        return self._pool(self.model(images).last_hidden_state)

    def _pool(self, maps: Tensor) -> Tensor:
        return maps.amax((2, 3)) if self.pool == "max" else maps.mean((2, 3))

    @property
    def token_width(self) -> int:
        """Channels of the last map."""
        return self.output_width

    def token_features(self, images: Tensor) -> TokenFeatures:
        """The same with the cells of the last map."""
        maps = self.model(images).last_hidden_state
        return TokenFeatures(self._pool(maps), *map_tokens(maps))


@register_encoder("clip_image")
class ClipImageEncoder(nn.Module):
    """CLIP's vision transformer with its projection, on images of any size that is a multiple of the patch.

    Args:
        architecture: entries of transformers' ``CLIPVisionConfig`` (its ``image_size`` is the pretrained square);
            none: ViT-B/32.
        image_size: height and width in pixels; the position grid is resized to it once, at construction.
    """

    def __init__(
        self, architecture: Mapping[str, Any] | None = None, *, image_size: Sequence[int] = (384, 128)
    ) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.config = {"architecture": dict(architecture or {}), "image_size": list(image_size)}
        vision: Any = CLIPVisionConfig(**self.config["architecture"])  # type: ignore[arg-type]
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.model = CLIPVisionModelWithProjection(vision)
        _replace_positions(self.model, _grid(self.image_size, vision.patch_size))
        self.output_width = self.token_width = int(vision.projection_dim)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised floats to ``(B, projection_dim)``."""
        _check_images(images, self.image_size)
        return self.model(pixel_values=images).image_embeds

    def token_features(self, images: Tensor) -> TokenFeatures:
        """The same with the class token and the patches, normalised and projected as the class token is."""
        _check_images(images, self.image_size)
        made = self.model(pixel_values=images)
        model: Any = self.model
        norm = next(module for name, module in model.named_modules() if name.endswith("post_layernorm"))
        return _with_mask(made.image_embeds, model.visual_projection(norm(made.last_hidden_state)))


@register_encoder("siglip_image")
class SiglipImageEncoder(nn.Module):
    """SigLIP's vision transformer with its attention pool, on images of any size that is a multiple of the patch.

    Args:
        architecture: entries of transformers' ``SiglipVisionConfig``; none: ViT-B/16.
        image_size: height and width in pixels; the position grid is resized to it once, at construction.
    """

    def __init__(
        self, architecture: Mapping[str, Any] | None = None, *, image_size: Sequence[int] = (384, 128)
    ) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.config = {"architecture": dict(architecture or {}), "image_size": list(image_size)}
        vision: Any = SiglipVisionConfig(**self.config["architecture"])  # type: ignore[arg-type]
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.model = SiglipVisionModel(vision)
        _replace_positions(self.model, _grid(self.image_size, vision.patch_size))
        self.output_width = self.token_width = int(vision.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised floats to ``(B, hidden_size)``."""
        _check_images(images, self.image_size)
        return self.model(pixel_values=images).pooler_output

    def token_features(self, images: Tensor) -> TokenFeatures:
        """The same with the patches that the attention pool reads."""
        _check_images(images, self.image_size)
        made = self.model(pixel_values=images)
        return _with_mask(made.pooler_output, made.last_hidden_state)


@register_encoder("clip_text")
class ClipTextEncoder(nn.Module):
    """CLIP's causal text transformer with its projection, read at the first end-of-text token.

    Args:
        architecture: entries of transformers' ``CLIPTextConfig``; none: that of ViT-B/32.
    """

    def __init__(self, architecture: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.config = {"architecture": dict(architecture or {})}
        text: Any = CLIPTextConfig(**self.config["architecture"])
        self.model = CLIPTextModelWithProjection(text)
        self.output_width = self.token_width = int(text.projection_dim)
        self.vocab_size = int(text.vocab_size)
        self.max_length = int(text.max_position_embeddings)

    def backbone(self, tokens: Tensor) -> Tensor:
        """What the pretrained part, here all of it, makes of ``(B, L)`` tokens."""
        _check_tokens(tokens, self.max_length)
        return self.model(input_ids=tokens).text_embeds

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``(B, L)`` int64 tokens to ``(B, projection_dim)``; what follows the end of a text is never read.

        ``hidden``, the backbone's output for these tokens, saves its computation.
        """
        return self.backbone(tokens) if hidden is None else hidden

    def token_features(self, tokens: Tensor) -> TokenFeatures:
        """The same with all tokens, projected as the end-of-text token is."""
        _check_tokens(tokens, self.max_length)
        made = self.model(input_ids=tokens)
        model: Any = self.model
        return TokenFeatures(made.text_embeds, model.text_projection(made.last_hidden_state), _text_mask(tokens))


@register_encoder("siglip_text")
class SiglipTextEncoder(nn.Module):
    """SigLIP's text transformer, which reads its padding as well and is read at the last position.

    Args:
        architecture: entries of transformers' ``SiglipTextConfig``; none: that of ViT-B/16.
        pad_id: token that SigLIP's vocabulary pads with, in place of 0.
    """

    def __init__(self, architecture: Mapping[str, Any] | None = None, *, pad_id: int = 1) -> None:
        super().__init__()
        from transformers import SiglipTextConfig, SiglipTextModel

        self.config = {"architecture": dict(architecture or {}), "pad_id": pad_id}
        text: Any = SiglipTextConfig(**self.config["architecture"])  # type: ignore[arg-type]
        self.model = SiglipTextModel(text)
        self.output_width = int(text.projection_size)
        self.token_width = int(text.hidden_size)
        self.vocab_size = int(text.vocab_size)
        self.max_length = int(text.max_position_embeddings)
        self.pad_id = pad_id

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``(B, L)`` int64 tokens to ``(B, projection_size)``; rows are padded to the full length, as in training.

        ``hidden``, the backbone's output for these tokens, saves its computation.
        """
        return self.backbone(tokens) if hidden is None else hidden

    def backbone(self, tokens: Tensor) -> Tensor:
        """What the pretrained part, here all of it, makes of ``(B, L)`` tokens."""
        return self.model(input_ids=self._padded(tokens)).pooler_output

    def token_features(self, tokens: Tensor) -> TokenFeatures:
        """The same with all tokens, before the projection."""
        made = self.model(input_ids=self._padded(tokens))
        length = tokens.shape[1]
        return TokenFeatures(made.pooler_output, made.last_hidden_state[:, :length], _text_mask(tokens))

    def _padded(self, tokens: Tensor) -> Tensor:
        _check_tokens(tokens, self.max_length)
        tokens = F.pad(tokens, (0, self.max_length - tokens.shape[1]))
        # Rows end where the padding begins: a 0 before that is a token like any other.
        length = ((tokens != 0).long() * torch.arange(1, self.max_length + 1, device=tokens.device)).amax(1)
        beyond = torch.arange(self.max_length, device=tokens.device) >= length[:, None]
        return tokens.masked_fill(beyond, self.pad_id)


def _with_mask(pooled: Tensor, tokens: Tensor) -> TokenFeatures:
    """Where no token is padding."""
    return TokenFeatures(pooled, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))


def _text_mask(tokens: Tensor) -> Tensor:
    """Which tokens are no padding; a row of nothing but padding reads its first position."""
    mask = tokens != 0
    return torch.cat([mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], 1)


class _TextBottleneck(nn.Module):
    """Residual bottleneck of 1 x 1, 1 x 3 and 1 x 1 convolutions along the tokens."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        inner = width_out // 4
        self.layers = nn.Sequential(
            nn.Conv1d(width_in, inner, 1, bias=False),
            nn.BatchNorm1d(inner),
            nn.ReLU(inplace=True),
            nn.Conv1d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm1d(inner),
            nn.ReLU(inplace=True),
            nn.Conv1d(inner, width_out, 1, bias=False),
            nn.BatchNorm1d(width_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width_out:
            self.shortcut = nn.Sequential(nn.Conv1d(width_in, width_out, 1, bias=False), nn.BatchNorm1d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


@register_encoder("bert_textcnn")
class BertTextCNN(nn.Module):
    """BERT, frozen by default, and a convolutional network over its tokens (TIPCB's text encoder, arXiv 2105.11628).

    Args:
        architecture: entries of transformers' ``BertConfig``; none: BERT-base.
        frozen: BERT without gradients and in eval mode, so that its dropout is off.
        width: channels of the first convolution.
        output_width: channels of the residual blocks, and the feature's width.
        blocks: number of residual blocks.
        max_length: longest caption in tokens.
    """

    def __init__(
        self,
        architecture: Mapping[str, Any] | None = None,
        *,
        frozen: bool = True,
        width: int = 1024,
        output_width: int = 2048,
        blocks: int = 3,
        max_length: int = 64,
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        if output_width % 4:
            raise ValueError(f"output_width: expected a multiple of 4, got {output_width}")
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        self.config = {
            "architecture": dict(architecture or {}),
            "frozen": frozen,
            "width": width,
            "output_width": output_width,
            "blocks": blocks,
            "max_length": max_length,
        }
        bert: Any = BertConfig(**self.config["architecture"])  # type: ignore[arg-type]
        if max_length > bert.max_position_embeddings:
            raise ValueError(f"max_length: expected at most {bert.max_position_embeddings}, got {max_length}")
        self.model = BertModel(bert, add_pooling_layer=False)
        self.frozen = frozen
        if frozen:
            self.model.requires_grad_(False)
            self.model.eval()
        self.vocab_size = int(bert.vocab_size)
        self.max_length = max_length
        self.output_width = self.token_width = output_width
        self.head = nn.Sequential(
            nn.Conv1d(bert.hidden_size, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            _TextBottleneck(width, output_width),
            *(_TextBottleneck(output_width, output_width) for _ in range(blocks - 1)),
        )

    def train(self, mode: bool = True) -> BertTextCNN:
        """As ``nn.Module.train``; a frozen BERT stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def backbone(self, tokens: Tensor) -> Tensor:
        """BERT's last hidden state ``(B, L, hidden_size)`` of ``(B, L)`` tokens, without gradient where frozen."""
        _check_tokens(tokens, self.max_length)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model(input_ids=tokens, attention_mask=_text_mask(tokens).long()).last_hidden_state

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``(B, L)`` int64 tokens, 0 is padding, to ``(B, output_width)``.

        ``hidden``, the backbone's output for these tokens, saves its computation.
        """
        return self._encode(tokens, hidden).pooled

    def token_features(self, tokens: Tensor) -> TokenFeatures:
        """The same with the tokens that the maximum is taken over."""
        return self._encode(tokens, None)

    def _encode(self, tokens: Tensor, hidden: Tensor | None) -> TokenFeatures:
        if hidden is None:
            hidden = self.backbone(tokens)
        kept = _text_mask(tokens)[:, None]
        x = self.head(hidden.transpose(1, 2)) * kept
        for block in self.blocks:
            # Padding is zeroed: what a caption's tokens see does not depend on the length of other captions.
            x = block(x) * kept
        pooled = x.masked_fill(~kept, torch.finfo(x.dtype).min).amax(2)
        return TokenFeatures(pooled, x.transpose(1, 2), kept[:, 0])


_KINDS: dict[str, tuple[type[nn.Module], str, str | None]] = {
    # name: (encoder, transformers' configuration, section of a two-tower folder's config.json)
    "resnet": (ResNetImageEncoder, "ResNetConfig", None),
    "bert_textcnn": (BertTextCNN, "BertConfig", None),
    "clip_image": (ClipImageEncoder, "CLIPVisionConfig", "vision_config"),
    "clip_text": (ClipTextEncoder, "CLIPTextConfig", "text_config"),
    "siglip_image": (SiglipImageEncoder, "SiglipVisionConfig", "vision_config"),
    "siglip_text": (SiglipTextEncoder, "SiglipTextConfig", "text_config"),
}


def read_architecture(kind: str, folder: str | Path) -> dict[str, Any]:
    """The ``architecture`` of an encoder of this kind, from the ``config.json`` of a local Hugging Face folder.

    Raises:
        ValueError: an unknown kind, or a file that is no model configuration.
        FileNotFoundError: there is no ``config.json``.
    """
    import transformers

    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    _, config_name, section = _KINDS[kind]
    values = _read_config(Path(folder).expanduser())
    if section is not None and section in values:
        # A folder of both towers says at its top how wide CLIP's shared space is.
        shared = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
        values = {**values[section], **(shared if kind.startswith("clip") else {})}
    config_class = getattr(transformers, config_name)
    return _architecture(config_class.from_dict(values), config_class)


def load_weights(encoder: nn.Module, folder: str | Path) -> None:
    """Fill the pretrained part of an encoder (``encoder.model``) from a local Hugging Face folder.

    The position grid of a vision transformer is resized to the encoder's image size.

    Raises:
        ValueError: weights that do not fit; the message names the first differences.
        FileNotFoundError: a file is missing.
    """
    if not any(isinstance(encoder, cls) for cls, _, _ in _KINDS.values()):
        raise ValueError(f"encoder: {type(encoder).__name__} has no pretrained weights to load")
    folder = Path(folder).expanduser()
    _load(encoder, _read_weights(folder), folder)


def load_encoder(kind: str, folder: str | Path, **options: Any) -> nn.Module:
    """An encoder with the architecture and weights of a local Hugging Face folder; nothing is downloaded.

    Args:
        kind: "resnet", "bert_textcnn", "clip_image", "clip_text", "siglip_image" or "siglip_text".
        folder: holds ``config.json`` and ``model.safetensors`` (or its shards) of that model, for the two towers of
            CLIP and SigLIP the folder of both.
        **options: of the encoder's class, such as ``image_size``; new layers (the TextCNN) get fresh weights.

    Raises:
        ValueError: an unknown kind, or weights that do not fit; the message names the first differences.
        FileNotFoundError: a file is missing.
    """
    architecture = read_architecture(kind, folder)
    encoder = _KINDS[kind][0](architecture, **options)
    load_weights(encoder, folder)
    return encoder


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"folder: {folder} holds no config.json; a Hugging Face model folder is expected")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, got {type(values).__name__}")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    state: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"folder: {folder} holds no {name}; weights are read from safetensors files only "
                "(transformers' save_pretrained writes them)"
            )
        try:
            state |= load_file(str(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: damaged or not a safetensors file ({error})") from error
    return state


def _load(encoder: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Fill the pretrained part, ``encoder.model``; prefixes of wrapping models are tried one after another."""
    model: nn.Module = encoder.model  # type: ignore[assignment]
    expected = model.state_dict()
    prefixes = ("", "vision_model.", "text_model.", "bert.", "resnet.")
    best = max(prefixes, key=lambda prefix: sum(prefix + name in state for name in expected))
    found = {name: state[best + name] for name in expected if best + name in state}
    for name, value in found.items():
        wanted = expected[name]
        if (
            name.endswith("position_embedding.weight")
            and value.shape != wanted.shape
            and hasattr(encoder, "image_size")
        ):
            embeddings = next(module for module in model.modules() if isinstance(module, _Positions))
            patch = embeddings.patch_embedding.kernel_size[0]
            grid = _grid(encoder.image_size, patch)  # type: ignore[arg-type]
            found[name] = resize_positions(value, grid, int(embeddings.has_class))
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
        for name, value in found.items()
        if value.shape != expected[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder}: weights do not fit {type(encoder).__name__}: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(found)
