"""Reading a tokenizer that was saved beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcr2s_ext._files import write_text

__all__ = ["SavedTokenizer"]


def _read(path: str | Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error


class SavedTokenizer:
    """Encodes captions as the saved tokenizer file says: a file of the ``tokenizers`` library with truncation and
    padding.

    Args:
        path: the JSON file.

    Raises:
        ValueError: where the file is damaged, or sets no maximum length or no padding with id 0.
    """

    def __init__(self, path: str | Path) -> None:
        self._tokenizer = _read(path)
        padding, truncation = self._tokenizer.padding, self._tokenizer.truncation
        self._max_length = int(truncation["max_length"]) if truncation else 0
        if not truncation or not padding or padding.get("pad_id") != 0:
            raise ValueError(f"{path}: expected a tokenizer with a maximum length and padding with id 0")

    @classmethod
    def from_pretrained(cls, folder: str | Path, max_length: int) -> SavedTokenizer:
        """The tokenizer of a local Hugging Face folder, set to pad with 0 and to cut at ``max_length`` tokens.

        Args:
            folder: holds ``tokenizer.json``.
            max_length: longest row in tokens, those of the beginning and the end included.

        Raises:
            FileNotFoundError: the folder has no ``tokenizer.json``.
            ValueError: the file is damaged.
        """
        path = Path(folder).expanduser() / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"folder: {folder} holds no tokenizer.json; transformers' AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(folder) writes one where the tokenizer has a fast form"
            )
        made = cls.__new__(cls)
        made._tokenizer = _read(path)
        made._tokenizer.enable_truncation(max_length)
        made._tokenizer.enable_padding(pad_id=0)
        made._max_length = max_length
        return made

    def special_tokens(self) -> dict[str, int]:
        """Tokens that are no part of a sentence, and their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        return self._max_length

    def encode(self, captions: Sequence[str]) -> Tensor:
        """int64 ``(n, L)`` token ids, padded with 0."""
        # A broken surrogate, which JSON can carry, has no UTF-8 form and the library refuses it.
        sentences = [caption.encode("utf-8", "ignore").decode("utf-8") for caption in captions]
        return torch.tensor([row.ids for row in self._tokenizer.encode_batch(sentences)], dtype=torch.int64)

    def save(self, path: str | Path) -> None:
        """Write the same file again."""
        write_text(path, self._tokenizer.to_str(pretty=True))
