"""The generated corpus is what its documentation says."""

import hashlib
import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from lcr2s_ext.data import generate_corpus, load_dataset
from lcr2s_ext.data._painter import render
from lcr2s_ext.data._people import COLOURS, SLOT_BY_NAME, SLOTS, make_family, make_styles
from lcr2s_ext.data._sentences import SYNONYMS
from lcr2s_ext.data._stream import Stream


@pytest.fixture(scope="module")
def truth(corpus):
    return json.loads((corpus / "CUHK-PEDES" / "truth.json").read_text())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Truth of more identities with one tiny picture a view."""
    root = tmp_path_factory.mktemp("many")
    generate_corpus(root, identities=(120, 0, 0), views=3, captions_per_image=3, seed=1, size=(8, 8))
    return json.loads((root / "CUHK-PEDES" / "truth.json").read_text())


def digest(root):
    result = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            content = np.asarray(Image.open(path)).tobytes() if path.suffix == ".png" else path.read_bytes()
            result[str(path.relative_to(root))] = hashlib.sha256(content).hexdigest()
    return result


def test_layout_on_disk(corpus):
    folder = corpus / "CUHK-PEDES"
    records = json.loads((folder / "reid_raw.json").read_text())
    assert {tuple(record) for record in records} == {("split", "captions", "file_path", "processed_tokens", "id")}
    assert sorted({record["id"] for record in records}) == list(range(1, 24))
    assert Counter(record["split"] for record in records) == {"train": 47, "val": 13, "test": 17}
    for record in records:
        assert len(record["captions"]) == len(record["processed_tokens"]) == 2
        assert Image.open(folder / "imgs" / record["file_path"]).size == (32, 64)
    identities = [
        {record["id"] for record in records if record["split"] == split} for split in ("train", "val", "test")
    ]
    assert [len(ids) for ids in identities] == [14, 4, 5]
    assert not any(a & b for a, b in combinations(identities, 2))
    assert "GENERATED" in (folder / "README.txt").read_text()
    manifest = json.loads((folder / "generated.json").read_text())
    assert manifest["generated"] is True
    assert manifest["parameters"]["seed"] == 3


def test_the_reader_reads_it(corpus):
    splits = load_dataset("cuhk-pedes", corpus)
    assert [splits[name].num_identities for name in ("train", "val", "test")] == [14, 4, 5]
    assert [len(splits[name]) for name in ("train", "val", "test")] == [94, 26, 34]


def test_the_seed_determines_everything(tmp_path):
    options = {"identities": (4, 1, 1), "views": 2}
    for name, seed, workers in (("a", 5, 1), ("b", 5, 2), ("c", 6, 1)):
        generate_corpus(tmp_path / name, seed=seed, workers=workers, **options)
    first, second, other = (digest(tmp_path / name) for name in "abc")
    assert first == second
    assert first["CUHK-PEDES/reid_raw.json"] != other["CUHK-PEDES/reid_raw.json"]


def test_a_second_corpus_leaves_nothing_of_the_first(tmp_path):
    generate_corpus(tmp_path / "a", identities=(5, 1, 1), seed=1)
    generate_corpus(tmp_path / "a", identities=(2, 1, 1), seed=2)
    generate_corpus(tmp_path / "b", identities=(2, 1, 1), seed=2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_corpus_that_was_not_generated_is_not_overwritten(write_corpus, record):
    root = write_corpus([record()])
    before = digest(root)
    with pytest.raises(FileExistsError, match="not generated"):
        generate_corpus(root, identities=(1, 0, 0))
    assert digest(root) == before


def test_families_share_all_but_six_slots(many):
    assert len(SLOTS) == 21
    people = {row["id"]: row for row in many}
    families = {}
    for row in people.values():
        families.setdefault(row["family"], []).append(row["slots"])
    assert Counter(len(members) for members in families.values()) == {3: 40}
    for members in families.values():
        differing = {frozenset(name for name in a if a[name] != b[name]) for a, b in combinations(members, 2)}
        # Any two differ in the same six slots.
        assert [len(names) for names in differing] == [6]


def test_styles_bias_slots_together(many):
    people = list({row["id"]: row for row in many}.values())

    def agreement(same_style):
        pairs = [
            (a, b)
            for a, b in combinations(people, 2)
            if a["family"] != b["family"] and (a["style"] == b["style"]) is same_style
        ]
        return np.mean([sum(a["slots"][name] == b["slots"][name] for name in SLOT_BY_NAME) for a, b in pairs])

    assert agreement(True) > agreement(False) + 2


def test_some_identities_have_a_single_image(truth):
    images = Counter(row["id"] for row in truth)
    assert Counter(images.values()) == {4: 18, 1: 5}


def test_views(truth, many):
    assert {row["view"] for row in truth} == {"front", "back", "side"}
    by_person = {}
    for row in many:
        by_person.setdefault(row["id"], []).append(row["view"])
    assert all(sorted(views) == ["back", "front", "side"] for views in by_person.values() if len(views) == 3)
    for row in many:
        visible = set(row["visible"])
        if row["view"] != "front":
            assert not visible & {"glasses", "scarf", "inner", "logo"}
        if row["view"] != "back":
            assert "print" not in visible
        if row["view"] == "front":
            assert "backpack" not in visible


def test_captions_name_what_their_own_view_shows(many):
    counts, wrong, omitted, coloured, total = Counter(), 0, 0, 0, 0
    for row in many:
        for mentions in row["mentions"]:
            counts[len(mentions)] += 1
            assert len({mention["slot"] for mention in mentions}) == len(mentions)
            for mention in mentions:
                assert mention["slot"] in row["visible"]
                assert mention["wrong"] is (mention["value"] != row["slots"][mention["slot"]])
                total += 1
                wrong += mention["wrong"]
                if SLOT_BY_NAME[mention["slot"]].colours:
                    coloured += 1
                    omitted += mention["colour_omitted"]
    assert set(counts) == {3, 4, 5}
    assert 0.02 < wrong / total < 0.04
    assert 0.12 < omitted / coloured < 0.18


def test_sentences_say_what_is_mentioned_and_no_more(truth, corpus):
    records = {r["file_path"]: r for r in json.loads((corpus / "CUHK-PEDES" / "reid_raw.json").read_text())}

    def words(value):
        return SYNONYMS.get(value, (value,))

    # Nouns of kinds that no other kind's nouns contain, so that finding one means that its slot is named.
    kinds = {kind: slot.name for slot in SLOTS for kind in slot.kinds}
    nouns = {noun: slot for kind, slot in kinds.items() for noun in words(kind)}
    distinctive = {n: s for n, s in nouns.items() if not any(n in other for other in nouns if other != n)}
    for row in truth:
        for sentence, mentions in zip(records[row["file_path"]]["captions"], row["mentions"], strict=True):
            text = sentence.lower()
            for mention in mentions:
                kind, colour = mention["value"]
                assert any(noun in text for noun in words(kind))
                if colour and not mention["colour_omitted"]:
                    assert any(f"{word} {noun}" in text for word in words(colour) for noun in words(kind))
            named = {
                slot for noun, slot in distinctive.items() if f" {noun} " in f" {text.replace(',', '').rstrip('.')} "
            }
            assert named <= {mention["slot"] for mention in mentions}


@pytest.mark.parametrize("view", ["front", "back", "side"])
def test_pictures_show_colours(view):
    """Two people who differ in the colour of their trousers alone differ in the picture there, and there alone."""
    person = make_family(0, 0, 0, 1, 0, make_styles(0))[0]
    person.values |= {"lower": ("trousers", "red"), "stripe": ("none", ""), "top": ("shirt", "white")}
    person.values |= dict.fromkeys(("handbag", "carried"), ("none", ""))
    pictures = []
    for colour in ("red", "blue"):
        person.shades |= {"lower": COLOURS[colour], "top": COLOURS["white"]}
        pictures.append(np.asarray(render(person, view, "left", 0, Stream(3), (128, 64)), dtype=float))
    difference = (pictures[0] - pictures[1]).mean(1)
    rows = np.flatnonzero(np.abs(difference).max(1) > 5)
    assert 55 < rows.min() < 75
    assert 105 < rows.max() < 125
    assert difference[rows, 0].mean() > 10
    assert difference[rows, 2].mean() < -10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"identities": 5}, TypeError, "identities must be three ints"),
        ({"identities": (0, 1, 1)}, ValueError, r"identities\[0\] must be at least 1, got 0"),
        ({"identities": (1, 1.5, 1)}, TypeError, r"identities\[1\] must be an int"),
        ({"views": 0}, ValueError, "views must be at least 1"),
        ({"captions_per_image": True}, TypeError, "captions_per_image must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"size": 64}, TypeError, "size must be two ints"),
        ({"size": (4, 32)}, ValueError, r"size\[0\] must be at least 8, got 4"),
        ({"single_view_fraction": 1.5}, ValueError, r"single_view_fraction must be in \[0, 1\], got 1.5"),
        ({"layout": "coco"}, ValueError, "layout must be one of"),
        ({"workers": 0}, ValueError, "workers must be at least 1"),
    ],
)
def test_bad_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        generate_corpus(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
