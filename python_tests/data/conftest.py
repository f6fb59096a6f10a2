"""A small generated corpus, made once, and a hand-written one with the quirks of the real file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcr2s_ext.data import generate_corpus

PARAMETERS = {"identities": (14, 4, 5), "views": 4, "captions_per_image": 2, "seed": 3, "single_view_fraction": 0.2}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("generated")
    generate_corpus(root, **PARAMETERS)
    return root


@pytest.fixture
def write_corpus(tmp_path):
    """Writes records in CUHK-PEDES' layout, with an image for each of their paths."""

    def write(records, *, images=True, encoding="utf-8") -> Path:
        folder = tmp_path / "CUHK-PEDES"
        folder.mkdir(exist_ok=True)
        # JSON's escapes, which may stand for half a surrogate pair, or the characters themselves.
        text = json.dumps(records, ensure_ascii=encoding == "utf-8")
        (folder / "reid_raw.json").write_bytes(text.encode(encoding))
        for number, record in enumerate(records if images else []):
            if isinstance(record, dict) and isinstance(record.get("file_path"), str):
                path = folder / "imgs" / record["file_path"].replace("\\", "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.full((40, 20, 3), number * 20 % 256, dtype=np.uint8)
                Image.fromarray(pixels).save(path)
        return tmp_path

    return write


def make_record(path="a/1.png", identity=1, split="train", captions=("A man in a red coat.",), **others):
    return {"split": split, "captions": list(captions), "file_path": path, "id": identity, **others}


@pytest.fixture(name="record")
def record_fixture():
    return make_record
