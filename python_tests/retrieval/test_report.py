"""The page of ranked retrievals: self-contained, escaped, right ones framed."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lcr2s_ext.retrieval import RetrievalFeatures
from lcr2s_ext.retrieval.report import RankedQuery, rank_queries, write_report


class _Page(HTMLParser):
    """Collects what a browser would load, frame and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.frames: list[bool] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.resources += [values[key] or "" for key in ("src", "href", "srcset", "data") if key in values]
        if tag == "figure":
            self.frames.append(values.get("class") == "right")

    def handle_data(self, data: str) -> None:
        self.text += data


def _pictures(count: int, size: tuple[int, int] = (16, 8)) -> list[torch.Tensor]:
    return [torch.full((3, *size), 20 * number, dtype=torch.uint8) for number in range(count)]


def test_page_holds_sentence_thumbnails_and_frames(tmp_path: Path) -> None:
    queries = [
        RankedQuery("a man in red", _pictures(10), [number in (0, 4) for number in range(10)], [0.5] * 10, "a note"),
        RankedQuery("a woman in blue", _pictures(3)),
    ]
    path = write_report(
        tmp_path / "deep" / "page.html", queries, title="T", notes=["N"], table=[{"arm": "(d)", "R@1": 1}]
    )
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.frames == [True, False, False, False, True] + [False] * 5 + [False] * 3
    assert page.tags.count("img") == 13
    for words in ("a man in red", "a woman in blue", "a note", "T", "N", "(d)"):
        assert words in page.text


def test_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(tmp_path / "page.html", [RankedQuery("x", _pictures(2))])
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text


def test_thumbnails_are_the_images(tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    Image.new("RGB", (8, 16), (1, 2, 3)).save(file)
    images = [
        file,
        str(file),
        Image.new("RGB", (8, 16), (1, 2, 3)),
        torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 8),
    ]
    path = write_report(tmp_path / "page.html", [RankedQuery("x", images)])
    embedded = re.findall(r"base64,([A-Za-z0-9+/=]+)", path.read_text(encoding="utf-8"))
    assert len(embedded) == 4
    for data in embedded:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (8, 16)
            assert picture.convert("RGB").getpixel((3, 5)) == (1, 2, 3)


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"quotes\""
    path = write_report(
        tmp_path / "page.html",
        [RankedQuery(evil, _pictures(1), note=evil)],
        title=evil,
        notes=[evil],
        table=[{evil: evil}],
        preformatted=evil,
    )
    page = _Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(evil) == 8


def test_large_pictures_become_thumbnails(tmp_path: Path) -> None:
    path = write_report(tmp_path / "page.html", [RankedQuery("x", [Image.new("RGB", (500, 1000))])])
    data = re.findall(r"base64,([A-Za-z0-9+/=]+)", path.read_text(encoding="utf-8"))[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (128, 256)


def test_wrong_arguments_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"queries\[0\]\.correct: expected none or one for each of 2 images, got 1"):
        write_report(tmp_path / "p.html", [RankedQuery("x", _pictures(2), [True])])
    with pytest.raises(ValueError, match=r"queries\[1\]\.scores"):
        write_report(tmp_path / "p.html", [RankedQuery("x", []), RankedQuery("x", _pictures(1), [True], [1.0, 2.0])])
    with pytest.raises(TypeError, match=r"queries\[0\]\.images"):
        write_report(tmp_path / "p.html", [RankedQuery("x", [3])])
    with pytest.raises(TypeError, match=r"uint8 tensors"):
        write_report(tmp_path / "p.html", [RankedQuery("x", [torch.zeros(3, 4, 4)])])
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "p.html", [RankedQuery("x", [tmp_path / "absent.png"])])


def _corpus() -> tuple[RetrievalFeatures, SimpleNamespace]:
    eye = torch.eye(4)
    # Three distinct images (the split lists the first one twice), two captions.
    features = RetrievalFeatures(
        image=torch.stack([eye[0], eye[1], eye[0] + eye[1]]),
        text=torch.stack([eye[0], eye[1] + 0.1 * eye[0]]),
        image_ids=torch.tensor([7, 9, 7]),
        text_ids=torch.tensor([7, 9]),
        image_rows=torch.tensor([0, 2, 3]),
    )
    split = SimpleNamespace(
        image_paths=["a.png", "a.png", "b.png", "c.png"],
        image_ids=torch.tensor([7, 7, 9, 7]),
        captions=["first", "second"],
        caption_image=torch.tensor([0, 2]),
        caption_ids=torch.tensor([7, 9]),
    )
    return features, split


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rank_queries_orders_marks_and_counts(backend: str) -> None:
    features, split = _corpus()
    first, second = rank_queries(features, split, [0, 1], k=10, backend=backend)
    assert first.images == ["a.png", "c.png", "b.png"]
    assert list(first.correct) == [True, True, False]
    assert first.scores == pytest.approx([1.0, 0.5**0.5, 0.0], abs=1e-6)
    assert first.note == "identity 7: 2 of its 2 images in the first 3"
    assert second.text == "second"
    assert second.images == ["b.png", "c.png", "a.png"]
    assert list(second.correct) == [True, False, False]


def test_rank_queries_refuses_what_is_not_there() -> None:
    features, split = _corpus()
    with pytest.raises(IndexError, match=r"queries: expected positions in \[0, 2\), got 0\.\.2"):
        rank_queries(features, split, [0, 2])
    with pytest.raises(ValueError, match="queries: expected at least one"):
        rank_queries(features, split, [])
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        rank_queries(features, split, [0], k=0)
