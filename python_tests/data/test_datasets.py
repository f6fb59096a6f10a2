"""The reader and its quirks, and the image store."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lcr2s_ext.data import DatasetError, ImageFileError, ImageStore, load_dataset, make_split


def test_quirks_of_the_file(write_corpus, record):
    root = write_corpus(
        [
            record(
                "CUHK01/07.png", 7, "TRAIN", ["A  man\twith\r\na hat. ", "Caf\u00e9 \u201cred\u201d\ufffd coat\x00"]
            ),
            record("CUHK01\\03.png", 3, "Train", ["Broken \ud83d surrogate."], processed_tokens=[["broken"]]),
            record("a/4.png", 3, " train", ["Another view.", "One more.", "And a third."]),
            record("b/9.png", 900, "VAL"),
            record("b/10.png", 901, "test", []),
            record("b/11.png", 901, "Test", ["x", ""]),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load_dataset("cuhk-pedes", root)
    train = splits["train"]
    assert list(splits) == ["train", "val", "test"]
    assert train.captions == [
        "A man with a hat.",
        "Caf\u00e9 \u201cred\u201d\ufffd coat",
        "Broken surrogate.",
        "Another view.",
        "One more.",
        "And a third.",
    ]
    assert train.image_paths[1] == root / "CUHK-PEDES" / "imgs" / "CUHK01" / "03.png"
    assert train.image_ids.tolist() == [7, 3, 3]
    assert train.caption_image.tolist() == [0, 0, 1, 2, 2, 2]
    assert train.caption_ids.tolist() == [7, 7, 3, 3, 3, 3]
    assert train.labels.tolist() == [1, 1, 0, 0, 0, 0]
    assert train.image_labels.tolist() == [1, 0, 0]
    assert train.num_identities == 2
    assert all(t.dtype == torch.int64 for t in (train.labels, train.image_ids, train.caption_ids, train.caption_image))
    assert (len(splits["val"]), splits["val"].num_images) == (1, 1)
    # An image without a caption stays in the gallery.
    assert (len(splits["test"]), splits["test"].num_images) == (2, 2)


def test_root_may_be_the_folder_itself_and_a_split_may_be_absent(write_corpus, record):
    root = write_corpus([record()])
    splits = load_dataset("CUHK-PEDES", str(root / "CUHK-PEDES"))
    assert len(splits["train"]) == 1
    assert len(splits["val"]) == splits["val"].num_images == splits["val"].num_identities == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_encodings(write_corpus, record, encoding):
    root = write_corpus([record(captions=["A caf\u00e9 owner."])], encoding=encoding)
    assert load_dataset("cuhk-pedes", root)["train"].captions == ["A caf\u00e9 owner."]


def test_missing_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/CUHK-PEDES/reid_raw\.json.*nowhere does not exist"):
        load_dataset("cuhk-pedes", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"the folder that holds CUHK-PEDES/"):
        load_dataset("cuhk-pedes", tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of cuhk-pedes, icfg-pedes, rstpreid, custom, got 'market'"):
        load_dataset("market", tmp_path)
    with pytest.raises(TypeError, match="name must be a string"):
        load_dataset(3, tmp_path)
    with pytest.raises(TypeError, match="root must be a path"):
        load_dataset("cuhk-pedes", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "record 2 'id' must be an integer, got None"),
        ({"id": "12"}, "record 2 'id' must be an integer, got '12'"),
        ({"id": True}, "record 2 'id' must be an integer, got True"),
        ({"id": 1.0}, "record 2 'id' must be an integer, got 1.0"),
        ({"split": "trian"}, "record 2 'split' must be one of train, val, test, got 'trian'"),
        ({"split": 3}, "record 2 'split' must be a string"),
        ({"captions": "A man."}, "record 2 'captions' must be a list of strings, got 'A man.'"),
        ({"captions": ["A man.", 5]}, "record 2 'captions' must be a list of strings, element 1 is 5"),
        ({"file_path": ""}, "record 2 'file_path' must be a non-empty string"),
        ({"file_path": "/etc/passwd"}, "record 2 'file_path' must be relative"),
        ({"file_path": "../../x.png"}, "record 2 'file_path' must be relative"),
    ],
)
def test_records_of_the_wrong_type(write_corpus, record, change, message):
    root = write_corpus([record(), record("a/2.png") | change], images=False)
    with pytest.raises(DatasetError, match=message.replace("[", r"\[")):
        load_dataset("cuhk-pedes", root)


def test_missing_keys_and_other_records(write_corpus, record):
    without = {key: value for key, value in record().items() if key not in ("id", "split")}
    root = write_corpus([without, [1]], images=False)
    with pytest.raises(
        DatasetError, match=r"record 1 has no 'id' and no 'split'; record 2 must be an object, got \[1\]"
    ):
        load_dataset("cuhk-pedes", root)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("{}", "must hold a list.*dict"), ("[]", "no records")]
)
def test_files_that_are_no_list(tmp_path, text, message):
    (tmp_path / "reid_raw.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_dataset("cuhk-pedes", tmp_path)


def test_missing_images_are_named(write_corpus, record):
    root = write_corpus([record("a/1.png"), record("a/2.png"), record("a/3.png")])
    for name in ("1.png", "3.png"):
        (root / "CUHK-PEDES" / "imgs" / "a" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 image\(s\).*a/1\.png; .*a/3\.png"):
        load_dataset("cuhk-pedes", root)


def test_an_image_listed_twice_is_kept_once(write_corpus, record):
    root = write_corpus([record(captions=["One.", "Two."]), record("a/2.png"), record(captions=["Two.", "Three."])])
    train = load_dataset("cuhk-pedes", root)["train"]
    assert train.num_images == 2
    assert train.captions == ["One.", "Two.", "Three.", "A man in a red coat."]
    root = write_corpus([record(), record(identity=2)])
    with pytest.raises(DatasetError, match=r"records 1 and 2 are the same image a/1\.png.*identity 1.*identity 2"):
        load_dataset("cuhk-pedes", root)


def test_identities_in_several_splits_are_warned_of(write_corpus, record):
    root = write_corpus([record(), record("a/2.png", split="test")])
    with pytest.warns(UserWarning, match="identities in more than one split.*: 1"):
        load_dataset("cuhk-pedes", root)


def test_make_split_checks_its_lists():
    with pytest.raises(ValueError, match="image_ids must have as many"):
        make_split("x", "train", ["a"], [1, 2], [], [])
    with pytest.raises(ValueError, match=r"caption_image must lie in \[0, 1\), got 1"):
        make_split("x", "train", ["a"], [1], ["c"], [1])


@pytest.mark.parametrize("cache", [True, False])
def test_image_store(tmp_path, cache):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (16, 8, 3), dtype=np.uint8) for _ in range(3)]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    Image.fromarray(arrays[2][..., 0]).save(tmp_path / "grey.png")
    Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "large.png")
    store = ImageStore([*paths, tmp_path / "grey.png", tmp_path / "large.png"], (16, 8), cache=cache)
    assert len(store) == 5
    loaded = store.load(torch.tensor([2, 0, 2, 3]))
    assert loaded.dtype == torch.uint8
    assert loaded.shape == (4, 3, 16, 8)
    for got, expected in zip(loaded, [arrays[2], arrays[0], arrays[2], arrays[2][..., :1].repeat(3, 2)], strict=True):
        assert np.array_equal(got.numpy(), expected.transpose(2, 0, 1))
    assert store[4][:, 0, 0].tolist() == [10, 20, 30]
    assert torch.equal(store.all()[:3], store.load([0, 1, 2]))
    if cache:
        loaded.zero_()
        paths[2].unlink()
        assert np.array_equal(store[2].numpy(), arrays[2].transpose(2, 0, 1))
    with pytest.raises(IndexError, match=r"\[0, 5\), got 0\.\.5"):
        store.load([0, 5])
    with pytest.raises(IndexError, match="got -6"):
        store[-6]


def test_files_that_are_no_images_are_named(tmp_path):
    good = tmp_path / "good.png"
    Image.new("RGB", (8, 16)).save(good)
    (tmp_path / "text.jpg").write_text("hello")
    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    store = ImageStore([good, tmp_path / "text.jpg", tmp_path / "cut.png", tmp_path / "none.png"], (16, 8))
    for index, error, name in (
        (1, ImageFileError, "text.jpg"),
        (2, ImageFileError, "cut.png"),
        (3, OSError, "none.png"),
    ):
        with pytest.raises(error, match=name):
            store.load([index])
    assert store.load([0]).shape == (1, 3, 16, 8)


def test_image_store_arguments():
    with pytest.raises(TypeError, match="size must be two ints"):
        ImageStore([], 32)
    with pytest.raises(ValueError, match="size must be positive"):
        ImageStore([], (0, 4))
