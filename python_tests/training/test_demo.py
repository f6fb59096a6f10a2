"""The demo at miniature size, and what it concludes from numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from lcr2s_ext.cli import main
from lcr2s_ext.data import ImageStore, load_dataset
from lcr2s_ext.models import LCR2S
from lcr2s_ext.retrieval import evaluate_model
from lcr2s_ext.training import demo
from lcr2s_ext.training.arms import ARMS, budget_epochs, plan_stages, remaining_chain, total_cost
from lcr2s_ext.training.config import ConfigError, load_config
from lcr2s_ext.training.summary import conclusions, format_table, paired_difference, summarize, table_rows

SMALL = ["--identities", "8", "4", "5", "--views", "3", "--batch-size", "12"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """All eight arms, one epoch each."""
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--full", "--out", str(out), "--threads", "1", *SMALL]) == 0
    return out, json.loads((out / "results.json").read_text(encoding="utf-8")), (out / "table.txt").read_text("utf-8")


def test_everything_is_written(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, results, table = finished
    assert (out / "corpus0" / "CUHK-PEDES" / "reid_raw.json").is_file()
    for arm in ARMS:
        assert f"({arm}) " in table
    page = (out / "retrievals.html").read_text(encoding="utf-8")
    assert page.count("<blockquote>") == 12
    assert page.count("<img ") == 120
    assert 'class="right"' in page
    assert "GENERATED" in results["what"]
    assert results["machine"]["cores"] >= 1
    assert set(results["versions"]) >= {"lcr2s_ext", "torch", "lightning", "python"}
    assert results["seconds"]["total"] >= results["seconds"]["training"] > 0
    assert results["config"]["teacher"]["start"] == "warm"
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert markdown.count("\n| (") == len(ARMS)
    for line in results["conclusions"]:
        assert line in table
        assert line in markdown


def test_every_arm_has_all_metrics_of_both_directions(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = finished
    (only,) = results["runs"]
    assert list(only["arms"]) == list(ARMS)
    for measured in only["arms"].values():
        for split in ("val", "test"):
            for metrics in measured[split].values():
                for key in ("R@1", "R@5", "R@10", "mAP", "mAP_trapezoid", "mINP"):
                    assert 0.0 <= metrics[key] <= 1.0
                assert metrics["mAP_trapezoid"] <= metrics["mAP"] + 1e-6


def test_the_control_has_the_steps_of_teacher_and_student(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = finished
    arms = results["runs"][0]["arms"]
    assert arms["b+"]["total_steps"] == arms["d"]["total_steps"] == arms["e"]["total_steps"]
    assert arms["b+"]["total_steps"] > arms["b"]["total_steps"]
    assert arms["c"]["total_steps"] + arms["b"]["total_steps"] == arms["d"]["total_steps"]


def test_saved_student_reaches_the_reported_figures(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, results, table = finished
    split = load_dataset("cuhk-pedes", out / "corpus0")["test"]
    for arm in ("b", "d"):
        model = LCR2S.from_pretrained(out / "models" / "corpus0-seed0" / ARMS[arm].stage)
        metrics = evaluate_model(model, split, ImageStore(split.image_paths, model.image_size))
        reported = results["runs"][0]["arms"][arm]["test"]["text_to_image"]
        for key in ("R@1", "mAP"):
            assert metrics["text_to_image"][key] == pytest.approx(reported[key], abs=1e-6)
        row = next(line for line in table.splitlines() if line.startswith(f"({arm}) "))
        assert f"{100 * reported['mAP']:.1f}" in row.split()


def test_number_of_jobs_does_not_change_the_figures(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, results, _ = finished
    words = ["demo", "--quick", "--arms", "a", "b", "--out", str(tmp_path), "--jobs", "2", "--threads", "1", *SMALL]
    assert main(words) == 0
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert again["jobs"] == 2
    assert list(again["runs"][0]["arms"]) == ["a", "b"]
    for arm in ("a", "b"):
        assert again["runs"][0]["arms"][arm]["test"] == results["runs"][0]["arms"][arm]["test"]
    assert "left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "z"], "--arms: expected some of a b b+ c c0 d d' e, got z"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--identities", "5", "0", "5"], "--identities: expected three positive ints"),
        (["--first-seed", "-1"], "--first-seed: expected at least 0, got -1"),
        (["--set", "optim.rl=1"], "unknown key 'optim.rl'"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        demo.run(parser.parse_args(["--out", str(tmp_path / "out"), *words]))
    assert not (tmp_path / "out").exists()


def _config(*overrides: str) -> Any:
    return load_config(None, ["epochs=10", "teacher.epochs=6", *overrides])


def test_stages_are_those_the_arms_need() -> None:
    assert list(plan_stages(_config(), ["b"], 3)) == ["plain"]
    assert list(plan_stages(_config(), ["e"], 3)) == ["plain", "continued", "control"]
    assert list(plan_stages(_config("teacher.start=scratch"), ["d"], 3)) == ["teacher", "student"]
    stages = plan_stages(_config(), ARMS, 3)
    order = list(stages)
    for stage in stages.values():
        assert all(order.index(need) < order.index(stage.name) for need in stage.needs)
    assert stages["teacher"].arms == ("c", "c0")
    assert stages["continued"].epochs == stages["teacher"].epochs == 6
    assert stages["fusion"].epochs == 3
    assert stages["student"].teacher == "teacher"
    assert stages["control"].teacher == "continued"


def test_budget_counts_a_warm_start() -> None:
    assert budget_epochs(_config()) == 26
    assert budget_epochs(_config("teacher.start=scratch")) == 16
    with pytest.raises(ConfigError, match=r"teacher\.warm_epochs: expected 10"):
        plan_stages(_config("teacher.warm_epochs=4"), ["b"], 3)
    with pytest.raises(ValueError, match="arms: expected some of"):
        plan_stages(_config(), ["x"], 3)


def test_longest_chain_comes_first() -> None:
    stages = plan_stages(_config(), ARMS, 3)
    chain = remaining_chain(stages)
    assert chain["plain"] == max(chain.values())
    assert chain["plain"] == pytest.approx(10 + chain["teacher"])
    assert total_cost(stages) == pytest.approx(sum(stage.epochs * stage.cost for stage in stages.values()))


def _run(scores: dict[str, float], queries: float = 1000.0) -> dict[str, Any]:
    def metrics(score: float) -> dict[str, float]:
        return {
            **dict.fromkeys(("R@1", "R@5", "R@10", "mAP", "mAP_trapezoid", "mINP"), score),
            "queries": queries,
            "queries_without_positive": 0.0,
        }

    return {
        "arms": {
            arm: {"test": {"text_to_image": metrics(score), "image_to_text": metrics(score)}, "total_steps": 7}
            for arm, score in scores.items()
        }
    }


def test_paired_difference_is_within_runs() -> None:
    # The arms vary by 0.2 between runs, their difference by 0.01: pairing must see the small one.
    runs = [_run({"d": 0.32, "e": 0.30}), _run({"d": 0.53, "e": 0.50}), _run({"d": 0.42, "e": 0.40})]
    found = paired_difference(runs, "d", "e")
    assert found["values"] == pytest.approx([0.02, 0.03, 0.02])
    assert found["mean"] == pytest.approx(0.07 / 3)
    assert found["sd"] == pytest.approx(0.00577350, rel=1e-4)
    assert found["margin"] == pytest.approx(4.303 * 0.00577350 / 3**0.5, rel=1e-4)
    assert found["verdict"] == "higher"
    assert paired_difference(runs, "e", "d")["verdict"] == "lower"


def test_one_run_resolves_no_more_than_its_queries() -> None:
    few, many = _run({"d": 0.32, "e": 0.30}, 100.0), _run({"d": 0.32, "e": 0.30}, 1e6)
    assert paired_difference([few], "d", "e")["verdict"] == "unresolved"
    assert paired_difference([few], "d", "e")["sd"] is None
    assert paired_difference([many], "d", "e")["verdict"] == "higher"
    assert paired_difference([few], "d", "e")["margin"] == pytest.approx(
        1.96 * ((0.32 * 0.68 + 0.3 * 0.7) / 100) ** 0.5
    )


@pytest.mark.parametrize(
    ("student", "control", "words"),
    [(0.40, 0.30, "some of the richness transfers"), (0.30, 0.40, "not the richness"), (0.35, 0.35, "do not show")],
)
def test_conclusion_follows_the_numbers(student: float, control: float, words: str) -> None:
    scores = {"b": 0.25, "b+": 0.31, "c": 0.5, "c0": 0.26, "d": student, "e": control}
    runs = [_run({arm: score + shift for arm, score in scores.items()}) for shift in (0.0, 0.01, 0.02)]
    for run, wobble in zip(runs, (0.001, -0.001, 0.0), strict=True):
        for split in run["arms"]["d"]["test"].values():
            split["R@1"] += wobble
    said = conclusions(runs, summarize(runs, list(scores)))
    assert words in said[-1]
    assert any(line.startswith(f"d - e: {100 * (student - control):+.1f} points") for line in said)
    assert any("c - c0: +24.0 points" in line and "oracle" in line for line in said)


def test_without_the_control_nothing_is_concluded() -> None:
    runs = [_run({"b": 0.25, "d": 0.4})]
    said = conclusions(runs, summarize(runs, ["b", "d"]))
    assert "nothing is said" in said[-2]
    assert "One run" in said[-1]


def test_table_shows_mean_and_deviation() -> None:
    runs = [_run({"b": 0.20}), _run({"b": 0.30})]
    (row,) = table_rows(runs, summarize(runs, ["b"]))
    assert row["R@1"] == "25.0 ± 7.1"
    assert row["steps"] == "7"
    assert format_table([{"x": "a|b"}], markdown=True).splitlines()[-1] == "| a\\|b |"
