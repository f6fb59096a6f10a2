"""The other datasets' layouts, a table of one's own, conversion between them, and decoded images kept on disk."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcr2s_ext.data import DatasetError, ImageStore, check_dataset, convert_dataset, generate_corpus, load_dataset
from lcr2s_ext.data.layouts import LAYOUTS

SMALL = {"views": 3, "seed": 5, "size": (32, 16), "single_view_fraction": 0.0}


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 20, 3), value, dtype=np.uint8)).save(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generated_in_every_layout(layout: str, tmp_path: Path) -> None:
    style = LAYOUTS[layout]
    val = 2 if "val" in style.counts else 0
    folder = generate_corpus(tmp_path, identities=(4, val, 3), layout=layout, **SMALL)
    assert folder == tmp_path / style.folder
    records = json.loads((folder / style.annotation_files[0]).read_text())
    assert all(style.path_key in record and ("processed_tokens" in record) == style.tokens for record in records)
    assert min(record["id"] for record in records) == style.first_id
    splits = load_dataset(layout, tmp_path)
    captions = 1 if style.one_caption else 2
    assert [(s.num_identities, s.num_images, len(s)) for s in splits.values()] == [
        (n, 3 * n, 3 * n * captions) for n in (4, val, 3)
    ]
    report = check_dataset(layout, tmp_path)
    assert (report.errors, report.warnings, report.notes) == ([], [], [])


def test_defaults_follow_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"identities\[1\] must be 0 for layout 'icfg-pedes'.*got 2"):
        generate_corpus(tmp_path, identities=(4, 2, 3), layout="icfg-pedes")
    with pytest.raises(ValueError, match=r"captions_per_image must be 1 for layout 'icfg-pedes', got 2"):
        generate_corpus(tmp_path, identities=(4, 0, 3), captions_per_image=2, layout="icfg-pedes")
    with pytest.raises(ValueError, match=r"layout must be one of cuhk-pedes, icfg-pedes, rstpreid, got 'market'"):
        generate_corpus(tmp_path, layout="market")


def test_both_names_of_icfg(tmp_path: Path) -> None:
    folder = generate_corpus(tmp_path, identities=(3, 0, 2), layout="icfg-pedes", **SMALL)
    (folder / "ICFG-PEDES.json").rename(folder / "ICFG_PEDES.json")
    assert load_dataset("icfg-pedes", folder)["train"].num_identities == 3
    (folder / "ICFG_PEDES.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ICFG-PEDES\.json and .*ICFG_PEDES\.json"):
        load_dataset("icfg-pedes", folder)


def test_published_counts(tmp_path: Path) -> None:
    folder = generate_corpus(tmp_path, identities=(3, 0, 2), layout="icfg-pedes", **SMALL)
    (folder / "generated.json").unlink()
    report = check_dataset("icfg-pedes", tmp_path)
    assert report.exit_code == 0
    assert "not the whole ICFG-PEDES: published are train 3102 / 34674 / 34674; val 0 / 0 / 0" in report.notes[0]
    assert "note: not the whole" in report.format()
    records = json.loads((folder / "ICFG-PEDES.json").read_text())
    records[0]["captions"].append("Another sentence.")
    (folder / "ICFG-PEDES.json").write_text(json.dumps(records))
    assert f"record 1 ({records[0]['file_path']}) has 2 captions, ICFG-PEDES has one" in (
        check_dataset("icfg-pedes", tmp_path).warnings
    )


def test_the_published_counts_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = generate_corpus(tmp_path, identities=(3, 1, 2), layout="rstpreid", **SMALL)
    (folder / "generated.json").unlink()
    counts = {"train": (3, 9, 18), "val": (1, 3, 6), "test": (2, 6, 12)}
    monkeypatch.setitem(LAYOUTS, "rstpreid", dataclasses.replace(LAYOUTS["rstpreid"], counts=counts))
    assert check_dataset("rstpreid", tmp_path).notes == ["the counts are those published for RSTPReid"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_of_ones_own(suffix: str, tmp_path: Path) -> None:
    rows = [
        ("photos/a 1.png", 'A man, "tall", in a coat.', "person b", "train"),
        ("photos/a 1.png", "Another\tsentence.", "person b", "Train"),
        ("photos/2.png", "A woman.", "person a", "train"),
        ("photos\\3.png", "Somebody.", "person c", "TEST"),
    ]
    keys = ("path", "caption", "identity", "split")
    file = tmp_path / f"annotations.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="", encoding="utf-8-sig") as text:
            csv.writer(text).writerows([keys, *rows])
    else:
        file.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows) + "\n\n")
    for name in ("a 1", "2", "3"):
        picture(tmp_path / "photos" / f"{name}.png")
    for root in (tmp_path, file):
        splits = load_dataset("custom", root)
        train = splits["train"]
        assert train.captions == ['A man, "tall", in a coat.', "Another sentence.", "A woman."]
        assert train.caption_image.tolist() == [0, 0, 1]
        assert train.image_ids.tolist() == [1, 0]  # names are numbered in sorted order
        assert train.image_paths[0] == tmp_path / "photos" / "a 1.png"
        assert (len(splits["val"]), len(splits["test"])) == (0, 1)
    assert check_dataset("custom", tmp_path).exit_code == 0


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    (tmp_path / "annotations.csv").write_text("path,caption,identity,split\na.png,x,12,train\nb.png,y,-3,train\n")
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    assert load_dataset("custom", tmp_path)["train"].image_ids.tolist() == [12, -3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption,split\n", r"must name the columns path, caption, identity, split; missing: identity"),
        ("path,caption,identity,split\na.png,x,1\n", r"record 1 has no 'split'"),
        ("path,caption,identity,split\na.png,x,,train\n", r"record 1 'identity' must be an integer or a name"),
        (
            "path,caption,identity,split\na.png,x,1,dev\n",
            r"record 1 'split' must be one of train, val, test, got 'dev'",
        ),
        (
            "path,caption,identity,split\n../a.png,x,1,train\n",
            r"record 1 'path' must be relative to the table's folder",
        ),
        ("path,caption,identity,split\na.png,x,1,train\na.png,y,2,train\n", r"record 2 gives a\.png another identity"),
        (f"path,caption,identity,split\na.png,x,{2**63},train\n", r"record 1 'identity' must fit 64 bits"),
    ],
)
def test_tables_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "annotations.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_dataset("custom", tmp_path)


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotations\.csv and .*annotations\.jsonl"):
        load_dataset("custom", tmp_path)
    (tmp_path / "list.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"a custom dataset is a \.csv or a \.jsonl file, got \.txt"):
        load_dataset("custom", tmp_path / "list.txt")
    (tmp_path / "annotations.jsonl").write_text('{"path": "a.png"\n')
    with pytest.raises(DatasetError, match="line 1 is not valid JSON"):
        load_dataset("custom", tmp_path)


@pytest.mark.parametrize("images", ["link", "copy"])
@pytest.mark.parametrize("to", ["rstpreid", "cuhk-pedes", "custom"])
def test_conversion_keeps_everything(to: str, images: str, tmp_path: Path) -> None:
    generate_corpus(tmp_path / "from", identities=(4, 2, 3), **SMALL)
    folder = convert_dataset("cuhk-pedes", tmp_path / "from", to, tmp_path / "to", images=images)
    before, after = load_dataset("cuhk-pedes", tmp_path / "from"), load_dataset(to, folder)
    for split, old in before.items():
        new = after[split]
        assert new.captions == old.captions
        assert torch.equal(new.image_ids, old.image_ids)
        assert torch.equal(new.caption_image, old.caption_image)
        for theirs, ours in zip(old.image_paths, new.image_paths, strict=True):
            assert ours.read_bytes() == theirs.read_bytes()
            assert ours.is_symlink() == (images == "link")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_dataset("cuhk-pedes", tmp_path / "from", to, tmp_path / "to", images=images)


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    folder = generate_corpus(tmp_path, identities=(3, 1, 2), **SMALL)
    with pytest.raises(DatasetError, match=r"'icfg-pedes' holds one caption an image, record 1 .* has 2"):
        convert_dataset("cuhk-pedes", tmp_path, "icfg-pedes", tmp_path / "out")
    with pytest.raises(ValueError, match=r"images must be one of link, copy, got 'move'"):
        convert_dataset("cuhk-pedes", tmp_path, "rstpreid", tmp_path / "out", images="move")
    next((folder / "imgs").rglob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names 1 image\(s\) that are missing"):
        convert_dataset("cuhk-pedes", tmp_path, "rstpreid", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_decoded_images_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for n, path in enumerate(paths):
        picture(path, 30 * n)
    cache = tmp_path / "cache"
    plain = ImageStore(paths, (32, 16), cache=False)
    stored = ImageStore(paths, (32, 16), cache_dir=cache)
    assert not cache.exists()
    assert torch.equal(stored.load([3, 1]), plain.load([3, 1]))
    (file,) = cache.iterdir()
    # A second store reads the file and decodes nothing.
    monkeypatch.setattr("lcr2s_ext.data.datasets.decode_image", None)
    again = ImageStore(paths, (32, 16), cache_dir=cache)
    assert torch.equal(again.all(), stored.all())
    again.all()[0] += 1  # reaches neither the file nor another store
    assert torch.equal(ImageStore(paths, (32, 16), cache_dir=cache).all(), stored.all())
    monkeypatch.undo()
    # Another size or a changed image is another file.
    ImageStore(paths, (16, 8), cache_dir=cache).all()
    picture(paths[0], 200)
    changed = ImageStore(paths, (32, 16), cache_dir=cache)
    assert int(changed.all()[0].max()) == 200
    assert len(list(cache.iterdir())) == 3
    assert file in cache.iterdir()


def test_a_cache_that_fails_leaves_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")
    store = ImageStore([tmp_path / "0.png", tmp_path / "1.png"], (8, 8), cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match=r"1\.png cannot be decoded"):
        store.all()
    assert list((tmp_path / "cache").iterdir()) == []
