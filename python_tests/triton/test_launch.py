"""What the operators share: when TF32 is used, what autotuning and compute capability are off the GPU."""

import subprocess
import sys

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
import os
os.environ["LCR2S_TRITON_AUTOTUNE"] = "1"
import torch
from lcr2s_ext.triton import _launch, similarity
launched = []
class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **options: launched.append((self.kernel, grid, args, options))
torch.library.wrap_triton = Recorder
for kernel, constants in (
    (similarity.similarity_statistics_kernel, {}),
    (similarity.similarity_gradient_kernel, {"KEPT": True}),
    (similarity.similarity_merge_kernel, {}),
):
    _launch.wrap_triton(kernel)[(7,)](1, num_warps=8, num_stages=3, **constants)
tuned, kept, merged = launched
print([(config.num_warps, config.num_stages, config.kwargs) for config in tuned[0].configs], tuned[0].cache_results)
print(tuned[0].keys, tuned[1:])
print(kept[0] is similarity.similarity_gradient_kernel, kept[3])
print(merged[0] is similarity.similarity_merge_kernel, merged[3])
"""


def test_autotuning_tries_stages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, for the losses' matrix kernels, but not where they write over what they read."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AUTOTUNED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[(8, 2, {}), (8, 3, {}), (8, 4, {})] True",
        "['padded_width', 'KIND', 'LOADS', 'PRECISION'] ((7,), (1,), {})",
        "True {'KEPT': True, 'num_warps': 8, 'num_stages': 3}",
        "True {'num_warps': 8, 'num_stages': 3}",
    ]
