"""Splits of a person search dataset, and its images."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcr2s_ext.data.layouts import SPLITS
from lcr2s_ext.data.records import Annotations, DatasetError, Record, read_annotations

_SHOWN = 5


class ImageFileError(OSError):
    """An image file that cannot be decoded; the message names it."""


@dataclass
class PersonSplit:
    """One split: its images, its captions, and who is on them. One sample per caption.

    Attributes:
        name: Name of the dataset, e.g. "cuhk-pedes".
        split: "train", "val" or "test".
        image_paths: (n_img) paths on disk, each image once.
        image_ids: (n_img) int64 identities as in the file.
        captions: (n_cap) sentences.
        caption_image: (n_cap) int64, the image of each caption, a position in ``image_paths``.
        caption_ids: (n_cap) int64, the identity of each caption as in the file.
        labels: (n_cap) int64, identities relabelled 0..num_identities-1 in ascending order of their ids.
        image_labels: (n_img) int64, the same for the images.
        num_identities: Number of different identities.
    """

    name: str
    split: str
    image_paths: list[Path]
    image_ids: Tensor
    captions: list[str]
    caption_image: Tensor
    caption_ids: Tensor
    labels: Tensor
    image_labels: Tensor
    num_identities: int

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.captions)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.image_paths)


def make_split(
    name: str,
    split: str,
    image_paths: Sequence[Path],
    image_ids: Sequence[int],
    captions: Sequence[str],
    caption_image: Sequence[int],
) -> PersonSplit:
    """A split from its lists; fills in what follows from them.

    Raises:
        ValueError: The lengths do not agree, or a caption's image does not exist.
    """
    if len(image_ids) != len(image_paths):
        raise ValueError(
            f"image_ids must have as many elements as image_paths ({len(image_paths)}), got {len(image_ids)}"
        )
    if len(caption_image) != len(captions):
        raise ValueError(
            f"caption_image must have as many elements as captions ({len(captions)}), got {len(caption_image)}"
        )
    ids = torch.tensor(list(image_ids), dtype=torch.int64)
    image = torch.tensor(list(caption_image), dtype=torch.int64)
    if len(image) and not (int(image.min()) >= 0 and int(image.max()) < len(ids)):
        raise ValueError(f"caption_image must lie in [0, {len(ids)}), got {int(image.min())}..{int(image.max())}")
    unique, image_labels = torch.unique(ids, return_inverse=True)
    return PersonSplit(
        name,
        split,
        list(image_paths),
        ids,
        list(captions),
        image,
        ids[image],
        image_labels[image],
        image_labels,
        len(unique),
    )


def _listing(messages: Sequence[str]) -> str:
    more = len(messages) - _SHOWN
    return "; ".join(messages[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def merge_duplicates(found: Annotations) -> list[Record]:
    """Records with each image once: captions of a repeated image go to its first record."""
    first: dict[str, Record] = {}
    for record in found.records:
        known = first.setdefault(record.path, record)
        if known is record:
            continue
        if (known.identity, known.split) != (record.identity, record.split):
            raise DatasetError(
                f"{found.file}: records {known.number} and {record.number} are the same image {record.path}, but of "
                f"identity {known.identity} in {known.split} and of identity {record.identity} in {record.split}"
            )
        known.captions += [caption for caption in record.captions if caption not in known.captions]
    return list(first.values())


def load_dataset(name: str, root: str | Path) -> dict[str, PersonSplit]:
    """Reads a dataset's annotations and checks that its image files are there.

    An image listed twice is kept once, with the captions of both records. ``lcr2s data check`` reports this and more.

    Args:
        name: "cuhk-pedes", "icfg-pedes", "rstpreid", or "custom" for a table of one's own.
        root: Folder that holds the dataset's folder (such as ``CUHK-PEDES/``), or that folder itself; of a custom
            dataset its folder or file.

    Returns:
        "train", "val" and "test"; a split that the file does not have is empty.

    Raises:
        FileNotFoundError: The annotation file or images are missing; the message names them.
        DatasetError: Records that cannot be used; the message names them by their position in the file, from 1.
        ValueError: An unknown dataset.
    """
    found = read_annotations(name, root)
    if found.errors:
        raise DatasetError(f"{found.file}: {_listing(found.errors)}. `lcr2s data check` lists every problem")
    if not found.records:
        raise DatasetError(f"{found.file} holds no records")
    records = merge_duplicates(found)
    missing = [str(found.image_path(record)) for record in records if not found.image_path(record).is_file()]
    if missing:
        raise FileNotFoundError(f"{found.file} names {len(missing)} image(s) that are missing: {_listing(missing)}")
    splits_of: dict[int, set[str]] = {}
    for record in records:
        splits_of.setdefault(record.identity, set()).add(record.split)
    shared = sorted(identity for identity, splits in splits_of.items() if len(splits) > 1)
    if shared:
        warnings.warn(
            f"{found.file}: identities in more than one split, so results on held-out people are not that: "
            f"{_listing([str(identity) for identity in shared])}",
            stacklevel=2,
        )
    result = {}
    for split in SPLITS:
        own = [record for record in records if record.split == split]
        result[split] = make_split(
            name.lower(),
            split,
            [found.image_path(record) for record in own],
            [record.identity for record in own],
            [caption for record in own for caption in record.captions],
            [position for position, record in enumerate(own) for _ in record.captions],
        )
    return result


def decode_image(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """An image file as a uint8 array (3, H, W), resized bilinearly where its size is another.

    Raises:
        FileNotFoundError: There is no such file.
        ImageFileError: The file cannot be decoded; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    height, width = size
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
            if rgb.size != (width, height):
                rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image file {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageFileError(f"image file {path} cannot be decoded: {error}") from error
    return np.array(rgb).transpose(2, 0, 1)


class ImageStore:
    """Images of a split as uint8 tensors of one size, decoded when first asked for.

    Args:
        paths: (n) image files.
        size: Height and width in pixels that every image is brought to (bilinear).
        cache: Keep what was decoded in memory: n * 3 * H * W bytes in the end. Call :meth:`all` before worker
            processes are started, so that they share it.
        cache_dir: Folder for a file of all images, decoded and resized once and mapped into memory from then on
            (``cache`` is then without effect). It is written when images are first asked for and found again as long
            as paths, file sizes, modification times and ``size`` are the same.

    Raises:
        TypeError, ValueError: ``size`` is not two positive ints.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        size: tuple[int, int],
        *,
        cache: bool = True,
        cache_dir: str | Path | None = None,
    ) -> None:
        if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(type(side) is int for side in size):
            raise TypeError(f"size must be two ints (height, width), got {size!r}")
        if min(size) < 1:
            raise ValueError(f"size must be positive, got {tuple(size)}")
        self.paths = [Path(path) for path in paths]
        self.size = (size[0], size[1])
        self.cache = cache
        self._pixels: Tensor | None = None
        self._decoded = np.zeros(len(self.paths), dtype=bool)
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Image ``index`` as uint8 (3, H, W)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        return self.load([index % len(self)])[0]

    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Images as uint8 (n, 3, H, W), a copy.

        Args:
            indices: (n) positions in ``paths``.

        Raises:
            IndexError: A position out of range.
            FileNotFoundError, ImageFileError: A file that is missing or cannot be decoded; the message names it.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            raise IndexError(f"indices must lie in [0, {len(self)}), got {int(rows.min())}..{int(rows.max())}")
        if self._cache_dir is not None and self._pixels is None and len(self):
            self._pixels = self._mapped(self._cache_dir)
            self._decoded[:] = True
        if not self.cache and self._pixels is None:
            out = torch.empty((len(rows), 3, *self.size), dtype=torch.uint8)
            for position, row in enumerate(rows.tolist()):
                out[position] = torch.from_numpy(decode_image(self.paths[row], self.size))
            return out
        if self._pixels is None:
            self._pixels = torch.empty((len(self), 3, *self.size), dtype=torch.uint8)
        for row in rows[~torch.from_numpy(self._decoded[rows.numpy()])].tolist():
            if not self._decoded[row]:
                self._pixels[row] = torch.from_numpy(decode_image(self.paths[row], self.size))
                self._decoded[row] = True
        return self._pixels[rows]

    def _mapped(self, folder: Path) -> Tensor:
        """All images from the file in ``folder``, which is written first where it is missing."""
        described = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self.paths]
        digest = hashlib.sha256(repr((self.size, described)).encode()).hexdigest()[:24]
        file = folder / f"images-{self.size[0]}x{self.size[1]}-{digest}.npy"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # Under another name until it is whole: other processes may look for it, and this one may be killed.
            part = file.with_suffix(f".{os.getpid()}.part")
            try:
                pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(self), 3, *self.size))
                for row, path in enumerate(self.paths):
                    pixels[row] = decode_image(path, self.size)
                pixels.flush()
                os.replace(part, file)
            finally:
                part.unlink(missing_ok=True)
        # Copy-on-write: whoever wrote to a returned tensor would not reach the file.
        return torch.from_numpy(np.load(file, mmap_mode="c"))

    def all(self) -> Tensor:
        """Every image as uint8 (n, 3, H, W); where images are kept, the store's own memory: not to be written to."""
        everything = self.load(torch.arange(len(self)))
        return everything if self._pixels is None else self._pixels
