"""SupportSetFusion against the formula written out row by row in float64, and the laws of the method."""

import pytest
import torch
from torch import Tensor

from lcr2s_ext.nn import SupportSetFusion
from lcr2s_ext.ops import SupportIndex

WIDTH, HEADS = 24, 3


def make(**options: object) -> SupportSetFusion:
    return SupportSetFusion(WIDTH, HEADS, **options).double().eval()  # type: ignore[arg-type]


def make_support(sets: list[list[int]], rows: int) -> SupportIndex:
    lengths = torch.tensor([0, *(len(members) for members in sets)])
    return SupportIndex(lengths.cumsum(0), torch.tensor([row for members in sets for row in members]), rows)


def by_hand(fusion: SupportSetFusion, pool: Tensor, sets: list[list[int]]) -> Tensor:
    x = fusion.input_norm(pool)
    rows = []
    for own, members in enumerate(sets):
        query = fusion.query(x[own]).view(HEADS, -1)
        key, value = (part.view(len(members), HEADS, -1) for part in fusion.key_value(x[members]).chunk(2, 1))
        weights = torch.einsum("he,jhe->hj", query, key).div((WIDTH / HEADS) ** 0.5).softmax(1)
        attended = torch.einsum("hj,jhe->he", weights, value).reshape(-1)
        rows.append(fusion.output_norm(x[own] + fusion.output(attended)))
    return torch.stack(rows)


SETS = [[0, 4, 6], [1], [2, 5, 0, 3], [3, 7]]


def test_equals_the_formula() -> None:
    fusion, pool = make(), torch.randn(8, WIDTH, dtype=torch.float64)
    fused = fusion(pool, make_support(SETS, 8))
    assert fused.shape == (4, WIDTH)
    torch.testing.assert_close(fused, by_hand(fusion, pool, SETS))


def test_order_of_the_support_does_not_matter() -> None:
    fusion, pool = make(feed_forward=32), torch.randn(8, WIDTH, dtype=torch.float64)
    turned = [[*members[:1], *reversed(members[1:])] for members in SETS]
    torch.testing.assert_close(fusion(pool, make_support(SETS, 8)), fusion(pool, make_support(turned, 8)))


def test_no_support_is_a_set_of_oneself() -> None:
    fusion, pool = make(), torch.randn(5, WIDTH, dtype=torch.float64)
    alone = make_support([[row] for row in range(5)], 5)
    torch.testing.assert_close(fusion(pool, None), fusion(pool, alone))


def test_support_changes_the_result() -> None:
    fusion, pool = make(), torch.randn(8, WIDTH, dtype=torch.float64)
    difference = fusion(pool, make_support(SETS, 8)) - fusion(pool, None)[:4]
    assert difference[1].abs().max() < 1e-12  # its set is itself alone
    assert (difference[[0, 2, 3]].abs().amax(1) > 1e-6).all()


def test_anchors_anywhere_in_the_pool() -> None:
    fusion, pool = make(), torch.randn(8, WIDTH, dtype=torch.float64)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 4, 6])
    place = order.argsort()
    moved = make_support([[int(place[row]) for row in members] for members in SETS], 8)
    torch.testing.assert_close(fusion(pool[order], moved, anchors=place[:4]), fusion(pool, make_support(SETS, 8)))


def test_gradients_reach_every_weight_and_the_support_rows() -> None:
    fusion, pool = make(feed_forward=16).train(), torch.randn(8, WIDTH, dtype=torch.float64, requires_grad=True)
    fusion(pool, make_support(SETS, 8)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in fusion.parameters())
    assert pool.grad is not None
    assert (pool.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"width": 0}, "width"),
        ({"width": 10, "num_heads": 3}, "num_heads"),
        ({"width": 8, "num_heads": 0}, "num_heads"),
        ({"width": 8, "feed_forward": 0}, "feed_forward"),
        ({"width": 8, "dropout": 1.0}, "dropout"),
    ],
)
def test_refuses_bad_options(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SupportSetFusion(**arguments)  # type: ignore[arg-type]


def test_refuses_bad_calls() -> None:
    fusion, support = make(), make_support(SETS, 8)
    with pytest.raises(TypeError, match="pool"):
        fusion([[0.0]], support)
    with pytest.raises(ValueError, match=r"pool: expected shape \(M, 24\)"):
        fusion(torch.randn(8, 7).double(), support)
    with pytest.raises(ValueError, match="support: made for a pool of 8 rows"):
        fusion(torch.randn(9, WIDTH).double(), support)
    with pytest.raises(ValueError, match="anchors"):
        fusion(torch.randn(8, WIDTH).double(), support, anchors=torch.arange(3))
    with pytest.raises(ValueError, match="support: 3 sets but only 2"):
        fusion(torch.randn(2, WIDTH).double(), make_support([[0], [1], [1]], 2))
