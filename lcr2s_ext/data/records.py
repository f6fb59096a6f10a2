"""Reads a dataset's annotation file, and says of every record what is wrong with it."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

SPLITS = ("train", "val", "test")


class DatasetError(ValueError):
    """A dataset on disk that cannot be used; the message names the file and, where there is one, the record."""


@dataclass(frozen=True)
class Layout:
    """Where a dataset keeps its annotations, its images, and how its records call the image's path."""

    folder: str
    annotation_files: tuple[str, ...]
    path_key: str


LAYOUTS: dict[str, Layout] = {"cuhk-pedes": Layout("CUHK-PEDES", ("reid_raw.json",), "file_path")}


@dataclass
class Record:
    """One image of the annotation file, cleaned.

    Attributes:
        number: Position in the file, from 1.
        split: "train", "val" or "test".
        identity: As in the file.
        path: Of the image, relative to ``imgs/``, with forward slashes.
        captions: With whitespace collapsed, control characters and broken surrogates removed.
        odd: Positions in ``captions`` whose original text had characters beyond printable ASCII, or odd whitespace.
    """

    number: int
    split: str
    identity: int
    path: str
    captions: list[str]
    odd: list[int]


@dataclass
class Annotations:
    """What an annotation file holds.

    Attributes:
        folder: The dataset's folder.
        file: The annotation file.
        records: Those without an error, in the file's order.
        errors: One message for each record that cannot be used.
        warnings: What was read in spite of being odd.
    """

    folder: Path
    file: Path
    records: list[Record] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def image_path(self, record: Record) -> Path:
        """Path on disk of a record's image."""
        return self.folder / "imgs" / record.path


def get_layout(name: str) -> Layout:
    """The layout of a dataset.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: There is no such dataset.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    layout = LAYOUTS.get(name.lower())
    if layout is None:
        raise ValueError(f"name must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return layout


def find_annotations(name: str, root: str | Path) -> tuple[Path, Path]:
    """The dataset's folder and its annotation file.

    Args:
        name: Name of the dataset.
        root: Folder that holds the dataset's folder, or that folder itself.

    Raises:
        TypeError, ValueError: An unknown dataset, or ``root`` is no path.
        FileNotFoundError: Nothing is there; the message names what was looked for.
    """
    layout = get_layout(name)
    if not isinstance(root, (str, Path)):
        raise TypeError(f"root must be a path, got {root!r}")
    root = Path(root).expanduser()
    folders = (root / layout.folder, root)
    tried = []
    for folder in folders:
        for file in layout.annotation_files:
            if (folder / file).is_file():
                return folder, folder / file
            tried.append(str(folder / file))
    missing = "" if root.is_dir() else f"; the folder {root} does not exist"
    raise FileNotFoundError(
        f"{name}: no annotation file under root={root}: looked for {' and '.join(tried)}{missing}. "
        f"root is the folder that holds {layout.folder}/"
    )


def clean_caption(text: str) -> str:
    """A caption with whitespace collapsed, and without control characters, broken surrogates and byte order marks."""
    kept = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cs", "Cf", "Cn")
    )
    return re.sub(r" +", " ", kept).strip()


def _is_odd(text: str) -> bool:
    plain = text.isascii() and text.isprintable()
    return not plain or text != text.strip() or "  " in text


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_record(number: int, raw: Any, path_key: str) -> Record:
    """The record, or DatasetError with what is wrong with it."""
    if not isinstance(raw, dict):
        raise DatasetError(f"must be an object, got {_show(raw)}")
    missing = [key for key in ("id", "split", path_key, "captions") if key not in raw]
    if missing:
        raise DatasetError(f"has no {' and no '.join(repr(key) for key in missing)}")
    identity, split, path, captions = raw["id"], raw["split"], raw[path_key], raw["captions"]
    if isinstance(identity, bool) or not isinstance(identity, int):
        raise DatasetError(f"'id' must be an integer, got {_show(identity)}")
    if not -(2**63) <= identity < 2**63:
        raise DatasetError(f"'id' must fit 64 bits, got {identity}")
    if not isinstance(split, str):
        raise DatasetError(f"'split' must be a string, got {_show(split)}")
    if split.strip().lower() not in SPLITS:
        raise DatasetError(f"'split' must be one of {', '.join(SPLITS)}, got {_show(split)}")
    if not isinstance(path, str) or not path.strip():
        raise DatasetError(f"{path_key!r} must be a non-empty string, got {_show(path)}")
    # Some copies were written on Windows.
    relative = PurePosixPath(path.strip().replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise DatasetError(f"{path_key!r} must be relative to imgs/ and stay inside it, got {_show(path)}")
    if not isinstance(captions, list):
        raise DatasetError(f"'captions' must be a list of strings, got {_show(captions)}")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise DatasetError(f"'captions' must be a list of strings, element {position} is {_show(caption)}")
    odd = [position for position, caption in enumerate(captions) if _is_odd(caption)]
    cleaned = [clean_caption(caption) for caption in captions]
    return Record(number, split.strip().lower(), identity, str(relative), cleaned, odd)


def _decode(file: Path, warnings: list[str]) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        warnings.append(f"{file.name}: not UTF-8 from byte {error.start} on; such bytes are read as Windows-1252")
    text = data.decode("utf-8-sig", errors="surrogateescape")
    # surrogateescape turns byte 0x80 + n into U+DC80 + n.
    return re.sub("[\udc80-\udcff]", lambda match: bytes([ord(match[0]) - 0xDC00]).decode("cp1252", "replace"), text)


def read_annotations(name: str, root: str | Path) -> Annotations:
    """Reads the annotation file of a dataset; no image is touched.

    Quirks that are read without complaint: split names in any case, ``processed_tokens`` there or not, any number of
    captions, backslashes in paths, a byte order mark. Records that cannot be used become ``errors``, odd ones
    ``warnings``; both name the record by its position in the file, from 1.

    Args:
        name: Name of the dataset.
        root: Folder that holds the dataset's folder, or that folder itself.

    Raises:
        FileNotFoundError: There is no annotation file; the message names what was looked for.
        DatasetError: The file is not a JSON list.
    """
    folder, file = find_annotations(name, root)
    found = Annotations(folder, file)
    try:
        raw_records = json.loads(_decode(file, found.warnings))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw_records, list):
        raise DatasetError(f"{file}: must hold a list of records, got {type(raw_records).__name__}")
    path_key = get_layout(name).path_key
    for number, raw in enumerate(raw_records, 1):
        try:
            record = _read_record(number, raw, path_key)
        except DatasetError as error:
            found.errors.append(f"record {number} {error}")
            continue
        found.records.append(record)
        if not record.captions:
            found.warnings.append(f"record {number} ({record.path}) has no captions")
        for position, caption in enumerate(record.captions):
            if not caption:
                found.warnings.append(f"record {number} ({record.path}): caption {position} is empty")
        if record.odd:
            which = ", ".join(str(position) for position in record.odd)
            found.warnings.append(
                f"record {number} ({record.path}): odd characters or whitespace in caption {which}: "
                f"{ascii(raw['captions'][record.odd[0]])[:80]}"
            )
    return found
