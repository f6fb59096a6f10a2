"""A generated corpus in the layout of a real one, to learn and test with where the real one may not be distributed.

Nothing in it is photographed: pedestrians are drawn from 21 attribute slots, and sentences name a few of the slots
that their own picture shows. What makes the task like the real one is deliberate: identities come in families of three
that share all but six slots, each view hides something (a logo is seen from the front only, a print from behind only),
sentences leave colours out or get things wrong, and some identities have a single picture, hence an empty support set.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcr2s_ext.data import _people
from lcr2s_ext.data._painter import HEIGHT, NUM_CAMERAS, WIDTH, render
from lcr2s_ext.data._people import FAMILY_SIZE, Person, make_family, make_styles
from lcr2s_ext.data._sentences import COLOUR_OMITTED, WRONG_VALUE, choose_mentions, write_sentence
from lcr2s_ext.data._stream import Stream
from lcr2s_ext.data.layouts import LAYOUTS, SPLITS, Layout

_NUMBERS, _IMAGE, _CAPTION, _SINGLE, _ORDER = 11, 12, 13, 14, 15


@dataclass(frozen=True)
class _Picture:
    """One picture to be drawn and its sentences to be written."""

    seed: int
    split: int
    person: Person
    identity: int
    position: int
    view: str
    facing: str
    camera: int
    captions: int
    path: str
    size: tuple[int, int]


def _check_count(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def tokenize(caption: str) -> list[str]:
    """The words of a caption in lower case, as `processed_tokens` of the original file lists them."""
    return re.findall(r"[a-z0-9'-]+", caption.lower())


def make_record(layout: Layout, split: str, identity: int, path: str, captions: list[str]) -> dict[str, Any]:
    """One record as a layout's annotation file holds it."""
    record: dict[str, Any] = {"split": split, "captions": captions, layout.path_key: path}
    if layout.tokens:
        record["processed_tokens"] = [tokenize(caption) for caption in captions]
    return {**record, "id": identity}


def _draw(picture: _Picture, root: Path, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = (picture.split, picture.person.number, picture.position)
    image = render(
        picture.person,
        picture.view,
        picture.facing,
        picture.camera,
        Stream(picture.seed, _IMAGE, *keys),
        picture.size,
    )
    image.save(root / "imgs" / picture.path, compress_level=1)
    captions, mentioned = [], []
    for caption in range(picture.captions):
        stream = Stream(picture.seed, _CAPTION, *keys, caption)
        mentions = choose_mentions(picture.person, picture.view, picture.facing, stream)
        captions.append(write_sentence(mentions, stream))
        mentioned.append([asdict(mention) for mention in mentions])
    record = make_record(layout, SPLITS[picture.split], picture.identity, picture.path, captions)
    truth = {
        "file_path": picture.path,
        "id": picture.identity,
        "family": f"{SPLITS[picture.split]}-{picture.person.family}",
        "style": picture.person.style,
        "view": picture.view,
        "facing": picture.facing,
        "slots": picture.person.values,
        "visible": _people.visible_slots(picture.person, picture.view, picture.facing),
        "mentions": mentioned,
    }
    return record, truth


def _draw_all(pictures: list[_Picture], root: Path, layout: Layout) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [_draw(picture, root, layout) for picture in pictures]


def _plan(
    identities: tuple[int, int, int],
    views: int,
    captions_per_image: int,
    seed: int,
    size: tuple[int, int],
    single_view_fraction: float,
    layout: Layout,
) -> list[_Picture]:
    styles = make_styles(seed)
    first = layout.first_id
    numbers = iter(Stream(seed, _NUMBERS).shuffled(range(first, first + sum(identities))))
    pictures = []
    for split, count in enumerate(identities):
        people: list[Person] = []
        while len(people) < count:
            size_left = min(FAMILY_SIZE, count - len(people))
            people += make_family(seed, split, len(people) // FAMILY_SIZE, size_left, len(people), styles)
        single = set(Stream(seed, _SINGLE, split).shuffled(range(count))[: round(single_view_fraction * count)])
        for person in people:
            identity = next(numbers)
            stream = Stream(seed, _ORDER, split, person.number)
            order: list[str] = []
            while len(order) < views:
                order += stream.shuffled(_people.VIEWS)
            for position in range(1 if person.number in single else views):
                camera = stream.below(NUM_CAMERAS)
                # RSTPReid keeps its images in one folder, the others in one a source.
                where = f"cam_{'abcde'[camera]}/{identity:05d}" if layout.tokens else f"{identity:04d}_c{camera + 1}"
                path = f"{where}_{position:02d}.png"
                facing = stream.choice(("left", "right")) if order[position] == "side" else ""
                picture = _Picture(
                    seed=seed,
                    split=split,
                    person=person,
                    identity=identity,
                    position=position,
                    view=order[position],
                    facing=facing,
                    camera=camera,
                    captions=captions_per_image,
                    path=path,
                    size=size,
                )
                pictures.append(picture)
    return Stream(seed, _ORDER).shuffled(pictures)


def _remove_earlier(folder: Path, annotations: Path) -> None:
    """Removes the pictures of an earlier generated corpus, and its list first, so that no half corpus looks whole."""
    listing = folder / "truth.json"
    annotations.unlink(missing_ok=True)
    if listing.exists():
        for truth in json.loads(listing.read_text(encoding="utf-8")):
            (folder / "imgs" / truth["file_path"]).unlink(missing_ok=True)
        listing.unlink()


def generate_corpus(
    root: str | Path,
    *,
    identities: tuple[int, int, int] | None = None,
    views: int = 4,
    captions_per_image: int | None = None,
    seed: int = 0,
    size: tuple[int, int] = (64, 32),
    single_view_fraction: float = 0.05,
    layout: str = "cuhk-pedes",
    workers: int = 1,
) -> Path:
    """Draws the corpus and writes it to disk as a dataset's folder: annotation file and ``imgs/``.

    Beside what the original has there are ``README.txt`` and ``generated.json``, which say that the corpus is generated
    and with which parameters, and ``truth.json``, which lists for every picture what it shows and what each of its
    captions names. Readers ignore the three.

    Args:
        root: Folder to hold the dataset's folder, such as ``CUHK-PEDES/``; made where it is missing.
        identities: Number of identities in train, val and test; (300, 100, 150) by default, without val where the
            layout's dataset has none.
        views: Pictures of an identity. Its first three views are front, back and side in random order.
        captions_per_image: Sentences of a picture; 2 by default, 1 where the layout's dataset has one.
        seed: Seed that, with the other arguments, determines every byte of the captions and every pixel.
        size: Height and width of the stored pictures in pixels; they are drawn at 128 x 64.
        single_view_fraction: Part of each split's identities that have one picture only.
        layout: Layout on disk: "cuhk-pedes", "icfg-pedes" (one caption an image, no val) or "rstpreid".
        workers: Processes that draw. More than one pays for large corpora only, and does not change the result.

    Returns:
        The dataset's folder below ``root``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range, an unknown layout, or what the layout cannot hold.
        FileExistsError: The folder holds a corpus that was not generated by this function.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    style = LAYOUTS[layout]
    if identities is None:
        identities = (300, 100 if "val" in style.counts else 0, 150)
    if captions_per_image is None:
        captions_per_image = 1 if style.one_caption else 2
    if not isinstance(identities, (tuple, list)) or len(identities) != 3:
        raise TypeError(f"identities must be three ints (train, val, test), got {identities!r}")
    counts = (
        _check_count("identities[0]", identities[0], 1),
        _check_count("identities[1]", identities[1], 0),
        _check_count("identities[2]", identities[2], 0),
    )
    _check_count("views", views, 1)
    _check_count("captions_per_image", captions_per_image, 1)
    _check_count("seed", seed, 0)
    _check_count("workers", workers, 1)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size must be two ints (height, width), got {size!r}")
    height, width = _check_count("size[0]", size[0], 8), _check_count("size[1]", size[1], 8)
    if not isinstance(single_view_fraction, (int, float)) or isinstance(single_view_fraction, bool):
        raise TypeError(f"single_view_fraction must be a float, got {single_view_fraction!r}")
    if not 0.0 <= single_view_fraction <= 1.0:
        raise ValueError(f"single_view_fraction must be in [0, 1], got {single_view_fraction}")
    if style.one_caption and captions_per_image != 1:
        raise ValueError(f"captions_per_image must be 1 for layout {layout!r}, got {captions_per_image}")
    if "val" not in style.counts and counts[1]:
        raise ValueError(f"identities[1] must be 0 for layout {layout!r}, which has no val split, got {counts[1]}")

    folder = Path(root) / style.folder
    annotations = folder / style.annotation_files[0]
    if annotations.exists() and not (folder / "generated.json").exists():
        raise FileExistsError(f"{folder} holds a corpus that was not generated; it is not overwritten")
    _remove_earlier(folder, annotations)
    pictures = _plan(counts, views, captions_per_image, seed, (height, width), float(single_view_fraction), style)
    for parent in sorted({Path(picture.path).parent for picture in pictures}):
        (folder / "imgs" / parent).mkdir(parents=True, exist_ok=True)
    if workers == 1:
        drawn = _draw_all(pictures, folder, style)
    else:
        chunks = [pictures[start::workers] for start in range(workers)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            parts = list(pool.map(_draw_all, chunks, [folder] * workers, [style] * workers))
        drawn = [parts[position % workers][position // workers] for position in range(len(pictures))]

    parameters = {
        "identities": list(counts),
        "views": views,
        "captions_per_image": captions_per_image,
        "seed": seed,
        "size": [height, width],
        "single_view_fraction": float(single_view_fraction),
        "layout": layout,
    }
    manifest = {
        "generated": True,
        "by": "lcr2s_ext.data.synth.generate_corpus",
        "parameters": parameters,
        "images": len(drawn),
        "captions": len(drawn) * captions_per_image,
        "drawn_at": [HEIGHT, WIDTH],
        "colour_omitted": COLOUR_OMITTED,
        "wrong_value": WRONG_VALUE,
    }
    (folder / "truth.json").write_text(json.dumps([truth for _, truth in drawn]), encoding="utf-8")
    (folder / "README.txt").write_text(
        f"This corpus is GENERATED. It is not {style.folder}: it only has that dataset's layout on disk.\n"
        "Every picture is drawn and every sentence is put together by lcr2s_ext.data.synth.generate_corpus;\n"
        "figures measured on it say nothing about figures on the real dataset.\n\n"
        f"Parameters: {json.dumps(parameters)}\n"
        "truth.json lists what every picture shows and what its captions name.\n",
        encoding="utf-8",
    )
    annotations.write_text(json.dumps([record for record, _ in drawn]), encoding="utf-8")
    (folder / "generated.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder
