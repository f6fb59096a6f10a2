"""The caption tokenizer."""

import pickle
import subprocess
import sys

import pytest
import torch

from lcr2s_ext.data import CaptionTokenizer

CAPTIONS = [
    "A man in a red coat, with a black backpack.",
    "The woman wears a blue skirt and a red hat.",
    "A man with a blue hat and black trousers walks.",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.train(CAPTIONS, vocab_size=200, max_length=12)


def test_encode(tokenizer):
    tokens = tokenizer.encode(["a red hat", "", "A RED  hat walks"])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, 6)
    assert tokens[0, 0] == tokenizer.begin_id
    assert tokens[1].tolist() == [tokenizer.begin_id, tokenizer.end_id, 0, 0, 0, 0]
    assert tokens[0].tolist() == [*tokens[2, :4].tolist(), tokenizer.end_id, 0]
    assert int(tokens.max()) < tokenizer.vocab_size
    assert tokenizer.encode([]).shape[0] == 0


def test_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["A man, in a red coat."])) == [
        ["a", "man", ",", "in", "a", "red", "coat", "."]
    ]


def test_long_captions_keep_their_end(tokenizer):
    tokens = tokenizer.encode(["red " * 50])
    assert tokens.shape == (1, 12)
    assert tokens[0, -1] == tokenizer.end_id
    assert tokenizer.max_length == 12


def test_unknown_words_and_odd_characters(tokenizer):
    assert tokenizer.encode(["r\u00e9d"])[0].tolist() == tokenizer.encode(["red"])[0].tolist()
    assert tokenizer.unknown_id in tokenizer.encode(["\u6f22 red"])[0].tolist()
    assert torch.equal(tokenizer.encode(["red \ud83d hat"]), tokenizer.encode(["red hat"]))
    # A word that was never seen is made of pieces.
    assert len(tokenizer.decode(tokenizer.encode(["tractor"]))[0]) > 1


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for other in (CaptionTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert (other.vocab_size, other.max_length) == (tokenizer.vocab_size, 12)
        assert torch.equal(other.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_training_is_deterministic_across_processes(tokenizer, tmp_path):
    code = (
        "import sys; from lcr2s_ext.data import CaptionTokenizer; "
        f"CaptionTokenizer.train({CAPTIONS!r}, vocab_size=200, max_length=12).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.json")], check=True)
    tokenizer.save(tmp_path / "one.json")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "other.json").read_text()


def test_vocabulary_size_is_a_limit():
    assert CaptionTokenizer.train(CAPTIONS, vocab_size=32).vocab_size <= 32


def test_bad_arguments(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="captions must be a sequence of strings, got a single string"):
        tokenizer.encode("a man")
    with pytest.raises(TypeError, match="element 1 is of type int"):
        tokenizer.encode(["a", 3])
    with pytest.raises(ValueError, match="at least one sentence"):
        CaptionTokenizer.train([])
    with pytest.raises(ValueError, match="vocab_size must be at least 16, got 4"):
        CaptionTokenizer.train(CAPTIONS, vocab_size=4)
    with pytest.raises(TypeError, match="max_length must be an int"):
        CaptionTokenizer.train(CAPTIONS, max_length=8.0)
    with pytest.raises(FileNotFoundError):
        CaptionTokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer"):
        CaptionTokenizer.load(tmp_path / "bad.json")
