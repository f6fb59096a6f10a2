"""Options of test_benchmarks.py; the benchmarks import each other by name."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lcr2s_ext")
    group.addoption("--rows", type=int, default=512, help="rows of each side, queries, gallery")
    group.addoption("--width", type=int, default=256)
    group.addoption("--dtype", default="float32")
    group.addoption("--device", default="cpu")
    group.addoption("--provider", nargs="+", default=["eager", "reference", "cpu", "cuda", "triton", "peers"])
