"""Two revisions against each other: both are checked and take turns, and nothing stays behind."""

import csv
import importlib
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git history")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare")


def present_library(tree: Path) -> None:
    for library in (ROOT / "lcr2s_ext").glob("*.so"):
        shutil.copy(library, tree / "lcr2s_ext")


def worktrees() -> set[str]:
    """Their folders."""
    listed = subprocess.run(["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def test_both_revisions_take_turns(compare: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "compare.csv"
    case = ["--batch", "24", "--width", "16", "--loss", "sdm", "--part", "forward + backward", "--threads", "1"]
    head, seen = compare._git("rev-parse", "HEAD"), []

    def make(tree: Path, folder: Path) -> None:
        seen.append(tree)
        present_library(tree)

    ((other, own, ratio),) = compare.compare_revisions(
        head, [("similarity", case)], device="cpu", rounds=4, csv=file, make=make
    )
    assert len(other["seconds"]) == len(own["seconds"]) == 4
    assert ratio[0] <= ratio[1] <= ratio[2]
    assert ratio[1] == compare.quantiles([a / b for a, b in zip(other["seconds"], own["seconds"], strict=True)])[1]
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["candidate"] for row in rows] == ["lcr2s_ext cpu"] * 2
    assert rows[0]["commit"] in head
    assert not seen[0].exists()
    assert str(seen[0]) not in worktrees()


def test_a_failure_leaves_no_worktree(compare: ModuleType) -> None:
    seen: list[Path] = []

    def broken(tree: Path, folder: Path) -> None:
        seen.append(tree)
        assert (tree / "setup.py").is_file()
        raise SystemExit("does not build")

    with pytest.raises(SystemExit, match="does not build"):
        compare.compare_revisions("HEAD", [("similarity", [])], device="cpu", rounds=1, make=broken)
    assert not seen[0].exists()
    assert str(seen[0]) not in worktrees()
    with pytest.raises(SystemExit, match="no-such-commit"):
        compare.compare_revisions("no-such-commit", [("similarity", [])], device="cpu", rounds=1, make=broken)


def test_a_failing_revision_is_named_with_its_words(compare: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"(?s)its process failed.*invalid choice: 'no-loss'"):
        compare.measure([ROOT], "similarity", ["--loss", "no-loss"])
