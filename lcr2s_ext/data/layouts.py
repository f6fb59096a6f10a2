"""How each dataset lies on disk: folder, annotation file, the keys of its records, and what its authors published."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Layout:
    """One dataset's files.

    Attributes:
        folder: Name of its folder; images lie in ``imgs/`` below it.
        annotation_files: Names that its annotation file goes by; the first is the one that is written.
        path_key: What its records call the path of the image.
        first_id: The smallest identity of its numbering.
        tokens: Whether its records hold ``processed_tokens``.
        one_caption: Whether every image has exactly one caption.
        counts: split -> (identities, images, captions) as published; a split that is missing does not exist.
    """

    folder: str
    annotation_files: tuple[str, ...]
    path_key: str
    first_id: int
    tokens: bool
    one_caption: bool
    counts: dict[str, tuple[int, int, int]]


LAYOUTS: dict[str, Layout] = {
    "cuhk-pedes": Layout(
        "CUHK-PEDES",
        ("reid_raw.json",),
        "file_path",
        1,
        True,
        False,
        {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)},
    ),
    "icfg-pedes": Layout(
        "ICFG-PEDES",
        ("ICFG-PEDES.json", "ICFG_PEDES.json"),
        "file_path",
        0,
        True,
        True,
        {"train": (3102, 34674, 34674), "test": (1000, 19848, 19848)},
    ),
    "rstpreid": Layout(
        "RSTPReid",
        ("data_captions.json",),
        "img_path",
        0,
        False,
        False,
        {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)},
    ),
}

CUSTOM = "custom"
"""A dataset of one's own: a table with one caption a row."""

CUSTOM_FILES: tuple[str, ...] = ("annotations.csv", "annotations.jsonl")
CUSTOM_COLUMNS = ("path", "caption", "identity", "split")

DATASETS = (*LAYOUTS, CUSTOM)
"""Names that the readers take."""


def check_name(name: object) -> str:
    """The name of a dataset in lower case.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: There is no such dataset.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name.lower() not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    return name.lower()
