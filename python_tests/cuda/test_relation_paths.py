"""Every path of the relation losses on CUDA, whatever the size that would choose it: the workspace's budget decides.

Run on a GPU, or in the emulator (`make emulate`).
"""

import pytest
import torch
from tolerances import assert_matches_oracle, gradients
from torch import Tensor

from lcr2s_ext.ops import relation_frobenius_loss, relation_kl_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Budgets in bytes: one tile of rows at a time; a few; everything at once, cosines kept where their width is worth it.
BUDGETS = [0, 1 << 19, 1 << 26]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    rows, columns, width, teacher_width = shape
    sizes = [(rows, width), (columns, width), (rows, teacher_width), (columns, teacher_width)]
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def on_device(features: list[Tensor]) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in features]


def assert_all_match(actual: tuple[Tensor, ...], exact: list[Tensor], dtype: torch.dtype) -> None:
    for name, ours, expected in zip(("loss", "image", "text", "scale"), actual, exact, strict=False):
        assert_matches_oracle(ours.cpu(), expected, dtype, name)


# Widths of kept and of formed cosines, more than one tile each way; in half types only wide ones are kept.
KL_SHAPES = [(300, 200, 50, 20), (140, 130, 40, 610)]


def kl(features: list[Tensor], budget: int, needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple[Tensor, ...]:
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    scales = [torch.tensor(scale, dtype=dtype, device=DEVICE) for scale in (12.0, 17.0)]
    return torch.ops.lcr2s.relation_kl(*on_device(features), *scales, budget, *needs)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KL_SHAPES, ids=str)
def test_kl(shape: tuple[int, int, int, int], dtype: torch.dtype, budget: int) -> None:
    features = problem(shape, dtype)
    image, text, *teacher = (tensor.double() for tensor in features)
    exact = gradients(
        lambda i, t, s: relation_kl_loss(i, t, *teacher, student_scale=s, teacher_scale=17.0, backend="reference"),
        [image, text, torch.tensor(12.0, dtype=torch.float64)],
    )
    assert_all_match(kl(features, budget), exact, dtype)


@pytest.mark.parametrize("budget", BUDGETS)
def test_kl_only_what_is_needed(budget: int) -> None:
    """Each gradient alone is the one that comes with the others, to the bit, and so is the loss without any."""
    features = problem(KL_SHAPES[0], torch.bfloat16)
    full = kl(features, budget)
    for needs in ((False, False, False), (True, False, False), (False, True, True)):
        part = kl(features, budget, needs)
        assert torch.equal(part[0], full[0])
        for ours, expected, needed in zip(part[1:], full[1:], needs, strict=True):
            assert torch.equal(ours, expected) if needed else ours.numel() == 0


# Gram matrices; differences, in three slabs where the budget is small; the same where widths differ.
FROBENIUS_SHAPES = [(500, 400, 16, 16), (300, 140, 200, 200), (300, 140, 150, 210)]


@pytest.mark.parametrize("budget", [0, 1 << 26])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FROBENIUS_SHAPES, ids=str)
def test_frobenius(shape: tuple[int, int, int, int], dtype: torch.dtype, budget: int) -> None:
    features = problem(shape, dtype)
    image, text, *teacher = (tensor.double() for tensor in features)
    exact = gradients(lambda i, t: relation_frobenius_loss(i, t, *teacher, backend="reference"), [image, text])
    actual = torch.ops.lcr2s.relation_frobenius(*on_device(features), 2, budget, True, True)
    assert_all_match(actual, exact, dtype)
