"""lcr2s_ext.native: the identity index and its seeded draws."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcr2s_ext import native


def sets_of(drawn):
    indptr, indices = drawn
    assert indptr.dtype == np.int64
    assert indices.dtype == np.int64
    return [indices[a:b].tolist() for a, b in itertools.pairwise(indptr)]


def test_groups():
    index = native.IdentityIndex(np.array([7, -3, 7, 7, 2**62]))
    assert len(index) == index.num_rows == 5
    assert index.num_identities == 3
    assert index.identities.tolist() == [-3, 7, 2**62]
    assert index.sizes.tolist() == [1, 3, 1]
    assert index.rows(7).tolist() == [0, 2, 3]
    with pytest.raises(KeyError, match="identity 8"):
        index.rows(8)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integer_types_and_strides(dtype):
    ids = np.array([1, 9, 1, 9, 2, 9], dtype=dtype)[::2]
    assert native.IdentityIndex(ids).sizes.tolist() == [2, 1]
    assert sets_of(native.draw_support(ids, 3, seed=0)) == [[0, 1], [1, 0], [2]]


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    items=st.integers(1, 9),
    max_support=st.integers(0, 45),
    include_self=st.booleans(),
    distinct=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_draws(ids, items, max_support, include_self, distinct, seed):
    ids = np.array(ids)
    item_ids = np.arange(len(ids)) % items
    drawn = sets_of(
        native.draw_support(
            ids, max_support, item_ids=item_ids, include_self=include_self, distinct_items=distinct, seed=seed
        )
    )
    for row, support in enumerate(drawn):
        if include_self:
            assert support.pop(0) == row
        others = [r for r in range(len(ids)) if ids[r] == ids[row] and item_ids[r] != item_ids[row]]
        available = len({item_ids[r] for r in others}) if distinct else len(others)
        assert len(support) == min(max_support, available)
        assert support == sorted(set(support))
        assert set(support) <= set(others)
        if distinct:
            assert len({item_ids[r] for r in support}) == len(support)


def test_a_draw_depends_on_seed_epoch_and_key_alone():
    index = native.IdentityIndex(np.zeros(50, dtype=np.int64))
    rows = np.array([3, 41, 7, 3])
    together = sets_of(index.draw(rows, max_support=5, seed=11, epoch=2))
    alone = [sets_of(index.draw(rows[i : i + 1], max_support=5, seed=11, epoch=2))[0] for i in (2, 0, 1, 3)]
    assert together == [alone[1], alone[2], alone[0], alone[3]]
    assert together != sets_of(index.draw(rows, max_support=5, seed=11, epoch=3))
    assert together != sets_of(index.draw(rows, max_support=5, seed=12, epoch=2))
    keyed = sets_of(index.draw(rows, max_support=5, keys=np.array([1, 2, 3, 4]), seed=11, epoch=2))
    assert keyed[0] != keyed[3]


MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15


def mix(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def stream(*keys):
    state = 0
    for key in keys:
        state = mix((state + STEP + mix((key + STEP) & MASK)) & MASK)
    while True:
        state = (state + STEP) & MASK
        yield mix(state)


def test_draws_are_fixed_for_ever():
    # A change of the generator would silently change every run that is resumed, so it is spelt out here once more.
    rows, count = 12, 4
    index = native.IdentityIndex(np.zeros(rows, dtype=np.int64))
    drawn = sets_of(index.draw(np.arange(rows), max_support=count, include_self=False, seed=5, epoch=1))
    for row, support in enumerate(drawn):
        numbers = stream(5, 1, row)
        chosen = []
        for last in range(rows - 1 - count, rows - 1):
            pick = next(numbers) * (last + 1) >> 64
            chosen.append(last if pick in chosen else pick)
        others = [other for other in range(rows) if other != row]
        assert support == sorted(others[pick] for pick in chosen)


def test_permutations_are_fixed_for_ever():
    expected, numbers = list(range(20)), stream(5, 1)
    for left in range(20, 1, -1):
        other = next(numbers) * left >> 64
        expected[left - 1], expected[other] = expected[other], expected[left - 1]
    assert native.permutation(20, seed=5, epoch=1).tolist() == expected


@pytest.mark.parametrize("max_support", [3, 40])
def test_every_other_row_is_equally_likely(max_support):
    rows = 60
    index = native.IdentityIndex(np.zeros(rows, dtype=np.int64))
    trials = 4000
    _, indices = index.draw(
        np.zeros(trials, dtype=np.int64), max_support=max_support, keys=np.arange(trials), include_self=False, seed=1
    )
    counts = np.bincount(indices, minlength=rows)
    assert counts[0] == 0
    share = max_support / (rows - 1)
    deviation = np.sqrt(trials * share * (1 - share))
    assert np.abs(counts[1:] - trials * share).max() < 5 * deviation


def test_permutation():
    orders = [native.permutation(100, seed=3, epoch=epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == native.permutation(100, seed=3).tolist()
    assert native.permutation(0, seed=3).tolist() == []


def test_empty():
    empty = np.array([], dtype=np.int64)
    index = native.IdentityIndex(empty)
    assert index.num_identities == 0
    assert sets_of(native.draw_support(empty, 3, seed=0)) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: native.draw_support([1, 2], 1, seed=0), TypeError, "`ids` must be a numpy array.*list"),
        (lambda: native.draw_support(np.ones(2), 1, seed=0), TypeError, "`ids` must be int32 or int64.*float64"),
        (lambda: native.draw_support(np.ones((2, 2), int), 1, seed=0), ValueError, "`ids` must have one dim.*2"),
        (lambda: native.draw_support(np.arange(2), -1, seed=0), ValueError, "`max_support`.*-1"),
        (lambda: native.draw_support(np.arange(2), True, seed=0), TypeError, "`max_support` must be an int.*bool"),
        (lambda: native.draw_support(np.arange(2), 1, seed=-5), ValueError, "`seed`.*-5"),
        (lambda: native.draw_support(np.arange(2), 1, seed=2**64), ValueError, "`seed`"),
        (lambda: native.draw_support(np.arange(2), 1, seed=0.5), TypeError, "`seed` must be an int.*float"),
        (lambda: native.draw_support(np.arange(2), 1, seed=0, epoch=-1), ValueError, "`epoch`.*-1"),
        (
            lambda: native.draw_support(np.arange(2), 1, item_ids=np.arange(3), seed=0),
            ValueError,
            r"`item_ids` must have as many elements as `ids` \(2\), got 3",
        ),
        (
            lambda: native.draw_support(np.arange(2), 1, rows=np.array([2]), seed=0),
            ValueError,
            r"`rows`.*\[0, 2\), got 2",
        ),
        (lambda: native.draw_support(np.arange(2), 1, rows=np.array([-1]), seed=0), ValueError, "`rows`.*-1"),
        (
            lambda: native.draw_support(np.arange(2), 1, rows=np.array([0]), keys=np.arange(2), seed=0),
            ValueError,
            "`keys` must have as many",
        ),
        (lambda: native.permutation(-1, seed=0), ValueError, "`size`"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_threads_may_draw_from_one_index():
    index = native.IdentityIndex(np.arange(20_000) // 10)
    expected = index.draw(max_support=4, seed=1)[1]
    results = []
    threads = [threading.Thread(target=lambda: results.append(index.draw(max_support=4, seed=1)[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


def test_build_info():
    from lcr2s_ext import __version__

    info = native.build_info()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in info.items())
    assert info["version"] == __version__
    assert info["C++ compiler"]
