"""What the operators share: when TF32 is used, what autotuning and compute capability are off the GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from lcr2s_ext import triton

pytestmark = pytest.mark.skipif(triton.UNAVAILABLE is not None, reason=str(triton.UNAVAILABLE))

PRECISION = """
import torch
from lcr2s_ext.triton._launch import input_precision
print(input_precision(torch.float32))
{}
print(input_precision(torch.float32), input_precision(torch.bfloat16))
"""


@pytest.mark.parametrize(
    ("allow", "precision"),
    [
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.set_float32_matmul_precision('highest')", "ieee"),
    ],
)
def test_tf32_is_taken_only_where_the_user_allows_it(allow: str, precision: str) -> None:
    # A process of its own: PyTorch's older and newer switches do not mix within one.
    script = PRECISION.format(allow)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", precision, "ieee"]


AUTOTUNED = """
import triton
from lcr2s_ext.triton._launch import autotune
@triton.jit
def kernel(x):
    pass
tuned = autotune([(4, 2), (8, 3)], key=["x"])(kernel)
print([(config.num_warps, config.num_stages, config.kwargs) for config in getattr(tuned, "configs", [])])
print(getattr(tuned, "cache_results", None))
"""


@pytest.mark.parametrize(("interpret", "choices"), [("0", "[(4, 2, {}), (8, 3, {})]\nTrue\n"), ("1", "[]\nNone\n")])
def test_autotuning_tries_warps_and_stages_alone(
    interpret: str, choices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    script = tmp_path / "autotuned.py"  # triton reads a kernel's source
    script.write_text(AUTOTUNED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == choices
