"""The command line: exit codes, messages, and a run from nothing to JSON on a very small corpus."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lcr2s_ext import cli
from lcr2s_ext.ops import retrieval_metrics


def run(*arguments: str) -> int:
    """Exit code, also where argparse exits by itself."""
    try:
        return cli.main(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    code = run(*f"data synth --root {root} --identities 8 3 4 --views 2 --seed 4 --size 40 20".split())
    assert code == 0
    return root


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    arguments = f"train --dataset cuhk-pedes --root {corpus} --preset tiny --epochs 1 --out {out}"
    assert run(*arguments.split(), "model.width=16", "--threads", "1", "model.heads=4", "--progress", "none") == 0
    return out


@pytest.mark.parametrize(
    "words",
    ["", "train", "evaluate", "data", "data synth", "data check", "info"],
)
def test_help_of_every_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words.split(), "--help") == 0
    assert "usage: lcr2s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required"),
        ("fly", "invalid choice"),
        ("data", "required"),
        ("evaluate --model x", "required"),
        ("data check --dataset market --root x", "invalid choice"),
        ("train --epochs 0 --root x --out y", "positive int"),
        ("train --root x --out y --nonsense", "unrecognized arguments: --nonsense"),
        ("train --root x --out y nonsense", "unrecognized arguments: nonsense"),
        ("evaluate --model m --dataset cuhk-pedes --root x a=1", "unrecognized arguments: a=1"),
        ("train --root x --out y optim.lrr=1", "unknown key 'optim.lrr'; did you mean optim.lr"),
        ("train --root x --out y epochs=two", "epochs: expected int"),
        ("train --out y", "no data: give --root"),
        ("train --root x", "no output folder: give --out"),
    ],
)
def test_wrong_usage_exits_with_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words.split()) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert caught.out == ""


def test_failures_exit_with_1_in_one_line(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (f"evaluate --model {tmp_path}/none --dataset cuhk-pedes --root {corpus}", "no folder"),
        (f"evaluate --model {tmp_path}/empty --dataset cuhk-pedes --root {corpus}", "config.json"),
        (f"evaluate --model {trained} --dataset cuhk-pedes --root {tmp_path}", "CUHK-PEDES"),
        (f"train --dataset cuhk-pedes --root {tmp_path} --out {tmp_path}/o", "CUHK-PEDES"),
        (f"train --root {corpus} --out {tmp_path}/o data.batch_size=999", "larger than the train split"),
        (f"train --root {corpus} --out {tmp_path}/o --preset huge", "expected one of tiny, small"),
        (f"train --config {tmp_path}/none.yaml --root {corpus} --out {tmp_path}/o", "no file"),
        (f"train --root {corpus} --out {trained}", "already holds a run"),
        (f"train --root {corpus} --out {tmp_path}/empty --resume", "holds no run to resume"),
    ]
    capsys.readouterr()
    for words, message in cases:
        assert run(*words.split()) == 1, words
        caught = capsys.readouterr()
        assert caught.out == ""
        last = caught.err.splitlines()[-1]
        assert last.startswith(f"lcr2s {words.split()[0]}: error: "), caught.err
        assert message in last
        assert "Traceback" not in caught.err


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*f"evaluate --debug --model {tmp_path}/none --dataset cuhk-pedes --root x".split()) == 1
    assert "Traceback" in capsys.readouterr().err


def test_data_check(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "check", "--dataset", "cuhk-pedes", "--root", str(corpus)) == 0
    assert "captions" in capsys.readouterr().out
    assert run("data", "check", "--dataset", "cuhk-pedes", "--root", str(tmp_path)) == 1


def test_training_leaves_everything(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"model", "results.json", "train.yaml", "warm", "teacher", "student"} <= names
    text = (trained / "train.yaml").read_text()
    assert "width: 16" in text
    assert "weight_decay:" in text


def test_evaluate_prints_one_json_object(corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    expected = set(retrieval_metrics(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2)))
    capsys.readouterr()
    printed = []
    for model in (trained, trained / "model"):
        words = f"evaluate --model {model} --dataset cuhk-pedes --root {corpus} --split test --json"
        assert run(*words.split()) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        printed.append(json.loads(out))
    assert printed[0] == printed[1]
    assert set(printed[0]) == expected
    assert all(0 <= printed[0][key] <= 1 for key in ("R@1", "R@5", "R@10", "mAP", "mAP_trapezoid", "mINP"))
    saved = json.loads((trained / "results.json").read_text())
    assert printed[0] == pytest.approx(saved["test"]["text_to_image"])


def test_evaluate_prints_a_table_of_both_directions(
    corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*f"evaluate --model {trained} --dataset cuhk-pedes --root {corpus} --split val".split()) == 0
    out = capsys.readouterr().out
    assert "text to image" in out
    assert "image to text" in out


def test_evaluate_labels_what_is_re_ranked(corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"evaluate --model {trained} --dataset cuhk-pedes --root {corpus} --rerank 5 2 0.4".split()
    assert run(*words) == 0
    plain, again = capsys.readouterr().out.split("test, re-ranked, k1=5, k2=2, lambda=0.4 (%)")
    assert plain.startswith("test (%)")
    assert all(part.count("text to image") == part.count("image to text") == 1 for part in (plain, again))
    assert run(*words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reranked"]["k1"] == 5
    assert printed["reranked"]["queries"] == printed["queries"]
    saved = json.loads((trained / "results.json").read_text())["test"]["text_to_image"]
    assert printed["mAP"] == pytest.approx(saved["mAP"])
    assert printed["reranked"]["mAP"] != printed["mAP"]
    for wrong in ("5 2", "0 2 0.3", "5 2 1.5", "2.5 2 0.3"):
        assert run(*words[:-4], "--rerank", *wrong.split()) == 2
        assert "--rerank" in capsys.readouterr().err


def test_resume_of_a_finished_run_trains_nothing(
    corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "student" / "last.ckpt").stat().st_mtime_ns
    assert run("train", "--out", str(trained), "--resume") == 0
    assert (trained / "student" / "last.ckpt").stat().st_mtime_ns == before


def test_nan_becomes_null() -> None:
    assert cli._finite({"R@1": math.nan, "queries": 0}) == {"R@1": None, "queries": 0}


def test_help_imports_no_heavy_package() -> None:
    script = (
        "import sys; from lcr2s_ext import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('lightning', 'kornia', 'tokenizers', 'PIL', 'yaml') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
