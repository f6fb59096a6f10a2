"""A dataset rewritten in another dataset's layout, or as a table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from lcr2s_ext.data.datasets import merge_duplicates
from lcr2s_ext.data.layouts import CUSTOM, LAYOUTS, check_name
from lcr2s_ext.data.records import DatasetError, Record, read_annotations
from lcr2s_ext.data.synth import make_record

IMAGES = ("link", "copy")


def convert_dataset(name: str, root: str | Path, to: str, out: str | Path, *, images: str = "link") -> Path:
    """Reads a dataset and writes it in another layout.

    Identities, splits and captions (cleaned as the reader cleans them) are kept, an image listed twice becomes one
    record with the captions of both.

    Args:
        name: Dataset that is read: "cuhk-pedes", "icfg-pedes", "rstpreid" or "custom".
        root: Where it is, as for :func:`lcr2s_ext.data.load_dataset`.
        to: Layout that is written, one of the same names; "custom" writes ``annotations.jsonl``.
        out: Folder to hold the new dataset's folder; for "custom" that folder itself. Made where it is missing.
        images: "link" makes symbolic links to the original files, "copy" copies them.

    Returns:
        The folder that was written.

    Raises:
        TypeError, ValueError: An unknown dataset or an argument that cannot be used.
        FileNotFoundError: The annotation file or an image is missing.
        DatasetError: Records that cannot be used, or that the layout cannot hold.
        FileExistsError: The folder already holds an annotation file.
    """
    name, to = check_name(name), check_name(to)
    if images not in IMAGES:
        raise ValueError(f"images must be one of {', '.join(IMAGES)}, got {images!r}")
    if not isinstance(out, (str, Path)):
        raise TypeError(f"out must be a path, got {out!r}")
    found = read_annotations(name, root)
    if found.errors:
        raise DatasetError(f"{found.file}: {found.errors[0]}. `lcr2s data check` lists every problem")
    records = merge_duplicates(found)
    missing = [found.image_path(record) for record in records if not found.image_path(record).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{found.file} names {len(missing)} image(s) that are missing, the first is {missing[0]}"
        )
    if to == CUSTOM:
        folder = Path(out).expanduser()
        annotations, pictures = folder / "annotations.jsonl", "imgs/"
    else:
        _check_captions(to, records)
        folder = Path(out).expanduser() / LAYOUTS[to].folder
        annotations, pictures = folder / LAYOUTS[to].annotation_files[0], ""
    if annotations.exists():
        raise FileExistsError(f"{annotations} exists already; it is not overwritten")
    for record in records:
        target = folder / "imgs" / record.path
        target.parent.mkdir(parents=True, exist_ok=True)
        source = found.image_path(record).resolve()
        if images == "copy":
            shutil.copyfile(source, target)
        elif not target.is_symlink():
            os.symlink(source, target)
    # Last, so that no half dataset looks whole.
    annotations.write_text(_text(to, records, pictures), encoding="utf-8")
    return folder


def _check_captions(to: str, records: list[Record]) -> None:
    if LAYOUTS[to].one_caption:
        for record in records:
            if len(record.captions) != 1:
                raise DatasetError(
                    f"layout {to!r} holds one caption an image, record {record.number} ({record.path}) has "
                    f"{len(record.captions)}"
                )


def _text(to: str, records: list[Record], pictures: str) -> str:
    if to != CUSTOM:
        layout = LAYOUTS[to]
        return json.dumps(
            [make_record(layout, record.split, record.identity, record.path, record.captions) for record in records]
        )
    lines = [
        {"path": pictures + record.path, "caption": caption, "identity": record.identity, "split": record.split}
        for record in records
        for caption in record.captions
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)
