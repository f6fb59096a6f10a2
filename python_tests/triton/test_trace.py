"""torch.compile sees the kernels inside the operators, forward and backward, whatever the shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcr2s_ext import triton

OPAQUE = {"topk_similarity", "retrieval_metrics"}
"""They read values on the host, which no graph can hold."""

pytestmark = pytest.mark.skipif(triton.UNAVAILABLE is not None, reason=str(triton.UNAVAILABLE))


@pytest.fixture(scope="module")
def traces() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("trace_operators.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Which a trace must leave to eager calls: torch would take the descriptors for constants.
    environment["LCR2S_TRITON_LOADS"] = "specialized"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", triton.MODULES)
def test_kernels_are_visible(op: str, traces: list[dict[str, Any]]) -> None:
    (trace,) = (trace for trace in traces if trace["op"] == op)
    hidden = [node for graph in (trace["forward"], *trace["backward"]) for node in graph if "lcr2s" in node]
    if op in OPAQUE:
        assert hidden
        return
    assert not hidden
    assert trace["baked"] == 0
    assert any("triton_kernel_wrapper" in node for node in trace["forward"])
    if op == "support_attention":
        assert any("triton_kernel_wrapper" in node for node in trace["backward"][0])
