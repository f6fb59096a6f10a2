"""Reads a dataset's annotation file, and says of every record what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lcr2s_ext.data.layouts import CUSTOM, CUSTOM_COLUMNS, CUSTOM_FILES, LAYOUTS, SPLITS, check_name


class DatasetError(ValueError):
    """A dataset on disk that cannot be used; the message names the file and, where there is one, the record."""


@dataclass
class Record:
    """One image of the annotation file, cleaned.

    Attributes:
        number: Position in the file, from 1.
        split: "train", "val" or "test".
        identity: As in the file.
        path: Of the image, relative to the dataset's folder of images, with forward slashes.
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
        images: The folder that the records' paths are relative to.
        file: The annotation file.
        records: Those without an error, in the file's order.
        errors: One message for each record that cannot be used.
        warnings: What was read in spite of being odd.
    """

    images: Path
    file: Path
    records: list[Record] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def image_path(self, record: Record) -> Path:
        """Path on disk of a record's image."""
        return self.images / record.path


def find_annotations(name: str, root: str | Path) -> tuple[Path, Path]:
    """The dataset's folder and its annotation file.

    Args:
        name: Name of the dataset.
        root: Folder that holds the dataset's folder, or that folder itself; of a custom dataset its folder or file.

    Raises:
        TypeError, ValueError: An unknown dataset, or ``root`` is no path.
        FileNotFoundError: Nothing is there; the message names what was looked for.
    """
    name = check_name(name)
    if not isinstance(root, (str, Path)):
        raise TypeError(f"root must be a path, got {root!r}")
    root = Path(root).expanduser()
    if name == CUSTOM:
        if root.is_file():
            return root.parent, root
        folders, files = [root], CUSTOM_FILES
        hint = "root is a folder that holds one of them, or such a file"
    else:
        layout = LAYOUTS[name]
        folders, files = [root / layout.folder, root], layout.annotation_files
        hint = f"root is the folder that holds {layout.folder}/"
    tried = []
    for folder in folders:
        for file in files:
            if (folder / file).is_file():
                return folder, folder / file
            tried.append(str(folder / file))
    missing = "" if root.is_dir() else f"; the folder {root} does not exist"
    raise FileNotFoundError(
        f"{name}: no annotation file under root={root}: looked for {' and '.join(tried)}{missing}. {hint}"
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


def _read_split(split: object) -> str:
    if not isinstance(split, str):
        raise DatasetError(f"'split' must be a string, got {_show(split)}")
    if split.strip().lower() not in SPLITS:
        raise DatasetError(f"'split' must be one of {', '.join(SPLITS)}, got {_show(split)}")
    return split.strip().lower()


def _read_path(key: str, path: object, folder: str) -> str:
    if not isinstance(path, str) or not path.strip():
        raise DatasetError(f"{key!r} must be a non-empty string, got {_show(path)}")
    # Some copies were written on Windows.
    relative = PurePosixPath(path.strip().replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise DatasetError(f"{key!r} must be relative to {folder} and stay inside it, got {_show(path)}")
    return str(relative)


def _check_identity(key: str, identity: int) -> int:
    if not -(2**63) <= identity < 2**63:
        raise DatasetError(f"{key!r} must fit 64 bits, got {identity}")
    return identity


def _read_record(number: int, raw: Any, path_key: str) -> Record:
    """The record, or DatasetError with what is wrong with it."""
    if not isinstance(raw, dict):
        raise DatasetError(f"must be an object, got {_show(raw)}")
    missing = [key for key in ("id", "split", path_key, "captions") if key not in raw]
    if missing:
        raise DatasetError(f"has no {' and no '.join(repr(key) for key in missing)}")
    identity, captions = raw["id"], raw["captions"]
    if isinstance(identity, bool) or not isinstance(identity, int):
        raise DatasetError(f"'id' must be an integer, got {_show(identity)}")
    _check_identity("id", identity)
    split = _read_split(raw["split"])
    path = _read_path(path_key, raw[path_key], "imgs/")
    if not isinstance(captions, list):
        raise DatasetError(f"'captions' must be a list of strings, got {_show(captions)}")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise DatasetError(f"'captions' must be a list of strings, element {position} is {_show(caption)}")
    odd = [position for position, caption in enumerate(captions) if _is_odd(caption)]
    return Record(number, split, identity, path, [clean_caption(caption) for caption in captions], odd)


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
        root: Folder that holds the dataset's folder, or that folder itself; of a custom dataset its folder or file.

    Raises:
        FileNotFoundError: There is no annotation file; the message names what was looked for.
        DatasetError: The file as a whole cannot be read.
    """
    folder, file = find_annotations(name, root)
    if check_name(name) == CUSTOM:
        return _read_table(folder, file)
    found = Annotations(folder / "imgs", file)
    try:
        raw_records = json.loads(_decode(file, found.warnings))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw_records, list):
        raise DatasetError(f"{file}: must hold a list of records, got {type(raw_records).__name__}")
    path_key = LAYOUTS[check_name(name)].path_key
    for number, raw in enumerate(raw_records, 1):
        try:
            record = _read_record(number, raw, path_key)
        except DatasetError as error:
            found.errors.append(f"record {number} {error}")
            continue
        found.records.append(record)
        _warn(found, record, raw["captions"])
    return found


def _warn(found: Annotations, record: Record, captions: list[str]) -> None:
    if not record.captions:
        found.warnings.append(f"record {record.number} ({record.path}) has no captions")
    for position, caption in enumerate(record.captions):
        if not caption:
            found.warnings.append(f"record {record.number} ({record.path}): caption {position} is empty")
    if record.odd:
        which = ", ".join(str(position) for position in record.odd)
        found.warnings.append(
            f"record {record.number} ({record.path}): odd characters or whitespace in caption {which}: "
            f"{ascii(captions[record.odd[0]])[:80]}"
        )


def _table_rows(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(number, row) of a table; rows of a .jsonl file are whatever its lines hold."""
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        missing = [column for column in CUSTOM_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise DatasetError(
                f"{file}: the first line must name the columns {', '.join(CUSTOM_COLUMNS)}; "
                f"missing: {', '.join(missing)}"
            )
        yield from enumerate(reader, 1)
    elif file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{file}: line {number} is not valid JSON: {error}") from error
    else:
        raise DatasetError(f"{file}: a custom dataset is a .csv or a .jsonl file, got {file.suffix or 'no suffix'}")


def _read_row(raw: Any) -> tuple[str, str, str | int, str]:
    """(path, caption, identity, split) of one row of a table, or DatasetError with what is wrong with it."""
    if not isinstance(raw, dict):
        raise DatasetError(f"must be an object, got {_show(raw)}")
    missing = [column for column in CUSTOM_COLUMNS if raw.get(column) is None]
    if missing:
        raise DatasetError(f"has no {' and no '.join(repr(column) for column in missing)}")
    identity, caption = raw["identity"], raw["caption"]
    if isinstance(identity, bool) or not isinstance(identity, (int, str)) or identity == "":
        raise DatasetError(f"'identity' must be an integer or a name, got {_show(identity)}")
    if not isinstance(caption, str):
        raise DatasetError(f"'caption' must be a string, got {_show(caption)}")
    path = _read_path("path", raw["path"], "the table's folder")
    return path, caption, identity.strip() if isinstance(identity, str) else identity, _read_split(raw["split"])


def _is_number(identity: str | int) -> bool:
    return isinstance(identity, int) or re.fullmatch(r"[+-]?[0-9]+", identity) is not None


def _read_table(folder: Path, file: Path) -> Annotations:
    """One caption a row. Identities are numbers, or names that are numbered from 0 in sorted order."""
    found = Annotations(folder, file)
    rows: list[tuple[int, str, str, str | int, str]] = []
    for number, raw in _table_rows(file, _decode(file, found.warnings)):
        try:
            rows.append((number, *_read_row(raw)))
        except DatasetError as error:
            found.errors.append(f"record {number} {error}")
    identities = {row[3] for row in rows}
    if all(_is_number(identity) for identity in identities):
        numbers = {identity: int(identity) for identity in identities}
    else:
        numbers = {name: position for position, name in enumerate(sorted(identities, key=str))}
    of_path: dict[str, Record] = {}
    originals: dict[str, list[str]] = {}
    for number, path, caption, name, split in rows:
        try:
            identity = _check_identity("identity", numbers[name])
        except DatasetError as error:
            found.errors.append(f"record {number} {error}")
            continue
        record = of_path.get(path)
        if record is None:
            record = of_path[path] = Record(number, split, identity, path, [], [])
            found.records.append(record)
        elif (record.identity, record.split) != (identity, split):
            found.errors.append(
                f"record {number} gives {path} another identity or split than record {record.number} does"
            )
            continue
        if _is_odd(caption):
            record.odd.append(len(record.captions))
        record.captions.append(clean_caption(caption))
        originals.setdefault(path, []).append(caption)
    for record in found.records:
        _warn(found, record, originals.get(record.path, []))
    return found
