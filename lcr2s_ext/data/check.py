"""What ``lcr2s data check`` finds: a table of a dataset's splits, and every problem in it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from lcr2s_ext.data.layouts import LAYOUTS, SPLITS, Layout, check_name
from lcr2s_ext.data.records import Annotations, DatasetError, Record, find_annotations, read_annotations


@dataclass
class SplitCounts:
    """One row of the table: how much a split holds. Records with errors are not counted."""

    split: str
    identities: int = 0
    images: int = 0
    captions: int = 0


@dataclass
class CheckReport:
    """What was found.

    Attributes:
        table: Counts of train, val and test.
        errors: One message for each missing or unreadable image, unusable record, duplicate, and identity in several
            splits.
        warnings: One message for each identity with a single view and for odd characters, empty captions and the like.
        notes: How the counts compare with the published ones.
    """

    table: list[SplitCounts] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 with any error, 0 otherwise."""
        return 1 if self.errors else 0

    def format(self) -> str:
        """The report as text: the table, the errors, the warnings, a last line with their number."""
        rows = [("split", "identities", "images", "captions")]
        rows += [(row.split, str(row.identities), str(row.images), str(row.captions)) for row in self.table]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))])
            for row in rows
        ]
        lines += [f"note: {message}" for message in self.notes]
        lines += [f"error: {message}" for message in self.errors]
        lines += [f"warning: {message}" for message in self.warnings]
        lines.append(f"{len(self.errors)} error(s), {len(self.warnings)} warning(s)")
        return "\n".join(lines)


def _check_image(path: Path) -> str | None:
    """What is wrong with an image file, None where nothing is."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        return "missing"
    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"unreadable: {error}"
    return None


def _duplicates(records: list[Record]) -> list[str]:
    first: dict[str, Record] = {}
    messages = []
    for record in records:
        known = first.setdefault(record.path, record)
        if known is not record:
            messages.append(f"record {record.number} is a duplicate of record {known.number}: both are {record.path}")
    return messages


def check_dataset(name: str, root: str | Path) -> CheckReport:
    """Reads a dataset to the last image and lists every problem.

    Args:
        name: "cuhk-pedes", "icfg-pedes", "rstpreid" or "custom".
        root: Folder that holds the dataset's folder, or that folder itself; of a custom dataset its folder or file.

    Raises:
        TypeError, ValueError: An unknown dataset. Whatever is wrong on disk, a missing annotation file included, is an
            error in the report.
    """
    report = CheckReport()
    try:
        found = read_annotations(name, root)
    except (FileNotFoundError, DatasetError) as error:
        report.errors.append(str(error))
        return report
    report.errors += found.errors
    report.warnings += found.warnings
    if not found.records and not found.errors:
        report.errors.append(f"{found.file} holds no records")
    report.errors += _duplicates(found.records)
    _check_images(found, report)
    views: dict[int, set[str]] = defaultdict(set)
    splits: dict[int, set[str]] = defaultdict(set)
    for record in found.records:
        views[record.identity].add(record.path)
        splits[record.identity].add(record.split)
    for identity in sorted(splits):
        if len(splits[identity]) > 1:
            report.errors.append(f"identity {identity} is in several splits: {', '.join(sorted(splits[identity]))}")
    for identity in sorted(views):
        if len(views[identity]) == 1:
            where = next(iter(splits[identity]))
            report.warnings.append(f"identity {identity} ({where}) has a single view: its support set is empty")
    for split in SPLITS:
        own = [record for record in found.records if record.split == split]
        report.table.append(
            SplitCounts(
                split,
                len({record.identity for record in own}),
                len({record.path for record in own}),
                sum(len(record.captions) for record in own),
            )
        )
    layout = LAYOUTS.get(check_name(name))
    published = layout.counts if layout else dict.fromkeys(SPLITS)
    for row in report.table:
        if not row.images and row.split in published:
            report.warnings.append(f"split {row.split} is empty")
    if layout:
        if layout.one_caption:
            several = [record for record in found.records if len(record.captions) > 1]
            report.warnings += [
                f"record {record.number} ({record.path}) has {len(record.captions)} captions, {layout.folder} has one"
                for record in several
            ]
        _compare_with_published(report, layout, find_annotations(name, root)[0])
    return report


def _compare_with_published(report: CheckReport, layout: Layout, folder: Path) -> None:
    """Counts beside the published ones; a generated corpus says itself that it is not the dataset."""
    if (folder / "generated.json").exists():
        return
    found = {row.split: (row.identities, row.images, row.captions) for row in report.table}
    expected = {split: layout.counts.get(split, (0, 0, 0)) for split in SPLITS}
    if found == expected:
        report.notes.append(f"the counts are those published for {layout.folder}")
    else:
        published = "; ".join(f"{split} {' / '.join(map(str, expected[split]))}" for split in SPLITS)
        report.notes.append(
            f"not the whole {layout.folder}: published are {published} (identities / images / captions)"
        )


def _check_images(found: Annotations, report: CheckReport) -> None:
    seen: set[str] = set()
    for record in found.records:
        if record.path in seen:
            continue
        seen.add(record.path)
        problem = _check_image(found.image_path(record))
        if problem is not None:
            report.errors.append(f"record {record.number}: image {found.image_path(record)} is {problem}")
