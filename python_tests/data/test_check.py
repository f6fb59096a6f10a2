"""What `lcr2s data check` reports, and its exit code."""

import numpy as np
import pytest
from PIL import Image

from lcr2s_ext.data import check_dataset


def test_a_clean_corpus(write_corpus, record):
    root = write_corpus([record("a/1.png"), record("a/2.png"), *(record(f"b/{n}.png", 2, "VAL") for n in (1, 2))])
    (root / "CUHK-PEDES" / "imgs" / "a" / "more.png").write_text("not listed, not looked at")
    report = check_dataset("cuhk-pedes", root)
    assert report.errors == []
    assert report.warnings == ["split test is empty"]
    assert report.exit_code == 0
    assert [(row.split, row.identities, row.images, row.captions) for row in report.table] == [
        ("train", 1, 2, 2),
        ("val", 1, 2, 2),
        ("test", 0, 0, 0),
    ]
    lines = report.format().splitlines()
    assert lines[0].split() == ["split", "identities", "images", "captions"]
    assert lines[1].split() == ["train", "1", "2", "2"]
    assert lines[-1] == "0 error(s), 1 warning(s)"


def test_warnings_leave_the_exit_code_at_0(write_corpus, record):
    root = write_corpus(
        [
            record("a/1.png", 1, captions=["Caf\u00e9.", "Plain.", "Tab\there"]),
            record("a/2.png", 1, captions=["", "  two  spaces"]),
            record("b/1.png", 2, "test"),
            record("c/1.png", 3, "val", []),
        ]
    )
    report = check_dataset("cuhk-pedes", root)
    assert report.exit_code == 0
    text = "\n".join(report.warnings)
    assert r"record 1 (a/1.png): odd characters or whitespace in caption 0, 2: 'Caf\xe9.'" in text
    assert "record 2 (a/2.png): caption 0 is empty" in text
    assert "record 2 (a/2.png): odd characters or whitespace in caption 1" in text
    assert "identity 2 (test) has a single view" in text
    assert "record 4 (c/1.png) has no captions" in text
    assert "identity 1 " not in text


def test_every_error_is_listed(write_corpus, record):
    root = write_corpus(
        [
            record("a/1.png"),
            record("a/2.png"),
            record("a/3.png"),
            record("a/1.png", captions=["Again."]),
            {"split": "train", "captions": [], "file_path": "a/1.png"},
            record("a/4.png", 1, "test"),
        ]
    )
    imgs = root / "CUHK-PEDES" / "imgs" / "a"
    (imgs / "2.png").unlink()
    (imgs / "3.png").write_text("no image")
    report = check_dataset("cuhk-pedes", root)
    assert report.exit_code == 1
    text = "\n".join(report.errors)
    assert len(report.errors) == 5
    assert "record 5 has no 'id'" in text
    assert "record 4 is a duplicate of record 1: both are a/1.png" in text
    assert f"record 2: image {imgs / '2.png'} is missing" in text
    assert f"record 3: image {imgs / '3.png'} is unreadable" in text
    assert "identity 1 is in several splits: test, train" in text
    assert "error: record 5 has no 'id'" in report.format()


def test_a_truncated_image_is_unreadable(write_corpus, record):
    root = write_corpus([record()])
    path = root / "CUHK-PEDES" / "imgs" / "a" / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:400])
    report = check_dataset("cuhk-pedes", root)
    assert report.exit_code == 1
    assert "unreadable" in report.errors[0]


def test_nothing_there(tmp_path):
    report = check_dataset("cuhk-pedes", tmp_path / "nowhere")
    assert report.exit_code == 1
    assert "reid_raw.json" in report.format()
    with pytest.raises(ValueError, match="name must be one of"):
        check_dataset("market", tmp_path)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "reid_raw.json").write_text("[")
    assert "not valid JSON" in check_dataset("cuhk-pedes", tmp_path).errors[0]


def test_the_generated_corpus_has_no_errors(corpus):
    report = check_dataset("cuhk-pedes", corpus)
    assert report.errors == []
    assert [row.identities for row in report.table] == [14, 4, 5]
    assert all("single view" in warning for warning in report.warnings)
    assert len(report.warnings) == 5
