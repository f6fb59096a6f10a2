"""Reading a tokenizer that was saved beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["SavedTokenizer"]


class SavedTokenizer:
    """Encodes captions as the saved tokenizer file says: a file of the ``tokenizers`` library with truncation and
    padding.

    Args:
        path: the JSON file.

    Raises:
        ValueError: where the file is damaged, or sets no maximum length or no padding with id 0.
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer file ({error})") from error
        padding, truncation = self._tokenizer.padding, self._tokenizer.truncation
        self._max_length = int(truncation["max_length"]) if truncation else 0
        if not truncation or not padding or padding.get("pad_id") != 0:
            raise ValueError(f"{path}: expected a tokenizer with a maximum length and padding with id 0")

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
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
