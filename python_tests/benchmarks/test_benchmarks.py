"""The benchmarks: nothing is timed before it was right, one results file holds every family, the default's table."""

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lcr2s_ext.ops import _dispatch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def test_every_family_writes_the_same_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.csv"
    shared = ["--rounds", "1", "--provider", "eager", "cpu", "--csv", str(file)]
    tiny = {
        "support_attention": ["--batch", "9", "--width", "32", "--heads", "2", "--dtype", "float32", "bfloat16"],
        "similarity": ["--batch", "24", "--width", "16"],
        "relation": ["--batch", "24", "--width", "16", "--teacher-width", "24", "--op", "kl"],
        "retrieval": ["--queries", "40", "--gallery", "30", "--identities", "10", "--width", "16"],
    }
    monkeypatch.setattr(benchmark("side_by_side", monkeypatch), "calibrate", _no_limits)
    for family, arguments in tiny.items():
        benchmark(family, monkeypatch).main([*arguments, *shared])
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    operators = {row["op"] for row in rows}
    assert operators == {*_dispatch.CHOICES} - {"relation_frobenius"}
    ours = [row for row in rows if row["candidate"] == "lcr2s_ext cpu"]
    assert {row["op"] for row in ours} == operators
    assert all(float(row["ratio"]) == 1.0 and float(row["ms"]) > 0 and row["machine"] for row in ours)


def _no_limits(device: torch.device) -> object:
    return sys.modules["side_by_side"].Limits(dict.fromkeys(sys.modules["side_by_side"].DTYPES, 1e9), 1e9)


def test_a_wrong_candidate_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side = benchmark("side_by_side", monkeypatch)
    exact = [torch.ones(3, dtype=torch.float64)]
    found = {"right": lambda: [torch.ones(3)], "wrong": lambda: [torch.ones(3) * 1.01], "absent": "not installed"}
    assert side_by_side.checked({"right": found["right"], "absent": found["absent"]}, exact, 1e-4, "sum")
    with pytest.raises(SystemExit, match=r"sum, wrong: result 0 is off by 1\.0e-02"):
        side_by_side.checked(found, exact, 1e-4, "sum")
    nothing = {"nothing": lambda: [torch.full((3,), float("nan"))]}
    with pytest.raises(SystemExit, match="off by nan"):
        side_by_side.checked(nothing, exact, 1e-4, "sum")


def test_the_default_is_read_from_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = benchmark("choose", monkeypatch)

    def row(rows: int, candidate: str, ms: float, device_ms: str = "") -> dict[str, str]:
        case = {"op": "sdm", "columns": str(rows), "width": "512", "part": "both", "dtype": "bfloat16", "detail": ""}
        return {**case, "rows": str(rows), "candidate": candidate, "ms": str(ms), "device_ms": device_ms}

    cuda, triton = choose.CUDA, choose.TRITON
    measured = [
        *(row(128, cuda, 2.0, "0.5"), row(128, triton, 1.0, "0.9")),  # the graph's time decides
        *(row(1024, cuda, 2.0), row(1024, triton, 1.0)),
        *(row(4096, cuda, 3.0), row(4096, triton, 1.0)),
        row(9000, cuda, 3.0),  # nothing to compare with
    ]
    sizes = choose.winners(measured)["sdm"]
    assert sizes == [(128, "cuda"), (1024, "triton"), (4096, "triton")]
    source = choose.entries(sizes, "gpu.csv")
    table = eval(f"({source},)", {"Choice": _dispatch.Choice})
    assert table == (_dispatch.Choice(128, "cuda", "gpu.csv"), _dispatch.Choice(None, "triton", "gpu.csv"))
