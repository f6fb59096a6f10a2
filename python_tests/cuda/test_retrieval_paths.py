"""Every path of the retrieval operators on CUDA, whatever size would choose it: the workspace's budget decides.

Run on a GPU, or in the emulator (`make emulate`).
"""

import pytest
import torch
from torch import Tensor

from lcr2s_ext.reference import retrieval as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Budgets in bytes: one query and one tile of the gallery at a time; a few; everything at once.
BUDGETS = [0, 1 << 19, 1 << 26]


def exact_features(rows: int, width: int) -> Tensor:
    """Rows of four +-1: every cosine is a multiple of 1/4 without rounding in any dtype, so that ties abound."""
    places = torch.rand(rows, width).argsort(1)[:, :4]
    signs = torch.randint(0, 2, (rows, 4)).double() * 2 - 1
    return torch.zeros(rows, width, dtype=torch.float64).scatter(1, places, signs)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "k"), [(5, 1), (140, 3), (140, 700)])
def test_topk(queries: int, k: int, dtype: torch.dtype, budget: int) -> None:
    if budget == 0 and queries > 100:
        queries = 9
    query, gallery = exact_features(queries, 70), exact_features(1100, 70)
    values, indices = reference.topk_similarity(query, gallery, k)
    # By tile maxima for few, by all scores for many.
    actual = torch.ops.lcr2s.topk_similarity(query.to(DEVICE, dtype), gallery.to(DEVICE, dtype), k, budget)
    assert torch.equal(actual[1].cpu(), indices)
    assert torch.equal(actual[0].cpu().double(), values)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("identities", [3, 100])
def test_metrics(identities: int, dtype: torch.dtype, budget: int) -> None:
    query, gallery = exact_features(150, 70), exact_features(300, 70)
    ids = torch.randint(0, identities, (150,)), torch.randint(0, identities, (300,))
    expected = reference.retrieval_statistics(query, gallery, *ids)
    actual = torch.ops.lcr2s.retrieval_metrics(
        query.to(DEVICE, dtype), gallery.to(DEVICE, dtype), *(i.to(DEVICE) for i in ids), budget
    )
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_does_not_depend_on_its_place(dtype: torch.dtype) -> None:
    """The same rows anywhere in the gallery, and anywhere among the queries, score the same bits."""
    query, gallery = torch.randn(1, 130).to(dtype), torch.randn(1, 130).to(dtype)
    values, indices = torch.ops.lcr2s.topk_similarity(
        query.expand(140, 130).to(DEVICE), gallery.expand(300, 130).to(DEVICE), 300, 1 << 26
    )
    assert bool((values == values[0, 0]).all())
    assert torch.equal(indices.cpu(), torch.arange(300).expand(140, 300))
