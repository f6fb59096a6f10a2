"""What a frozen text backbone makes of every caption, computed once and kept in memory or in a mapped file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcr2s_ext._files import replacing
from lcr2s_ext.training.config import ConfigError

__all__ = ["TextCache", "check_frozen", "make_text_cache"]


@dataclass
class TextCache:
    """Backbone outputs of all captions of a split, on the host.

    Attributes:
        rows: (captions, ...) in the dtype they are kept in.
        dtype: what the backbone gives, and what comes out again.
    """

    rows: Tensor
    dtype: torch.dtype

    def take(self, captions: Tensor, device: torch.device) -> Tensor:
        """Outputs of the captions with these numbers, an int64 tensor on the host."""
        return self.rows[captions].to(device, non_blocking=True).to(self.dtype)


def check_frozen(encoder: nn.Module, names: Iterable[str], multipliers: Mapping[str, float]) -> None:
    """ConfigError where a text encoder's backbone cannot be cached.

    Args:
        encoder: has ``model``, the backbone, ``backbone(tokens)`` and ``forward(tokens, hidden)``.
        names: what the encoder is called in the stages that train it, such as ``model.text_encoder``.
        multipliers: ``optim.lr_multipliers``.
    """
    if not hasattr(encoder, "backbone"):
        raise ConfigError(
            f"data.text_cache: {type(encoder).__name__} has no backbone apart from what is trained; a pretrained text "
            "encoder such as bert_textcnn has"
        )
    model: nn.Module = encoder.model  # type: ignore[assignment]
    for prefix in names:
        for name, parameter in model.named_parameters():
            full = f"{prefix}.model.{name}"
            found = max((part for part in multipliers if part in full), key=len, default=None)
            if parameter.requires_grad and (found is None or multipliers[found]):
                raise ConfigError(
                    f"data.text_cache: the text backbone is trained ({full}); freeze it (frozen of bert_textcnn, or "
                    f"optim.lr_multipliers={{{prefix}.model: 0}})"
                )


def make_text_cache(
    encoder: nn.Module,
    tokens: Tensor,
    *,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int = 256,
    kept: dict[str, TextCache] | None = None,
) -> TextCache:
    """The cache of a text encoder whose backbone is frozen.

    The encoder stays in the mode it is trained in, and the surrounding autocast counts, so that outputs are those that
    training would compute.

    Args:
        encoder: as for :func:`check_frozen`, on ``device``.
        tokens: ``(captions, L)`` of the split, padded as batches are.
        where: ``"memory"``, or a folder for a file that later runs map; its name tells backbone, captions and dtypes.
        dtype: what outputs are kept in.
        device: where they are computed.
        batch_size: captions at a time.
        kept: caches made before, found by place, backbone and captions; the new one is added.

    Raises:
        ConfigError: the outputs are random: dropout is active inside the backbone.
    """
    compute: Any = encoder.backbone
    with torch.no_grad():
        first = compute(tokens[:2].to(device))
        if not torch.equal(first, compute(tokens[:2].to(device))):
            raise ConfigError(
                "data.text_cache: dropout is active inside the frozen text backbone, its outputs differ each time; "
                "set its dropout probabilities to 0"
            )
    key = _fingerprint(encoder, tokens, dtype, first.dtype)
    name = f"{where}/{key}"
    if kept is not None and name in kept:
        return kept[name]
    shape = (len(tokens), *first.shape[1:])
    if where == "memory":
        rows = torch.empty(shape, dtype=dtype)
        _fill(rows, compute, tokens, device, batch_size)
    else:
        folder = Path(where).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"text-{key}.bin"
        size = math.prod(shape)
        if not file.is_file() or file.stat().st_size != size * dtype.itemsize:
            with replacing(file) as temporary:
                _fill(
                    torch.from_file(str(temporary), shared=True, size=size, dtype=dtype).view(shape),
                    compute,
                    tokens,
                    device,
                    batch_size,
                )
        # Private: whoever wrote to a returned tensor would not reach the file.
        rows = torch.from_file(str(file), shared=False, size=size, dtype=dtype).view(shape)
    cache = TextCache(rows, first.dtype)
    if kept is not None:
        kept[name] = cache
    return cache


@torch.no_grad()
def _fill(rows: Tensor, compute: Any, tokens: Tensor, device: torch.device, batch_size: int) -> None:
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        rows[start : start + len(part)].copy_(compute(part.to(device)))


def _fingerprint(encoder: nn.Module, tokens: Tensor, kept_as: torch.dtype, computed_as: torch.dtype) -> str:
    """Of everything that the outputs depend on."""
    model: nn.Module = encoder.model  # type: ignore[assignment]
    precision = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
    digest = hashlib.sha256(
        repr((type(encoder).__name__, encoder.config, tuple(tokens.shape), kept_as, computed_as, precision)).encode()
    )
    for value in (tokens, *model.state_dict().values()):
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
