"""SupportIndex: validation, the transposed index, seeded draws, and passing through PyTorch's machinery."""

import itertools
import pickle
from collections import Counter

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcr2s_ext.ops import SupportIndex

sets_over = st.integers(1, 9).flatmap(
    lambda rows: st.tuples(st.just(rows), st.lists(st.lists(st.integers(0, rows - 1), max_size=6), max_size=8))
)


def sets_of(index: SupportIndex) -> list[list[int]]:
    bounds = index.indptr.tolist()
    return [index.indices[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]


@settings(max_examples=80, deadline=None)
@given(sets_over)
def test_transposed_index(case: tuple[int, list[list[int]]]) -> None:
    rows, sets = case
    indptr = torch.tensor([0, *(len(members) for members in sets)]).cumsum(0)
    index = SupportIndex(indptr, torch.tensor([row for members in sets for row in members], dtype=torch.int64), rows)
    assert sets_of(index) == sets
    assert len(index) == len(sets)
    owners = [i for i, members in enumerate(sets) for _ in members]
    assert index.entry_rows.tolist() == owners
    flat = index.indices.tolist()
    for row in range(rows):
        users = index.t_entries[index.t_indptr[row] : index.t_indptr[row + 1]].tolist()
        assert users == [position for position, member in enumerate(flat) if member == row]
    assert index.t_indptr.shape == (rows + 1,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_dtypes_and_strides(dtype: torch.dtype) -> None:
    indices = torch.tensor([1, 9, 0, 9, 1, 9], dtype=dtype)[::2]
    index = SupportIndex(torch.tensor([0, 2, 3], dtype=dtype), indices, 2)
    assert sets_of(index) == [[1, 0], [1]]
    for tensor in pytree.tree_leaves(index):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_no_sets_and_no_rows() -> None:
    index = SupportIndex(torch.tensor([0]), torch.tensor([], dtype=torch.int64), 0)
    assert len(index) == 0
    assert index.t_indptr.tolist() == [0]
    assert repr(index) == "SupportIndex(sets=0, entries=0, num_rows=0)"


INDPTR, INDICES = torch.tensor([0, 1, 3]), torch.tensor([0, 4, 2])


@pytest.mark.parametrize(
    ("argument", "error", "arguments", "came"),
    [
        ("indptr", TypeError, ([0, 1, 3], INDICES, 5), "list"),
        ("indptr", TypeError, (INDPTR.float(), INDICES, 5), "float32"),
        ("indptr", ValueError, (INDPTR[None], INDICES, 5), r"\(1, 3\)"),
        ("indptr", ValueError, (INDPTR[:0], INDICES, 5), "none"),
        ("indptr", ValueError, (torch.tensor([1, 1, 3]), INDICES, 5), "start with 0, got 1"),
        ("indptr", ValueError, (torch.tensor([0, 1, 4]), INDICES, 5), r"\(3\), got 4"),
        ("indptr", ValueError, (torch.tensor([0, 4, 3]), INDICES, 5), "after position 1"),
        ("indices", TypeError, (INDPTR, INDICES.bool(), 5), "bool"),
        ("indices", ValueError, (INDPTR, INDICES[None], 5), r"\(1, 3\)"),
        ("indices", ValueError, (INDPTR, INDICES, 4), "got 4"),
        ("indices", ValueError, (INDPTR, torch.tensor([0, -1, 2]), 5), "got -1"),
        ("indices", ValueError, (INDPTR, INDICES.to("meta"), 5), "meta"),
        ("num_rows", TypeError, (INDPTR, INDICES, 5.0), "float"),
        ("num_rows", TypeError, (INDPTR, INDICES, True), "bool"),
        ("num_rows", ValueError, (INDPTR, INDICES, -1), "-1"),
    ],
)
def test_refused(argument: str, error: type[Exception], arguments: tuple[object, ...], came: str) -> None:
    assert sets_of(SupportIndex(INDPTR, INDICES, 5)) == [[0], [4, 2]]
    with pytest.raises(error, match=f"`{argument}`.*{came}"):
        SupportIndex(*arguments)


def test_pytree_and_pickle() -> None:
    index = SupportIndex(INDPTR, INDICES, 5)
    leaves, spec = pytree.tree_flatten(index)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, SupportIndex)
    restored = pickle.loads(pickle.dumps(index))
    for copy in (again, restored, index.to("cpu")):
        assert copy.num_rows == 5
        for ours, theirs in zip(pytree.tree_leaves(copy), leaves, strict=True):
            assert torch.equal(ours, theirs)
    assert index.to("cpu") is index
    assert index.device == torch.device("cpu")
    meta = index.to("meta")
    assert meta.device == torch.device("meta")
    assert all(tensor.is_meta for tensor in pytree.tree_leaves(meta))


IDS = torch.tensor([7, 3, 7, 7, 3, 7, 9, 7])


def test_draws_are_others_of_the_identity() -> None:
    index = SupportIndex.from_ids(IDS, 3, seed=1)
    assert len(index) == index.num_rows == 8
    for row, members in enumerate(sets_of(index)):
        assert members[0] == row
        others = members[1:]
        assert len(set(others)) == len(others)
        assert row not in others
        assert all(IDS[other] == IDS[row] for other in others)
        available = int((IDS[row] == IDS).sum()) - 1
        assert len(others) == min(3, available)
    assert sets_of(index)[6] == [6]
    without = SupportIndex.from_ids(IDS, 3, seed=1, include_self=False)
    assert sets_of(without) == [members[1:] for members in sets_of(index)]
    assert all(len(members) == 1 for members in sets_of(SupportIndex.from_ids(IDS, 0, seed=1)))


def test_draws_never_take_a_row_of_the_same_item() -> None:
    items = torch.tensor([0, 1, 0, 2, 1, 2, 3, 2])
    for seed in range(20):
        for row, members in enumerate(sets_of(SupportIndex.from_ids(IDS, 4, item_ids=items, seed=seed))):
            assert all(items[other] != items[row] for other in members[1:])
            available = int(((IDS[row] == IDS) & (items != items[row])).sum())
            assert len(members) - 1 == min(4, available)


def test_draws_follow_the_seed_alone() -> None:
    ids = torch.zeros(40, dtype=torch.int32)
    first, again, other = (SupportIndex.from_ids(ids, 3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    torch.manual_seed(123)
    assert torch.equal(SupportIndex.from_ids(ids.long(), 3, seed=5).indices, first.indices)


def test_draws_are_uniform() -> None:
    """Each of 5 other rows is drawn with probability 2/5; six standard deviations either way."""
    ids = torch.zeros(6, dtype=torch.int64)
    draws = 2000
    counts: Counter[int] = Counter()
    for seed in range(draws):
        counts.update(sets_of(SupportIndex.from_ids(ids, 2, seed=seed))[0][1:])
    assert set(counts) == {1, 2, 3, 4, 5}
    spread = 6 * (draws * 0.4 * 0.6) ** 0.5
    assert all(abs(count - 0.4 * draws) < spread for count in counts.values())


@pytest.mark.parametrize(
    ("argument", "error", "change", "came"),
    [
        ("ids", TypeError, {"ids": [1, 2]}, "list"),
        ("ids", TypeError, {"ids": IDS.float()}, "float32"),
        ("ids", ValueError, {"ids": IDS[None]}, r"\(1, 8\)"),
        ("item_ids", ValueError, {"item_ids": IDS[:3]}, r"\(3,\)"),
        ("item_ids", TypeError, {"item_ids": IDS.bool()}, "bool"),
        ("max_support", TypeError, {"max_support": 1.5}, "float"),
        ("max_support", ValueError, {"max_support": -1}, "-1"),
        ("seed", TypeError, {"seed": None}, "NoneType"),
        ("seed", ValueError, {"seed": -3}, "-3"),
        ("seed", ValueError, {"seed": 2**64}, str(2**64)),
        ("include_self", TypeError, {"include_self": "yes"}, "str"),
    ],
)
def test_draws_refused(argument: str, error: type[Exception], change: dict[str, object], came: str) -> None:
    arguments: dict[str, object] = {"ids": IDS, "max_support": 2, "seed": 0}
    with pytest.raises(error, match=f"`{argument}`.*{came}"):
        SupportIndex.from_ids(**{**arguments, **change})


def test_draws_over_no_rows() -> None:
    index = SupportIndex.from_ids(torch.tensor([], dtype=torch.int64), 2, seed=0)
    assert len(index) == 0
    assert isinstance(index.indices, Tensor)
