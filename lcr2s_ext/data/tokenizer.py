"""A caption tokenizer that is trained on the captions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lcr2s_ext._files import write_text

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
_SPECIAL = [PAD, UNKNOWN, BEGIN, END]


class Tokenizer(Protocol):
    """What batches ask of a tokenizer."""

    def encode(self, captions: list[str]) -> Tensor:
        """int64 (n, L) token ids, padded with 0."""
        ...


class CaptionTokenizer:
    """Byte-pair tokens of lower-cased captions, from the `tokenizers` library.

    Every row starts with [BOS] and ends with [EOS], so that an empty caption has tokens too; rows that are too long
    keep their [EOS]. Made by :meth:`train` or :meth:`load`.
    """

    pad_id = 0
    unknown_id = 1
    begin_id = 2
    end_id = 3

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int = 4000, max_length: int = 64) -> CaptionTokenizer:
        """Learns the vocabulary from captions; the same captions give the same vocabulary.

        Args:
            captions: Sentences to learn from: those of the train split.
            vocab_size: Largest number of tokens, the four special ones included. Few captions give fewer.
            max_length: Longest row in tokens, [BOS] and [EOS] included.

        Raises:
            TypeError, ValueError: An argument has another type or is out of range, or there is no caption.
        """
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

        for name, value, least in (("vocab_size", vocab_size, 16), ("max_length", max_length, 3)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        sentences = _check_captions(captions)
        if not any(sentences):
            raise ValueError("captions must hold at least one sentence to learn from")
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, show_progress=False)
        tokenizer.train_from_iterator(sentences, trainer=trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, cls.begin_id), (END, cls.end_id)]
        )
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(pad_id=cls.pad_id, pad_token=PAD)
        return cls(tokenizer)

    def special_tokens(self) -> dict[str, int]:
        """Tokens that are no part of a sentence, and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def max_length(self) -> int:
        """Longest row in tokens, [BOS] and [EOS] included."""
        return int(self._tokenizer.truncation["max_length"])

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids of captions.

        Args:
            captions: (n) sentences.

        Returns:
            int64 (n, L) with L the longest row, at most ``max_length``; padded with ``pad_id`` = 0.

        Raises:
            TypeError: ``captions`` is a single string, or an element is not a string.
        """
        sentences = _check_captions(captions)
        if not sentences:
            return torch.zeros((0, 2), dtype=torch.int64)
        encoded = self._tokenizer.encode_batch(sentences)
        return torch.tensor([row.ids for row in encoded], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> list[list[str]]:
        """The tokens of each row as text, special ones left out.

        Args:
            tokens: int64 (n, L).
        """
        special = set(range(len(_SPECIAL)))
        return [
            [self._tokenizer.id_to_token(token) for token in row if token not in special] for row in tokens.tolist()
        ]

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary and ``max_length`` as JSON."""
        write_text(path, self._tokenizer.to_str(pretty=True))

    @classmethod
    def load(cls, path: str | Path) -> CaptionTokenizer:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a tokenizer saved by :meth:`save`.
        """
        from tokenizers import Tokenizer

        text = Path(path).read_text(encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises the bare Exception class
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        if json.loads(text).get("truncation") is None or tokenizer.token_to_id(PAD) != cls.pad_id:
            raise ValueError(
                f"{path} is not a tokenizer saved by CaptionTokenizer: no maximum length or no {PAD} token"
            )
        return cls(tokenizer)

    def __getstate__(self) -> str:
        return str(self._tokenizer.to_str())

    def __setstate__(self, state: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(state)


def _check_captions(captions: Iterable[str]) -> list[str]:
    if isinstance(captions, str):
        raise TypeError("captions must be a sequence of strings, got a single string")
    sentences = list(captions)
    for position, caption in enumerate(sentences):
        if not isinstance(caption, str):
            raise TypeError(f"captions must be strings, element {position} is of type {type(caption).__name__}")
    # A broken surrogate, which JSON can carry, has no UTF-8 form and the library refuses it.
    return [sentence.encode("utf-8", "ignore").decode("utf-8") for sentence in sentences]
