"""Grids of runs: what is shared, skipped, resumed and reported."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcr2s_ext import cli
from lcr2s_ext.training import ConfigError, TrainConfig, dump_config, load_config
from lcr2s_ext.training import ablate as module
from lcr2s_ext.training.ablate import Ablation, Grid, ablate, parse_axis, read_grid
from lcr2s_ext.training.run import _stage_key

CONFIGS = Path(__file__).parents[2] / "configs"
Configure = Callable[..., TrainConfig]
FAST = ["epochs=1", "teacher.warm_epochs=1", "teacher.epochs=1", "loggers=[]", "data.batch_size=32"]


def test_grid_is_points_times_axes_in_order() -> None:
    grid = Grid({"a": {"method": "plain"}, "b": {}}, {"epochs": [1, 2], "model.width": [None]})
    assert list(grid.cells().items())[:3] == [
        ("a, epochs=1, model.width=null", {"method": "plain", "epochs": 1, "model.width": None}),
        ("a, epochs=2, model.width=null", {"method": "plain", "epochs": 2, "model.width": None}),
        ("b, epochs=1, model.width=null", {"epochs": 1, "model.width": None}),
    ]
    assert parse_axis("loss.align=sdm,{sdm: 1, tal: 0.5},[cmpm, tal]") == (
        "loss.align",
        ["sdm", {"sdm": 1, "tal": 0.5}, ["cmpm", "tal"]],
    )
    assert parse_axis("x=1,null,true") == ("x", [1, None, True])
    for bad in ("x", "x=", "=1", "x=[1"):
        with pytest.raises(ConfigError, match="grid"):
            parse_axis(bad)
    with pytest.raises(ConfigError, match="at least one point or axis"):
        Grid().cells()


@pytest.mark.parametrize("file", sorted((CONFIGS / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_grids_resolve(file: Path) -> None:
    grid = read_grid(file)
    assert len(grid.seeds) >= 3
    assert grid.config is not None
    kinds = set()
    for changes in grid.cells().values():
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        config = load_config(grid.config, overrides)
        kinds.add(json.dumps(config, default=vars))
    assert len(kinds) == len(grid.cells())  # no two points are the same run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a mapping"),
        ("pints: {}", "entries of config, seeds, points, grid"),
        ("points: [1]", "points: expected a dict"),
        ("points: {a: 1}", "points.a: expected a mapping"),
        ("grid: {epochs: 3}", "grid.epochs: expected a list"),
        ("grid: {epochs: [1]}\nseeds: [-1]", "seeds: expected ints"),
        ("a: [", "not valid YAML"),
    ],
)
def test_grids_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_grid(file)


def test_stages_are_shared_where_their_configuration_is_equal() -> None:
    def key(stage: str, *overrides: str) -> str:
        return _stage_key(load_config(None, ["data.root=x", *overrides]), stage)

    for stage in ("warm", "teacher"):
        assert key(stage) == key(stage, "distill.relation=kl", "epochs=30", "out=y", "data.workers=2")
        assert key(stage) != key(stage, "seed=1")
        assert key(stage) != key(stage, "loss.logit_scale=3")
    assert key("warm") == key("warm", "teacher.start=frozen", "data.max_support=2", "model.heads=4")
    assert key("warm", "teacher.warm_epochs=7") == key("student", "method=plain", "epochs=7")
    assert key("teacher") != key("teacher", "data.max_support=2")
    assert key("teacher") != key("teacher", "teacher.warm_epochs=7")
    assert key("teacher", "teacher.start=scratch") == key("teacher", "teacher.start=scratch", "teacher.warm_epochs=7")
    assert key("teacher", "teacher.epochs=5") == key(
        "teacher", "teacher.epochs=5", "epochs=9", "teacher.warm_epochs=30"
    )
    assert key("student") != key("student", "distill.relation=kl")
    assert key("student") != key("student", "model.heads=4")
    assert key("student", "data.bank_size=9") == key("student")
    assert key("student", "data.bank_size=9", "data.support=bank") != key("student", "data.support=bank")


def test_runs_share_a_teacher_survive_a_failure_and_are_not_repeated(
    config_of: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_config(config_of(*FAST), tmp_path / "base.yaml")
    file = tmp_path / "grid.yaml"
    file.write_text(
        "points:\n"
        "  plain: {method: plain}\n"
        "  frobenius: {}\n"
        "  none: {distill.relation: none}\n"
        "  broken: {loss.align: [tal, tal]}\n"
        "  too large: {method: plain, data.batch_size: 5000}\n"
    )
    arguments = ["ablate", "--grid", str(file), "--config", str(tmp_path / "base.yaml"), "--seeds", "0,1"]
    arguments += ["--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert "FAILED broken, seed 0: loss.align: expected at least one loss, each once" in said.out
    assert "FAILED too large, seed 1: data.batch_size: a batch of 5000 is larger" in said.out
    assert said.err.count("  teacher: ") == 4
    out = tmp_path / "out"
    stages = [folder.name.split("-")[0] for folder in (out / "stages").iterdir()]
    # For each seed one plain student, which is the warm start as well, one teacher, and two students of it.
    assert sorted(stages) == ["plain"] * 2 + ["student"] * 4 + ["teacher"] * 2
    record = json.loads((out / "ablation.json").read_text())
    shared = [
        json.loads((out / "runs" / name / "seed0" / "results.json").read_text()) for name in ("frobenius", "none")
    ]
    assert shared[0]["teacher_test"] == shared[1]["teacher_test"]
    assert shared[0]["test"] != shared[1]["test"]
    for name in ("plain", "frobenius", "none"):
        runs = [
            json.loads((out / "runs" / name / f"seed{seed}" / "results.json").read_text())["test"]["text_to_image"][
                "mAP"
            ]
            for seed in (0, 1)
        ]
        found = record["summary"]["test"][name]["mAP"]
        assert found["values"] == runs
        assert found["mean"] == pytest.approx(sum(runs) / 2)
        assert found["sd"] == pytest.approx(abs(runs[0] - runs[1]) / 2**0.5)
        if name != "plain":
            first = record["summary"]["test"]["plain"]["mAP"]["values"]
            assert found["difference"]["values"] == pytest.approx([a - b for a, b in zip(runs, first, strict=True)])
    with (out / "ablation.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 3 * 5  # splits, finished points, metrics
    assert "| plain |" in (out / "ablation.md").read_text()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run is not run again")

    file.write_text("points:\n  plain: {method: plain}\n  frobenius: {}\n")
    monkeypatch.setattr(module, "train", never)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.count("finished before") == 4
    # A folder with a run of another configuration is not taken for this one's.
    assert cli.main([*arguments, "optim.lr=1e-4"]) == 1
    assert "optim.lr was" in capsys.readouterr().out


def test_wrong_usage(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["ablate", "--out", str(tmp_path), "--root", str(corpus)]
    for rest, message in (
        (["--grid", "optim.lrr=1,2"], "unknown key 'optim.lrr'"),
        (["--grid", "epochs="], "expected key=value"),
        (["--grid", "epochs=1,2", "--seeds", "a"], "seeds: expected ints"),
        (["--grid", "a.yaml", "--grid", "b.yaml"], "one YAML file at most"),
    ):
        assert cli.main([*start, *rest]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["ablate", "--out", str(tmp_path), "--grid", "epochs=1,2"]) == 2
    assert "no data" in capsys.readouterr().err


def test_differences_are_paired_by_seed_and_negative_ones_are_said() -> None:
    def run(score: float) -> dict[str, Any]:
        keys = ("R@1", "R@5", "R@10", "mAP", "mINP")
        metrics = {**dict.fromkeys(keys, score), "queries": 100.0, "queries_without_positive": 0.0}
        return {"val": None, "test": {"text_to_image": metrics}}

    ablation = Ablation(
        {"first": {}, "worse": {"a": 1}, "close": {"a": 2}, "missing": {"a": 3}},
        [0, 1, 2],
        {
            "first": {0: run(0.50), 1: run(0.40), 2: run(0.60)},
            "worse": {0: run(0.44), 1: run(0.35), 2: run(0.54)},
            "close": {1: run(0.42), 2: run(0.58)},
            "missing": {},
        },
        {"missing": {0: "no"}},
    )
    summary = ablation.summary("test")
    assert summary["worse"]["R@1"]["difference"]["verdict"] == "lower"
    assert summary["close"]["R@1"]["difference"]["values"] == pytest.approx([0.02, -0.02])
    assert "missing" not in summary
    report = ablation.report()
    assert "worse: -5.7 points of R@1 on test" in report
    assert ": lower." in report
    assert "close: +0.0 points" in report or "close: -0.0 points" in report
    assert "not resolved" in report
    assert "FAILED missing, seed 0: no" in report
    assert ablation.splits() == ["test"]


def test_interrupted_run_goes_on(config_of: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump_config(config_of(*FAST, "epochs=2"), tmp_path / "base.yaml")
    grid = Grid(axes={"method": ["plain"]}, config=tmp_path / "base.yaml")
    whole = ablate(grid, tmp_path / "whole")
    train = module.train

    def interrupted(*arguments: Any, **named: Any) -> Any:
        def stop(line: str) -> None:
            if line.startswith("student"):
                raise KeyboardInterrupt

        return train(*arguments, **(named | {"say": stop}))

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablate(grid, tmp_path / "parts")
    parts = ablate(grid, tmp_path / "parts")
    assert parts.results["method=plain"][0]["test"] == whole.results["method=plain"][0]["test"]
