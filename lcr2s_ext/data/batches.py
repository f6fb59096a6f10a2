"""Batches of persons: anchors, the support sets drawn for them, and the pool of rows that both refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lcr2s_ext import native
from lcr2s_ext.data.datasets import ImageStore, PersonSplit
from lcr2s_ext.data.samplers import SampleBatch
from lcr2s_ext.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lcr2s_ext.ops import SupportIndex

SUPPORT_MODES = ("none", "drawn", "batch")

# Keeps the draws of captions apart from the draws of images.
_TEXT_STREAM = 0x7E47


@dataclass
class PersonBatch:
    """A batch whose first B rows of either pool are the anchors; drawn support rows follow.

    Attributes:
        images: uint8 (Mv, 3, H, W) pool.
        tokens: int64 (Mt, L) pool, padded with 0.
        labels: int64 (B,) identities 0..num_identities-1.
        item_ids: int64 (B,) image of each anchor, a position in the split: equal for two captions of one image.
        image_support: B sets over the image pool, the row itself first; None without support.
        text_support: B sets over the token pool, the row itself first; None without support.
        samples: int64 (B,) the anchors' caption numbers in the split.
        captions: int64 (Mt,) caption numbers of the token pool, on the host wherever the batch is.
        image_rows: int64 (Mv,) position of each image in the pool that one process has for the whole batch, where this
            is one rank's part of it; None where it is the whole.
        whole_images: Images in that pool.
        epoch: From 0.
        step: Within the epoch, from 0.
    """

    images: Tensor
    tokens: Tensor
    labels: Tensor
    item_ids: Tensor
    image_support: SupportIndex | None
    text_support: SupportIndex | None
    samples: Tensor
    captions: Tensor | None = None
    epoch: int = 0
    step: int = 0
    image_rows: Tensor | None = None
    whole_images: int | None = None

    def __len__(self) -> int:
        """B, the number of anchors."""
        return self.labels.shape[0]

    def _map(self, move: Any) -> PersonBatch:
        return replace(
            self,
            images=move(self.images),
            tokens=move(self.tokens),
            labels=move(self.labels),
            item_ids=move(self.item_ids),
            image_support=None if self.image_support is None else move(self.image_support),
            text_support=None if self.text_support is None else move(self.text_support),
            samples=move(self.samples),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PersonBatch:
        """The same batch on another device."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PersonBatch:
        """The same batch in page-locked memory."""
        return self._map(lambda value: value.pin_memory())


class TrainingDataset(torch.utils.data.Dataset[PersonBatch]):
    """Makes a :class:`PersonBatch` from the numbers of its samples (captions).

    Where several processes share a batch, each makes its part, with the support rows that one process draws for these
    anchors in the whole batch: those that are no anchors of its own follow them in the pools.
    Draws depend on (seed, epoch, sample) alone, so that neither resuming nor the number of workers changes them.

    - ``support="none"``: the pools are the anchors.
    - ``support="drawn"``: row i gets up to ``max_support`` other images of its identity, never its own image, and up to
      ``max_support`` other captions of its identity, never its own caption (another caption of its own image may be
      among them). The pools are the anchors and the distinct drawn rows that are not anchors already.
    - ``support="batch"``: the same from the other anchors of the batch, so the pools are the anchors and the encoders
      have nothing more to do. No image and no caption is twice in a set.

    Args:
        split: The split.
        store: Its images.
        tokenizer: Encodes the captions once, when the dataset is made.
        support: One of the three above.
        max_support: K, the largest support set, the row itself not counted.
        seed: Seed of the draws.

    Raises:
        TypeError, ValueError: An argument out of range, or a store of another split.
    """

    def __init__(
        self,
        split: PersonSplit,
        store: ImageStore,
        tokenizer: Tokenizer,
        *,
        support: str = "none",
        max_support: int = 4,
        seed: int = 0,
    ) -> None:
        if support not in SUPPORT_MODES:
            raise ValueError(f"support must be one of {', '.join(SUPPORT_MODES)}, got {support!r}")
        for name, value in (("max_support", max_support), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if len(store) != len(split.image_paths):
            raise ValueError(f"store must hold the split's {len(split.image_paths)} images, it holds {len(store)}")
        self.split = split
        self.store = store
        self.support = support
        self.max_support = max_support
        self.seed = seed
        self.tokens = tokenizer.encode(split.captions)
        self.epoch = 0
        self._make_indices()

    def _make_indices(self) -> None:
        self._images = native.IdentityIndex(self.split.image_ids.numpy())
        self._captions = native.IdentityIndex(self.split.caption_ids.numpy())

    def __getstate__(self) -> dict[str, Any]:
        # The native indices are made again in a worker process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_images", "_captions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_indices()

    def __len__(self) -> int:
        """Number of samples (captions)."""
        return len(self.split.captions)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of batches that do not say theirs (plain lists of samples)."""
        self.epoch = epoch

    def __getitem__(self, sample: int) -> PersonBatch:
        """A batch of one sample."""
        return self.make_batch([sample])

    def __getitems__(self, samples: Sequence[int]) -> PersonBatch:
        """The hook by which a ``DataLoader`` with a batch sampler makes whole batches; see :meth:`loader`."""
        return self.make_batch(samples)

    def make_batch(self, samples: Sequence[int] | Tensor, step: int = 0, epoch: int | None = None) -> PersonBatch:
        """The batch of the given samples.

        Args:
            samples: (B) caption numbers; what a sampler yields carries its epoch, its step and the part of this process
                with it.
            step: Step within the epoch, where ``samples`` does not say.
            epoch: Epoch, where ``samples`` does not say; None for what :meth:`set_epoch` set.

        Raises:
            IndexError: A sample out of range.
            FileNotFoundError, ImageFileError: An image that is missing or cannot be decoded; the message names it.
        """
        if isinstance(samples, SampleBatch):
            epoch, step = samples.epoch, samples.step
        elif epoch is None:
            epoch = self.epoch
        anchors = torch.as_tensor(samples, dtype=torch.int64).reshape(-1)
        if len(anchors) and not (int(anchors.min()) >= 0 and int(anchors.max()) < len(self)):
            raise IndexError(f"samples must lie in [0, {len(self)}), got {int(anchors.min())}..{int(anchors.max())}")
        images = self.split.caption_image[anchors]
        labels = self.split.labels[anchors]
        image_rows, caption_rows = images, anchors
        image_support = text_support = None
        if self.support == "drawn":
            text_seed = self.seed ^ _TEXT_STREAM
            image_rows, image_support = self._draw(self._images, images, anchors, self.seed, epoch)
            caption_rows, text_support = self._draw(self._captions, anchors, anchors, text_seed, epoch)
        elif self.support == "batch":
            text_seed = self.seed ^ _TEXT_STREAM
            image_support = self._draw_from_batch(labels, images, anchors, self.seed, epoch)
            text_support = self._draw_from_batch(labels, anchors, anchors, text_seed, epoch)
        pool = whole = None
        if isinstance(samples, SampleBatch) and samples.ranks > 1:
            own, whole = samples.own, len(image_rows)
            pool, image_support = _part(own, image_support)
            captions, text_support = _part(own, text_support)
            image_rows, caption_rows = image_rows[pool], caption_rows[captions]
            labels, images, anchors = (values[own.start : own.stop] for values in (labels, images, anchors))
        return PersonBatch(
            images=self.store.load(image_rows),
            tokens=self.tokens[caption_rows],
            labels=labels,
            item_ids=images,
            image_support=image_support,
            text_support=text_support,
            samples=anchors,
            captions=caption_rows,
            epoch=epoch,
            step=step,
            image_rows=pool,
            whole_images=whole,
        )

    def _draw(
        self, index: native.IdentityIndex, rows: Tensor, samples: Tensor, seed: int, epoch: int
    ) -> tuple[Tensor, SupportIndex]:
        """Rows of the split that make the pool, and the sets over it."""
        from lcr2s_ext.ops import SupportIndex

        anchors = rows.numpy()
        indptr, drawn = index.draw(
            anchors, max_support=self.max_support, keys=samples.numpy(), include_self=False, seed=seed, epoch=epoch
        )
        # Pool row of a split row: its first anchor, or its place among the rows that are no anchors.
        distinct, first = np.unique(anchors, return_index=True)
        extras = np.setdiff1d(drawn, distinct)
        known = np.concatenate([distinct, extras])
        pool_row = np.concatenate([first, len(anchors) + np.arange(len(extras))])
        by_row = np.argsort(known)
        positions = pool_row[by_row[np.searchsorted(known, drawn, sorter=by_row)]] if len(drawn) else drawn
        # The row itself goes first into each set.
        with_self = np.insert(positions, indptr[:-1], np.arange(len(anchors)))
        support = SupportIndex(
            torch.from_numpy(indptr + np.arange(len(indptr))), torch.from_numpy(with_self), len(anchors) + len(extras)
        )
        return torch.from_numpy(np.concatenate([anchors, extras])), support

    def _draw_from_batch(self, labels: Tensor, items: Tensor, samples: Tensor, seed: int, epoch: int) -> SupportIndex:
        from lcr2s_ext.ops import SupportIndex

        indptr, indices = native.draw_support(
            labels.numpy(),
            self.max_support,
            item_ids=items.numpy(),
            keys=samples.numpy(),
            distinct_items=True,
            seed=seed,
            epoch=epoch,
        )
        return SupportIndex(torch.from_numpy(indptr), torch.from_numpy(indices), len(labels))

    def loader(self, batches: Any, *, num_workers: int = 0, pin_memory: bool = False) -> Any:
        """A ``DataLoader`` of :class:`PersonBatch`.

        Args:
            batches: A batch sampler of :mod:`lcr2s_ext.data.samplers`.
            num_workers: Worker processes; the batches do not depend on it.
            pin_memory: Return batches in page-locked memory.
        """
        return torch.utils.data.DataLoader(
            self, batch_sampler=batches, collate_fn=_as_is, num_workers=num_workers, pin_memory=pin_memory
        )


def _part(own: range, support: SupportIndex | None) -> tuple[Tensor, SupportIndex | None]:
    """Rows of the pool that one rank needs, its anchors first, and the sets of its anchors over these rows."""
    from lcr2s_ext.ops import SupportIndex

    anchors = np.arange(own.start, own.stop)
    if support is None:
        return torch.from_numpy(anchors), None
    indptr = support.indptr[own.start : own.stop + 1]
    drawn = support.indices[int(indptr[0]) : int(indptr[-1])].numpy()
    others = np.setdiff1d(drawn, anchors)
    is_anchor = (drawn >= own.start) & (drawn < own.stop)
    positions = np.where(is_anchor, drawn - own.start, len(anchors) + np.searchsorted(others, drawn))
    pool = torch.from_numpy(np.concatenate([anchors, others]))
    return pool, SupportIndex(indptr - indptr[0], torch.from_numpy(positions), len(pool))


def _as_is(batch: Any) -> Any:
    return batch
