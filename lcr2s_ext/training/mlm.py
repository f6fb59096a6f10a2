"""Masked language modelling in a stage: which words of a caption are masked, and the term of the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext.models import DualEncoder, TokenFeatures
from lcr2s_ext.nn import MaskedLanguageHead
from lcr2s_ext.training import distributed
from lcr2s_ext.training.config import ConfigError, LossConfig
from lcr2s_ext.training.counter import counter_bits

__all__ = ["MaskedLanguageModel", "Masking", "check_mlm"]

_MASKS = ("[MASK]", "<mask>", "<|mask|>")
_UNKNOWN = ("[UNK]", "<unk>")


class Masking:
    """BERT's masking of captions: of the chosen tokens 80 % become the mask token, 10 % another word, 10 % stay.

    A caption without any chosen token gets one, as in IRRA. Special tokens and padding are never chosen. What is
    chosen depends on seed, epoch and caption alone.

    The mask token is the vocabulary's own; without one its token for unknown words; without that (CLIP's) its last
    ordinary token, as in IRRA, which is then never predicted.

    Args:
        special: the vocabulary's special tokens and their ids.
        vocab_size: ids are below it; 0 is padding.
        fraction: of the ordinary tokens that is chosen.
        seed: of the choice.
    """

    def __init__(self, special: dict[str, int], vocab_size: int, fraction: float, seed: int) -> None:
        self.fraction = fraction
        self.seed = seed
        numbers = {0, *special.values()}
        named = [special[name] for name in (*_MASKS, *_UNKNOWN) if name in special]
        self.mask_id = named[0] if named else max(set(range(vocab_size)) - numbers)
        is_special = torch.zeros(max(vocab_size, *numbers) + 1, dtype=torch.bool)
        is_special[torch.tensor(sorted(numbers | {self.mask_id}))] = True
        self._special = is_special[:vocab_size]
        self._ordinary = (~self._special).nonzero()[:, 0]

    def __call__(self, tokens: Tensor, samples: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Masked tokens ``(B, L)`` and bool ``(B, L)``, which positions were chosen.

        Args:
            tokens: int64 ``(B, L)``.
            samples: int64 ``(B,)`` caption numbers.
            epoch: from 0.
        """
        if self._special.device != tokens.device:
            self._special, self._ordinary = self._special.to(tokens.device), self._ordinary.to(tokens.device)
        place = torch.arange(tokens.shape[1], device=tokens.device)

        def even(purpose: int) -> Tensor:
            stream = torch.tensor(4 * epoch + purpose, device=place.device)
            return counter_bits(self.seed, stream, samples[:, None], place)

        lot = even(0).masked_fill(self._special[tokens], 1 << 53)
        chosen = lot < self.fraction * (1 << 53)
        least = lot.amin(1, keepdim=True)
        chosen |= (lot == least) & ~chosen.any(1, keepdim=True) & (least < 1 << 53)
        action = even(1).double() / (1 << 53)
        other = self._ordinary[even(2) % len(self._ordinary)]
        replaced = torch.where(action < 0.8, self.mask_id, torch.where(action < 0.9, other, tokens))
        return torch.where(chosen, replaced, tokens), chosen


def check_mlm(config: LossConfig, encoders: DualEncoder, tokenizer: Any) -> tuple[int, int, int, int]:
    """Widths of the image's and the caption's tokens, the size of the vocabulary, and the width of the head.

    Raises:
        ConfigError: encoders without token-level outputs, or a width that the heads do not divide.
    """
    widths = []
    for name, needed in (
        ("image_encoder", ("token_features", "token_width")),
        ("text_encoder", ("token_features", "token_width", "vocab_size")),
    ):
        encoder: Any = getattr(encoders, name)
        missing = [attribute for attribute in needed if not hasattr(encoder, attribute)]
        if missing:
            raise ConfigError(
                f"loss.mlm_weight: {name} {type(encoder).__name__} has no {', no '.join(missing)}; "
                "expected 0 for encoders without token-level outputs"
            )
        widths.append(int(encoder.token_width))
    if not hasattr(tokenizer, "special_tokens"):
        raise ConfigError(f"loss.mlm_weight: expected a tokenizer with special_tokens(), got {tokenizer!r}")
    width = encoders.output_width if config.mlm_width is None else config.mlm_width
    if width % config.mlm_heads:
        raise ConfigError(f"loss.mlm_heads: expected a divisor of the head's width {width}, got {config.mlm_heads}")
    text: Any = encoders.text_encoder
    return widths[0], widths[1], int(text.vocab_size), width


class MaskedLanguageModel(nn.Module):
    """Masking, the head, and the term of a stage's loss; trained with the stage and left behind with it.

    Args:
        config: of the losses.
        encoders: whose tokens are read.
        tokenizer: of the captions, with ``special_tokens()``.
        seed: of the masking.

    Raises:
        ConfigError: as :func:`check_mlm`.
    """

    def __init__(self, config: LossConfig, encoders: DualEncoder, tokenizer: Any, seed: int) -> None:
        super().__init__()
        image_width, text_width, vocab_size, width = check_mlm(config, encoders, tokenizer)
        self.head = MaskedLanguageHead(
            image_width, text_width, vocab_size, width=width, layers=config.mlm_layers, heads=config.mlm_heads
        )
        self.weight = config.mlm_weight
        self.masking = Masking(tokenizer.special_tokens(), vocab_size, config.mlm_fraction, seed)

    def forward(
        self,
        encoders: DualEncoder,
        image: TokenFeatures,
        tokens: Tensor,
        samples: Tensor,
        epoch: int,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """The weighted term: mean cross entropy of the chosen tokens, over the ranks of a ``group`` as well.

        Args:
            encoders: as at construction.
            image: of the ``B`` images.
            tokens: int64 ``(B, L)`` captions.
            samples: int64 ``(B,)`` caption numbers.
            epoch: from 0.
            group: ranks with equally many rows; the mean of their gradients is that of the whole batch.
        """
        masked, chosen = self.masking(tokens, samples, epoch)
        encoder: Any = encoders.text_encoder
        text: TokenFeatures = encoder.token_features(masked)
        targets = tokens[chosen]
        chosen = chosen[:, : text.tokens.shape[1]]
        logits = self.head(image.tokens, image.mask, text.tokens, text.mask, chosen)
        total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        # Ranks choose different numbers of tokens: each divides by their mean.
        count = distributed.mean(torch.tensor(float(len(targets)), device=total.device), group)
        return self.weight * total / count.clamp(min=1.0)
