"""Fixtures that every folder of the tests shares."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# `from tolerances import ...` works wherever the tests were copied to, with whatever working directory.
sys.path.insert(0, str(Path(__file__).resolve().parent))

# The same cases everywhere, so that no result hangs on luck; `--hypothesis-profile random` draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("same")

# Where there is no GPU, Triton kernels run in triton's interpreter, on CPU tensors. Read when lcr2s_ext is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> str:
    """What this machine lacks, and whose tests are therefore not collected."""
    from backends import MISSING

    return "; ".join(f"not collected: tests of {name} ({why})" for name, why in MISSING.items())


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Each test starts from one seed and on one thread: the workers of the test run already fill the cores."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
