"""Results files become plots and tables, curves get exponents and limits, and pytest-benchmark has every operator."""

import csv
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lcr2s_ext.ops import _dispatch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def results(load: Callable[[str], ModuleType], tmp_path: Path) -> Path:
    """A results file with two sizes, a candidate that ran out of memory, a curve with its fit, and training."""
    fields = load("side_by_side").FIELDS
    shared = {
        "machine": "Test processor, 2 cores",
        "torch": "2.13.0",
        "threads": 2,
        "lcr2s_ext": "0.1.0",
        "commit": "abc",
    }
    shared |= {"time": "2026-01-02T03:04:05+00:00", "dtype": "float32"}

    def row(candidate: str, rows: int, ms: object, **more: object) -> dict[str, object]:
        case = {"op": "sdm", "part": "forward + backward", "rows": rows, "columns": rows, "width": 512}
        figures = (
            {"ms_p20": ms, "ms": ms, "ms_p80": ms, "peak_mib": 8, "share_of_limit": 0.5, "ratio": 1.5} if ms else {}
        )
        return {**shared, **case, "candidate": candidate, **figures, **more}

    scaled = {"axis": "rows", "part": "forward + backward"}
    rows = [
        *(row("lcr2s_ext cpu", n, 10.0 * n, ratio=1) for n in (1024, 4096)),
        row("lcr2s_ext cpu", 1024, 9.0, ratio=1),  # measured again: this one counts
        row("eager", 1024, 20.0),
        row("eager", 4096, None, note="out of memory"),
        row("a peer", 1024, None, note="a-peer is not installed"),
        *(row("eager", n, 1e-3 * n * n, value=n, **scaled) for n in (64, 128, 256)),
        {**row("eager", 0, None), **scaled, "rows": "", "exponent": 2.0, "note": "128 to 256"},
        row("eager", 512, None, value=512, note="out of memory", **scaled),
        row("plain dual encoder", 64, 50.0, op="training step", part="step", ratio=1),
        row("teacher", 64, 55.0, op="training step", part="step", ratio=1.1),
        row("teacher", 64, 5.5, op="training profile", part="encoders, forward"),
    ]
    path = tmp_path / "machine.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_plots_and_tables(load: Callable[[str], ModuleType], results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = load("plot")
    page = tmp_path / "page.md"
    names = [*plot.TABLES, "plots"]
    page.write_text("\n".join(f"<!-- table: {name} -->\nold\n<!-- end of table -->" for name in names))
    arguments = [str(results), "--plots", str(tmp_path / "plots"), "--table", "--page", str(page)]
    plot.main(arguments)
    drawn = sorted((tmp_path / "plots" / "machine").glob("*.svg"))
    assert [file.name for file in drawn] == ["sdm-rows-512-float32.svg", "sdm-rows-scaling-float32.svg", "training.svg"]
    bytes_before = [file.read_bytes() for file in drawn]
    text = page.read_text()
    assert "old" not in text
    assert "| 1024 | 512 |  | float32 | 9 ms, 8 MiB | 20 ms (1.50x), 8 MiB | 50 % |" in text
    assert "| 4096 | 512 |  | float32 | 40960 ms, 8 MiB | out of memory | 50 % |" in text
    assert "| SDM loss | rows | eager | 2.0 | 128 to 256 | 512 |" in text
    assert "| teacher | 55.0 [55.0, 55.0] | 1164 | 1.10x | 8 |" in text
    assert "- a peer (sdm): a-peer is not installed" in text
    assert "(plots/machine/sdm-rows-512-float32.svg)" in text
    first, second, _ = (file.read_text() for file in drawn)
    assert "out of memory" in first
    assert "did not run: a peer (not installed)" in first
    assert "eager, ~rows^2.00" in second
    plot.main(arguments)
    assert [file.read_bytes() for file in drawn] == bytes_before
    assert page.read_text() == text
    page.write_text("<!-- table: nothing -->\n<!-- end of table -->")
    with pytest.raises(SystemExit, match="got 'nothing'"):
        plot.main(arguments)


def test_results_of_other_columns_are_not_appended_to(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    side_by_side = load("side_by_side")
    path = tmp_path / "old.csv"
    path.write_text("op,ms\n")
    settings = side_by_side.Settings(CPU, 1, False, path, None)
    with pytest.raises(SystemExit, match="other columns"):
        side_by_side.write([{"op": "sdm"}], settings)
    assert path.read_text() == "op,ms\n"


def test_curves_have_exponents_and_a_limit(load: Callable[[str], ModuleType]) -> None:
    scaling = load("scaling")
    # The lower half does not count: what a call costs at least bends it.
    points = [(size, 5.0 + 1e-6 * size**3) for size in (1, 2, 4, 4096, 8192, 16384)]
    assert scaling.exponent(points) == pytest.approx(3.0, abs=1e-3)
    assert scaling.exponent(points[:1]) is None
    exact = [torch.zeros(1, dtype=torch.float64)]

    def large() -> list[torch.Tensor]:
        return [torch.zeros(2**28)[:1]]

    assert scaling.within(large, exact, 1e-3, "large", 0.25, CPU) == "out of memory"
    assert scaling.within(large, exact, 1e-3, "large", 4.0, CPU) is large


def test_pytest_benchmark_has_every_operator(load: Callable[[str], ModuleType]) -> None:
    for name in ("side_by_side", "problem", "relation", "retrieval", "similarity", "support_attention"):
        sys.modules.pop(name, None)
    entries = load("test_benchmarks")
    assert set(entries.SETUPS) == set(_dispatch.CHOICES)
    timed = []

    class Benchmark(SimpleNamespace):
        def __call__(self, run: Callable[[], None]) -> None:
            run()
            timed.append(self.group)

    for setup in entries.SETUPS.values():
        problem = setup(12, 16, "float32", CPU, {"eager", "cpu"})
        for part in problem.parts:
            entries.test_operator(Benchmark(group=""), problem, part, "lcr2s_ext cpu")
            assert timed[-1] == f"{problem.title}, {part}"


def test_a_run_goes_on_after_a_failure_and_ends_with_its_time(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load("run")
    assert {arguments[-1] for arguments in run.BESIDES["full"]["scaling"]} == set(load("scaling").SWEEPS)
    seen: list[list[str]] = []

    def wrong(arguments: list[str]) -> None:
        raise SystemExit("sdm: off by 1.0")

    def broken(arguments: list[str]) -> None:
        raise ValueError("broken")

    for name, main in (("right", seen.append), ("wrong", wrong), ("broken", broken)):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(main=main))
    failed = run.measure([("wrong", ["a"]), ("broken", []), ("right", ["b"])], None)
    assert failed == ["wrong", "broken"]
    assert seen == [["b"]]
    assert "sdm: off by 1.0" in capsys.readouterr().out
    assert run.measure([("right", [])], -1.0) == ["right (no time left)"]
    assert seen == [["b"]]
