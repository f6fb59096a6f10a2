"""Encoders of the tiny preset, and the registry that lets a saved model name its encoders.

Any ``nn.Module`` with an integer attribute ``output_width`` is an encoder: an image encoder maps ``(B, 3, H, W)``
floats to
``(B, output_width)``, a text encoder maps ``(B, L)`` int64 tokens (0 is padding) to ``(B, output_width)``. To be
saved by
``LCR2S.save_pretrained`` its class is registered by :func:`register_encoder` and has a JSON-able ``config`` of its
keyword arguments.

An encoder may have ``token_features``, same arguments, to :class:`TokenFeatures`, and an int ``token_width``: the
masked language head reads them. A text encoder then states its ``vocab_size`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "TinyImageEncoder",
    "TinyTextEncoder",
    "TokenFeatures",
    "build_encoder",
    "encoder_spec",
    "register_encoder",
]

_ENCODERS: dict[str, type[nn.Module]] = {}


class TokenFeatures(NamedTuple):
    """An encoder's feature and what it is made of.

    Attributes:
        pooled: ``(B, output_width)``, what the encoder's ``forward`` gives.
        tokens: ``(B, n, token_width)``: patches or cells of an image, tokens of a caption; ``n`` may be less than the
            length of the input where the rest is padding in every row.
        mask: bool ``(B, n)``, False for padding.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


def map_tokens(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of ``(B, C, y, x)`` feature maps, a token a cell."""
    tokens = rearrange(maps, "b c y x -> b (y x) c")
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def register_encoder(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: make an encoder known under ``name`` in saved configurations."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if _ENCODERS.get(name, cls) is not cls:
            raise ValueError(f"name: encoder {name!r} is already registered as {_ENCODERS[name].__name__}")
        _ENCODERS[name] = cls
        return cls

    return add


def build_encoder(spec: Mapping[str, Any]) -> nn.Module:
    """Encoder from ``{"type": registered name, **keyword arguments}``."""
    arguments = dict(spec)
    name = arguments.pop("type", None)
    if name not in _ENCODERS:
        known = ", ".join(sorted(_ENCODERS))
        raise ValueError(
            f"type: no encoder is registered as {name!r} (known: {known}); import the module that defines it"
        )
    return _ENCODERS[name](**arguments)


def encoder_spec(encoder: nn.Module) -> dict[str, Any]:
    """The inverse of :func:`build_encoder`; ValueError where the encoder's class is not registered."""
    for name, cls in _ENCODERS.items():
        if type(encoder) is cls:
            config: dict[str, Any] = dict(encoder.config)  # type: ignore[arg-type]
            return {"type": name, **config}
    raise ValueError(
        f"encoder: {type(encoder).__name__} cannot be saved by name; decorate its class with "
        "lcr2s_ext.models.register_encoder and give it a `config` of its keyword arguments"
    )


class _Dropout(nn.Dropout):
    """``nn.Dropout`` that on a CPU takes eight decisions from each 64-bit random number: the random numbers are most
    of what dropout costs there: a sixth of a training step of the tiny encoders. The probability is rounded to 1/256.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(256 * self.p)
        eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not self.training or not eager_cpu or not 0 < dropped < 256:
            return super().forward(x)
        count = x.numel()
        bits = torch.empty((count + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = bits.view(torch.uint8)[:count].view(x.shape) >= dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - dropped))


@register_encoder("tiny_image")
class TinyImageEncoder(nn.Module):
    """Small convolutional encoder for pedestrian crops, trained from scratch.

    A patch convolution, then 3x3 convolutions with batch normalisation, then the average over the cells of a
    ``grid``: where
    on the body a colour is, is what captions talk about, so the cells are kept apart. A linear map of all cells
    gives the feature.

    Args:
        output_width: ``d``.
        widths: channels after the patch convolution and after each 3x3 convolution.
        strides: of each 3x3 convolution.
        patch: side and stride of the patch convolution.
        grid: rows and columns of the pooled map.
        dropout: on the pooled cells.
    """

    def __init__(
        self,
        output_width: int = 128,
        *,
        widths: Sequence[int] = (24, 32, 64),
        strides: Sequence[int] = (1, 2),
        patch: int = 4,
        grid: Sequence[int] = (8, 4),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(strides) != len(widths) - 1:
            raise ValueError(f"strides: expected {len(widths) - 1} values, one a 3x3 convolution, got {len(strides)}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid: expected two positive ints (rows, columns), got {grid!r}")
        self.config = {
            "output_width": output_width,
            "widths": list(widths),
            "strides": list(strides),
            "patch": patch,
            "grid": list(grid),
            "dropout": dropout,
        }
        self.output_width = output_width
        self.grid = (int(grid[0]), int(grid[1]))
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], patch, patch, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        for width_in, width_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(inplace=True),
            ]
        self.features = nn.Sequential(*layers)
        self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dropout = _Dropout(dropout)
        self.token_width = int(widths[-1])
        self.projection = nn.Linear(self.grid[0] * self.grid[1] * widths[-1], output_width)

    def _maps(self, images: Tensor) -> Tensor:
        maps = self.features(images.contiguous(memory_format=torch.channels_last))
        return maps if maps.shape[-2:] == self.grid else F.adaptive_avg_pool2d(maps, self.grid)

    def _pool(self, maps: Tensor) -> Tensor:
        return self.projection(self.dropout(rearrange(maps, "b c y x -> b (y x c)")))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised floats to ``(B, output_width)``; any H and W of at least one patch."""
        return self._pool(self._maps(images))

    def token_features(self, images: Tensor) -> TokenFeatures:
        """The same with the cells of the grid."""
        maps = self._maps(images)
        return TokenFeatures(self._pool(maps), *map_tokens(maps))


class _WindowBlock(nn.Module):
    """Pre-norm transformer block whose feed-forward layer reads a window of tokens; ``(B, L, d)`` to the same.

    A caption says "red" next to "jacket": a feed-forward layer over three tokens binds the two at once, which
    self-attention over learnt positions has to find out from few captions. Self-attention over the whole caption
    follows; it starts from zero.
    """

    def __init__(self, width: int, heads: int, hidden: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.window_norm = nn.LayerNorm(width)
        self.hidden_in = nn.Linear(window * width, hidden)
        self.hidden_out = nn.Linear(hidden, width)
        self.dropout = _Dropout(dropout)
        if heads:
            # Half the width inside: self-attention is the dearer half of the block on a CPU.
            inner = width // 2
            self.attention_norm = nn.LayerNorm(width)
            self.query_key_value = nn.Linear(width, 3 * inner)
            self.attention_output = nn.Linear(inner, width)
            nn.init.zeros_(self.attention_output.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length, side = x.shape[1], self.window // 2
        # Padding is zeroed: what a caption's last token sees does not depend on the length of other captions.
        rows = F.pad(self.window_norm(x) * mask[..., None], (0, 0, side, side))
        neighbours = torch.cat([rows[:, shift : shift + length] for shift in range(self.window)], 2)
        x = x + self.dropout(self.hidden_out(F.relu(self.hidden_in(neighbours))))
        if not self.heads:
            return x
        q, k, v = rearrange(
            self.query_key_value(self.attention_norm(x)), "b l (three h e) -> three b h l e", three=3, h=self.heads
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=rearrange(mask, "b l -> b 1 1 l"))
        return x + self.dropout(self.attention_output(rearrange(attended, "b h l e -> b l (h e)")))


@register_encoder("tiny_text")
class TinyTextEncoder(nn.Module):
    """Small transformer over caption tokens, trained from scratch; pooled over the tokens, then a linear map.

    Args:
        vocab_size: number of token ids; id 0 is padding.
        output_width: ``d``.
        max_length: longest caption in tokens; longer rows are refused.
        width: width of the transformer.
        layers: number of blocks.
        heads: attention heads, of ``width / 2`` together; 0 leaves self-attention out.
        hidden: width of the feed-forward layers.
        window: tokens that a feed-forward layer reads, odd; 1 is the ordinary transformer.
        pool: ``"max"`` or ``"mean"`` over the tokens.
        dropout: on the embeddings and on each block's outputs.
    """

    def __init__(
        self,
        vocab_size: int,
        output_width: int = 128,
        *,
        max_length: int = 64,
        width: int = 64,
        layers: int = 1,
        heads: int = 1,
        hidden: int = 128,
        window: int = 3,
        pool: str = "max",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if vocab_size < 2:
            raise ValueError(f"vocab_size: expected at least 2 (padding and one token), got {vocab_size}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window: expected a positive odd int, got {window}")
        if heads < 0 or (heads and (width // 2) % heads):
            raise ValueError(f"heads: expected 0 or a divisor of half the width {width}, got {heads}")
        if pool not in ("max", "mean"):
            raise ValueError(f"pool: expected 'max' or 'mean', got {pool!r}")
        self.config = {
            "vocab_size": vocab_size,
            "output_width": output_width,
            "max_length": max_length,
            "width": width,
            "layers": layers,
            "heads": heads,
            "hidden": hidden,
            "window": window,
            "pool": pool,
            "dropout": dropout,
        }
        self.output_width = output_width
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.token_width = width
        self.pool = pool
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(max_length, width))
        nn.init.normal_(self.tokens.weight, std=0.02 * width**0.5)
        nn.init.normal_(self.positions, std=0.02)
        with torch.no_grad():
            self.tokens.weight[0].zero_()
        self.blocks = nn.ModuleList(_WindowBlock(width, heads, hidden, window, dropout) for _ in range(layers))
        self.dropout = _Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, output_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, L)`` int64 tokens, 0 is padding, L at most ``max_length``, to ``(B, output_width)``."""
        return self.token_features(tokens).pooled

    def token_features(self, tokens: Tensor) -> TokenFeatures:
        """The same with the last block's tokens."""
        if tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(f"tokens: expected shape (B, L <= {self.max_length}), got {tuple(tokens.shape)}")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
            # Columns that are padding in every row are work for nothing; finding them costs a GPU a synchronisation.
            used = (tokens != 0).any(0).nonzero()
            tokens = tokens[:, : max(1, int(used[-1]) + 1 if len(used) else 1)]
        mask = tokens != 0
        # A row of nothing but padding reads its first position instead of dividing by zero.
        mask = torch.cat([mask[:, :1] | ~mask.any(1, keepdim=True), mask[:, 1:]], 1)
        x = self.dropout(self.tokens(tokens) + self.positions[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if self.pool == "max":
            pooled = x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).amax(1)
        else:
            weight = mask.to(x.dtype)
            pooled = torch.einsum("bld,bl->bd", x, weight / weight.sum(1, keepdim=True))
        return TokenFeatures(self.projection(pooled), x, mask)
