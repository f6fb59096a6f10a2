"""Top-k and retrieval metrics: the kernels against rankings sorted by hand, ties, and what they refuse."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import backends, backends_and_dtypes, on
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcr2s_ext import triton
from lcr2s_ext.ops import retrieval_metrics, set_workspace_limit, topk_similarity
from lcr2s_ext.reference.retrieval import retrieval_statistics

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = backends()
KERNELS = backends("cpu", "triton", "cuda")


def random_features(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64).to(dtype)


def exact_features(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of four +-1 (norm 2): every cosine is a multiple of 1/4 without rounding, so that ties abound."""
    features = torch.zeros(rows, width, dtype=torch.float64)
    for row in features:
        row[torch.randperm(width)[:4]] = torch.randint(0, 2, (4,)).double() * 2 - 1
    return features.to(dtype)


def scores(query: Tensor, gallery: Tensor) -> np.ndarray:
    def unit(features: np.ndarray) -> np.ndarray:
        norm = np.sqrt((features**2).sum(1, keepdims=True))
        return np.divide(features, norm, out=np.zeros_like(features), where=norm > 0)

    return unit(query.double().numpy()) @ unit(gallery.double().numpy()).T


def rankings(query: Tensor, gallery: Tensor) -> list[list[int]]:
    """Gallery rows of each query, best first, by sorting (-score, index) pairs."""
    return [sorted(range(len(row)), key=lambda j, row=row: (-row[j], j)) for row in scores(query, gallery)]


def metrics_by_hand(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, ks: tuple[int, ...]
) -> dict[str, float]:
    """The definitions, one query at a time; average precision as the Market-1501 evaluation loops over it."""
    recalls: dict[int, list[float]] = {k: [] for k in ks}
    precisions, trapezoids, penalties = [], [], []
    owners = gallery_ids.tolist()
    for wanted, ranking in zip(query_ids.tolist(), rankings(query, gallery), strict=True):
        places = [place for place, j in enumerate(ranking) if owners[j] == wanted]
        if not places:
            continue
        for k in ks:
            recalls[k].append(float(places[0] < k))
        precisions.append(sum((hit + 1) / (place + 1) for hit, place in enumerate(places)) / len(places))
        area = 0.0
        for hit, place in enumerate(places):
            old = hit / place if place != 0 else 1.0
            area += (old + (hit + 1) / (place + 1)) / 2 / len(places)
        trapezoids.append(area)
        penalties.append(len(places) / (places[-1] + 1))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    return {
        **{f"R@{k}": mean(recalls[k]) for k in ks},
        "mAP": mean(precisions),
        "mAP_trapezoid": mean(trapezoids),
        "mINP": mean(penalties),
        "queries": len(query_ids),
        "queries_without_positive": len(query_ids) - len(precisions),
    }


def assert_same(actual: dict[str, float], expected: dict[str, float]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), key


# name: (Q, P, width, identities)
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "one of each": (1, 1, 5, 1),
    "one query": (1, 40, 7, 5),
    "one gallery row": (9, 1, 7, 3),
    "width 1": (6, 8, 1, 2),
    "width 40": (30, 70, 40, 9),
    "width 513": (11, 20, 513, 4),
    "several tiles": (230, 1100, 12, 90),
    "one identity": (20, 600, 8, 1),
    "few large identities": (40, 700, 8, 5),
    "hardly a positive": (50, 30, 6, 10**6),
}

# The same edges with fewer tiles and positives, for triton's interpreter.
INTERPRETED_SHAPES = {
    **SHAPES,
    "width 513": (5, 20, 150, 4),
    "several tiles": (140, 150, 12, 90),
    "one identity": (9, 70, 8, 1),
    "few large identities": (20, 90, 8, 5),
}


def shape_of(name: str, backend: str) -> tuple[int, int, int, int]:
    return (INTERPRETED_SHAPES if backend == "triton" and triton.INTERPRETED else SHAPES)[name]


def cases() -> list[Any]:
    """Every backend and dtype with every shape; in the interpreter one dtype a shape, in turn."""
    turn = dict(zip(SHAPES, [torch.float32, torch.bfloat16, torch.float16] * len(SHAPES), strict=False))
    return [
        pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=case.marks)
        for case in backends_and_dtypes(DTYPES)
        for name in SHAPES
        if not (triton.INTERPRETED and case.values[0] == "triton" and case.values[1] != turn[name])
    ]


@pytest.mark.parametrize(("backend", "dtype", "name"), cases())
def test_metrics(backend: str, dtype: torch.dtype, name: str) -> None:
    queries, rows, width, identities = shape_of(name, backend)
    # Exact cosines: no dtype may change the ranking.
    make = exact_features if width >= 4 else random_features
    query, gallery = make(queries, width, dtype), make(rows, width, dtype)
    if width == 1:
        query, gallery = query.sign(), gallery.sign()
    query_ids, gallery_ids = torch.randint(0, identities, (queries,)), torch.randint(0, identities, (rows,))
    ks = (1, 5, 10, 10**9)
    expected = metrics_by_hand(query, gallery, query_ids, gallery_ids, ks)
    there = on(backend, (query, gallery, query_ids, gallery_ids))
    assert_same(retrieval_metrics(*there, ks, backend=backend), expected)
    int32 = retrieval_metrics(*there[:2], there[2].int(), there[3].int(), list(ks), backend=backend)
    assert_same(int32, expected)


@pytest.mark.parametrize(("backend", "dtype", "name"), cases())
def test_topk(backend: str, dtype: torch.dtype, name: str) -> None:
    queries, rows, width, _ = shape_of(name, backend)
    make = exact_features if width >= 4 else random_features
    query, gallery = make(queries, width, dtype), make(rows, width, dtype)
    if width == 1:
        query, gallery = query.sign(), gallery.sign()
    order = torch.tensor(rankings(query, gallery))
    exact = torch.from_numpy(scores(query, gallery))
    for k in sorted({1, min(7, rows), rows}):
        values, indices = topk_similarity(*on(backend, (query, gallery)), k, backend=backend)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert indices.dtype == torch.int64
        assert torch.equal(indices.cpu(), order[:, :k])
        torch.testing.assert_close(values.cpu().double(), exact.gather(1, order[:, :k]), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 130),
    rows=st.integers(1, 700),
    width=st.integers(1, 40),
    identities=st.sampled_from([1, 3, 40, 2000]),
    duplicates=st.booleans(),
    sorted_queries=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    queries: int, rows: int, width: int, identities: int, duplicates: bool, sorted_queries: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    query, gallery = random_features(queries, width), random_features(rows, width)
    if width == 1:
        query, gallery = query.sign(), gallery.sign()
    query_ids, gallery_ids = torch.randint(0, identities, (queries,)), torch.randint(0, identities, (rows,))
    if sorted_queries:
        query_ids = query_ids.sort().values
    if not duplicates or width == 1:
        expected = metrics_by_hand(query, gallery, query_ids, gallery_ids, (1, 5))
        assert_same(retrieval_metrics(query, gallery, query_ids, gallery_ids, (1, 5), backend="cpu"), expected)
        k = 1 + seed % rows
        order = torch.tensor(rankings(query, gallery))
        assert torch.equal(topk_similarity(query, gallery, k, backend="cpu")[1], order[:, :k])
        return
    # Equal gallery rows have equal scores, to the bit, and rank by index.
    gallery = gallery[torch.randint(0, rows, (rows,)) // 3]
    values, indices = topk_similarity(query, gallery, rows, backend="cpu")
    assert torch.equal(indices.sort(1).values, torch.arange(rows).expand(queries, rows))
    assert (values[:, 1:] <= values[:, :-1]).all()
    assert (indices.diff(dim=1)[values.diff(dim=1) == 0] > 0).all()
    same = (gallery[indices[:, 1:]] == gallery[indices[:, :-1]]).all(2)
    assert (values.diff(dim=1)[same] == 0).all()
    # The metrics follow from that ranking.
    hit = gallery_ids[indices] == query_ids[:, None]
    first = torch.where(hit.any(1), hit.int().argmax(1) + 1, rows + 1)
    expected_recall = (first <= 5).double()[hit.any(1)].mean()
    actual = retrieval_metrics(query, gallery, query_ids, gallery_ids, (5,), backend="cpu")
    assert actual["R@5"] == pytest.approx(float(expected_recall), nan_ok=True)


@pytest.mark.parametrize("backend", backends("triton"))
@settings(max_examples=4, deadline=None, phases=[Phase.generate])  # shrinking in the interpreter would take minutes
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    queries=st.integers(1, 140),
    rows=st.integers(1, 150),
    width=st.integers(4, 40),
    identities=st.sampled_from([20, 2000]),
    budget=st.sampled_from([0, 20_000, 1 << 26]),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_triton(
    backend: str, dtype: torch.dtype, queries: int, rows: int, width: int, identities: int, budget: int, seed: int
) -> None:
    torch.manual_seed(seed)
    queries = queries if budget > 0 else 1 + queries % 3
    query, gallery = exact_features(queries, width, dtype), exact_features(rows, width, dtype)
    ids = torch.randint(0, identities, (queries,)), torch.randint(0, identities, (rows,))
    there = on(backend, (query, gallery, *ids))
    topk_similarity(*there[:2], 1, backend=backend)  # imports the operators
    k = 1 + seed % min(rows, 4)
    order = torch.tensor(rankings(query, gallery))
    assert torch.equal(torch.ops.lcr2s_triton.topk_similarity(*there[:2], k, budget)[1].cpu(), order[:, :k])
    expected = retrieval_statistics(query, gallery, *ids)
    for actual, exact in zip(torch.ops.lcr2s_triton.retrieval_metrics(*there, budget), expected, strict=True):
        torch.testing.assert_close(actual.cpu(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "dtype"), backends_and_dtypes([torch.float32, torch.float64, torch.bfloat16], "cpu", "triton", "cuda")
)
@pytest.mark.parametrize("copies", [3, 100])
def test_a_positive_scores_the_same_bits_as_in_the_gallery(dtype: torch.dtype, copies: int, backend: str) -> None:
    # Every gallery row is the same row: all scores tie, so the rank of row j is j + 1 exactly if bits agree.
    width, rows, queries, alone = 517, 1000, 150, 20
    if backend == "triton" and triton.INTERPRETED:
        width, rows, queries, alone, copies = 150, 270, 40, 1, copies // 9 + 1
    gallery = random_features(1, width, dtype).expand(rows, width)
    query = random_features(queries, width, dtype)
    query_ids = torch.arange(queries)
    gallery_ids = torch.full((rows,), -1)
    for q in range(alone + 1):
        places = torch.randperm(rows)[:copies].sort().values
        own = gallery_ids.clone()
        own[places] = q
        there = on(backend, (query[q : q + 1], gallery, query_ids[q : q + 1], own))
        actual = retrieval_metrics(*there, (1,), backend=backend)
        assert actual["mINP"] == copies / (int(places[-1]) + 1)
    # All queries at once: identity q owns row 6 q.
    gallery_ids[query_ids * 6] = query_ids
    actual = retrieval_metrics(*on(backend, (query, gallery, query_ids, gallery_ids)), (1,), backend=backend)
    assert actual["mAP"] == pytest.approx(float((1 / (query_ids * 6 + 1).double()).mean()), rel=1e-12)


def test_bits_do_not_depend_on_threads_or_on_the_other_queries() -> None:
    query, gallery = random_features(300, 70, torch.float32), random_features(1300, 70, torch.float32)
    ids = torch.randint(0, 50, (300,)), torch.randint(0, 50, (1300,))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(
            (topk_similarity(query, gallery, 20), torch.ops.lcr2s.retrieval_metrics(query, gallery, *ids, 1 << 26))
        )
    for topk, statistics in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][0], topk, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], statistics, strict=True))
    alone = topk_similarity(query[17:18], gallery, 20)
    assert torch.equal(alone[0], runs[0][0][0][17:18])
    assert torch.equal(alone[1], runs[0][0][1][17:18])


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes([torch.float32, torch.bfloat16], "triton", "cuda"))
def test_bits_on_a_gpu_do_not_depend_on_the_other_queries_or_on_the_run(backend: str, dtype: torch.dtype) -> None:
    query, gallery = on(backend, (random_features(70, 40, dtype), random_features(270, 40, dtype)))
    ids = on(backend, (torch.randint(0, 150, (70,)), torch.randint(0, 150, (270,))))
    first, second = (topk_similarity(query, gallery, 2, backend=backend) for _ in range(2))
    # Every tile is among the best: no maxima are taken.
    whole = topk_similarity(query, gallery, 270, backend=backend)
    for a, b, c in zip(first, second, whole, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c[:, :2])
    alone = topk_similarity(query[69:], gallery, 2, backend=backend)
    assert torch.equal(alone[0], first[0][69:])
    assert torch.equal(alone[1], first[1][69:])
    runs = [retrieval_metrics(query, gallery, *ids, backend=backend) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("backend", "dtype"), backends_and_dtypes([torch.float32, torch.bfloat16], "cpu", "triton", "cuda")
)
def test_size_of_features_does_not_matter(backend: str, dtype: torch.dtype) -> None:
    query, gallery = exact_features(6, 8), exact_features(9, 8)
    order = torch.tensor(rankings(query, gallery))
    # Their products leave float32.
    for factor, other in ((2.0**90, 1.0), (2.0**-80, 2.0**-100)):
        scaled = on(backend, ((query * factor).to(dtype), (gallery * other).to(dtype)))
        assert torch.equal(topk_similarity(*scaled, 9, backend=backend)[1].cpu(), order)


def test_a_small_workspace_changes_nothing() -> None:
    query, gallery = random_features(260, 600, torch.float32), random_features(3000, 600, torch.float32)
    ids = torch.zeros(260, dtype=torch.int64), torch.zeros(3000, dtype=torch.int64)
    full = topk_similarity(query, gallery, 700), retrieval_metrics(query, gallery, *ids)
    # Parts of 512 gallery rows, waves of 17 queries.
    set_workspace_limit(1)
    try:
        small = topk_similarity(query, gallery, 700), retrieval_metrics(query, gallery, *ids)
    finally:
        set_workspace_limit(None)
    assert torch.equal(full[0][0], small[0][0])
    assert torch.equal(full[0][1], small[0][1])
    assert full[1] == small[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_has_a_positive(backend: str) -> None:
    query, gallery = random_features(4, 8, torch.float32), random_features(5, 8, torch.float32)
    problem = on(backend, (query, gallery, torch.arange(4), torch.arange(10, 15)))
    actual = retrieval_metrics(*problem, backend=backend)
    assert list(actual) == [
        "R@1",
        "R@5",
        "R@10",
        "mAP",
        "mAP_trapezoid",
        "mINP",
        "queries",
        "queries_without_positive",
    ]
    assert all(math.isnan(actual[key]) for key in list(actual)[:6])
    assert actual["queries"] == actual["queries_without_positive"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_have_cosine_zero(backend: str) -> None:
    gallery = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    query = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    query, gallery, owners = on(backend, (query, gallery, torch.arange(4)))
    values, indices = topk_similarity(query, gallery, 4, backend=backend)
    assert indices.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]
    assert values.tolist() == [[1.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]
    actual = retrieval_metrics(query, gallery, owners[1::2], owners, (3,), backend=backend)
    assert actual["mAP"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert actual["R@3"] == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_known_ranking(backend: str) -> None:
    # Scores fall with the index; positives at ranks 1, 3 and 6.
    angles = torch.linspace(0, 1, 7)
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    ids = torch.tensor([5]), torch.tensor([5, 0, 5, 1, 2, 5, 3])
    actual = retrieval_metrics(*on(backend, (torch.tensor([[1.0, 0.0]]), gallery, *ids)), (1, 2), backend=backend)
    assert actual["R@1"] == actual["R@2"] == 1.0
    assert actual["mAP"] == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert actual["mAP_trapezoid"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3)
    assert actual["mINP"] == pytest.approx(3 / 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend: str) -> None:
    query, gallery = on(backend, (random_features(9, 6, torch.float32), random_features(14, 6, torch.float32)))
    ids = on(backend, (torch.randint(0, 4, (9,)), torch.randint(0, 4, (14,))))
    expected = topk_similarity(query, gallery, 5, backend=backend)
    measured = retrieval_metrics(query, gallery, *ids, backend=backend)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t], 1)[:, :6],
        lambda t: t.repeat_interleave(2, 0)[::2],
    ]
    for layout in layouts:
        values, indices = topk_similarity(layout(query), layout(gallery), 5, backend=backend)
        torch.testing.assert_close(values, expected[0])
        assert torch.equal(indices, expected[1])
        spread = [i.repeat_interleave(3)[::3] for i in ids]
        assert retrieval_metrics(layout(query), layout(gallery), *spread, backend=backend) == measured


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient(backend: str) -> None:
    query, gallery = (on(backend, random_features(n, 5, torch.float32)).requires_grad_() for n in (3, 4))
    values, _ = topk_similarity(query, gallery, 2, backend=backend)
    assert not values.requires_grad


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    query, gallery = on(backend, (random_features(6, 5, torch.float32), random_features(9, 5, torch.float32)))
    ids = on(backend, (torch.randint(0, 3, (6,)), torch.randint(0, 3, (9,))))
    topk_similarity(query, gallery, 1, backend=backend)  # registers Triton's
    operators = torch.ops.lcr2s_triton if backend == "triton" else torch.ops.lcr2s
    torch.library.opcheck(operators.topk_similarity.default, (query, gallery, 4, 1 << 20))
    torch.library.opcheck(operators.topk_similarity.default, (query.bfloat16(), gallery.bfloat16(), 9, 0))
    torch.library.opcheck(operators.retrieval_metrics.default, (query, gallery, *ids, 1 << 20))


@pytest.mark.parametrize("backend", KERNELS)
def test_topk_compiles_without_graph_breaks(backend: str) -> None:
    query, gallery = on(backend, (random_features(6, 5, torch.float32), random_features(9, 5, torch.float32)))

    def best(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
        return topk_similarity(query, gallery, 3, backend=backend)

    compiled = torch.compile(best, fullgraph=True, dynamic=True)
    for got, expected in zip(compiled(query, gallery), best(query, gallery), strict=True):
        assert torch.equal(got, expected)
    query[2, 1] = math.nan
    with pytest.raises((RuntimeError, ValueError), match="`query` must hold finite numbers"):
        compiled(query, gallery)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("function", ["topk", "metrics"])
def test_triton_refuses_float64_and_what_is_not_finite(function: str, backend: str) -> None:
    def call(query: Tensor, gallery: Tensor) -> object:
        if function == "topk":
            return topk_similarity(query, gallery, 2, backend=backend)
        ids = on(backend, (torch.arange(3), torch.arange(5)))
        return retrieval_metrics(query, gallery, *ids, backend=backend)

    with pytest.raises(TypeError, match=r"`query`.*float64"):
        call(*on(backend, (Q.double(), G.double())))
    for value in (math.nan, math.inf):
        bad = torch.full((5, 4), value)
        with pytest.raises(ValueError, match="`query` must hold finite numbers"):
            call(*on(backend, (bad[:3], bad)))
        with pytest.raises(ValueError, match="`gallery` must hold finite numbers"):
            call(*on(backend, (Q, bad)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    query, gallery = on(backend, (random_features(20, 30, torch.float32), random_features(40, 30, torch.float32)))
    ids = on(backend, (torch.randint(0, 9, (20,)), torch.randint(0, 9, (40,))))
    expected = topk_similarity(query, gallery, 5, backend=backend)
    measured = retrieval_metrics(query, gallery, *ids, backend=backend)
    with torch.autocast(query.device.type, torch.bfloat16):
        actual = topk_similarity(query, gallery, 5, backend=backend)
        assert retrieval_metrics(query, gallery, *ids, backend=backend) == measured
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


Q, G = torch.ones(3, 4), torch.ones(5, 4)
NOT_A_NUMBER = torch.tensor([[1.0, 1.0, math.nan, 1.0]] * 5)
INFINITE = torch.tensor([[1.0, -math.inf, 1.0, 1.0]] * 5)
FEATURES_REFUSED = [
    ("query", TypeError, [[1.0]], "list"),
    ("query", ValueError, Q[0], r"\(Q, d\)"),
    ("query", TypeError, Q.long(), "int64"),
    ("query", ValueError, Q[:0], "empty"),
    ("query", ValueError, Q[:, :0], "empty"),
    ("query", ValueError, NOT_A_NUMBER[:3], "NaN"),
    ("query", ValueError, INFINITE[:3], "finite"),
    ("gallery", ValueError, G[:, :3], "width of `query`"),
    ("gallery", TypeError, G.double(), "float64"),
    ("gallery", ValueError, G[:0], "empty"),
    ("gallery", ValueError, G.to("meta"), "meta"),
    ("gallery", ValueError, NOT_A_NUMBER, "NaN"),
    ("gallery", ValueError, INFINITE, "finite"),
    ("backend", ValueError, "gpu", "gpu"),
]
TOPK: dict[str, object] = {"query": Q, "gallery": G, "k": 2}
METRICS: dict[str, object] = {
    "query": Q,
    "gallery": G,
    "query_ids": torch.arange(3),
    "gallery_ids": torch.arange(5),
    "ks": (1, 2),
}
REFUSED: list[tuple[Callable[..., object], dict[str, object], str, type[Exception], object, str]] = [
    *[(topk_similarity, TOPK, *case) for case in FEATURES_REFUSED],
    (topk_similarity, TOPK, "k", ValueError, 0, "0"),
    (topk_similarity, TOPK, "k", ValueError, -1, "-1"),
    (topk_similarity, TOPK, "k", ValueError, 6, "6"),
    (topk_similarity, TOPK, "k", TypeError, 2.0, "float"),
    (topk_similarity, TOPK, "k", TypeError, True, "bool"),
    *[(retrieval_metrics, METRICS, *case) for case in FEATURES_REFUSED],
    (retrieval_metrics, METRICS, "query_ids", ValueError, torch.arange(4), "rows of `query`"),
    (retrieval_metrics, METRICS, "query_ids", TypeError, torch.ones(3), "float32"),
    (retrieval_metrics, METRICS, "query_ids", TypeError, [0, 1, 2], "list"),
    (retrieval_metrics, METRICS, "query_ids", ValueError, torch.zeros(3, 1).long(), r"\(3, 1\)"),
    (retrieval_metrics, METRICS, "gallery_ids", ValueError, torch.arange(4), "rows of `gallery`"),
    (retrieval_metrics, METRICS, "gallery_ids", TypeError, torch.ones(5).bool(), "bool"),
    (retrieval_metrics, METRICS, "gallery_ids", ValueError, torch.arange(5, device="meta"), "meta"),
    (retrieval_metrics, METRICS, "ks", ValueError, (1, 0), "0"),
    (retrieval_metrics, METRICS, "ks", TypeError, (1, 2.0), "float"),
    (retrieval_metrics, METRICS, "ks", TypeError, 5, "int"),
    (retrieval_metrics, METRICS, "ks", TypeError, "15", "str"),
]


@pytest.mark.parametrize(("function", "good", "argument", "error", "bad", "came"), REFUSED)
def test_refused(
    function: Callable[..., object],
    good: dict[str, object],
    argument: str,
    error: type[Exception],
    bad: object,
    came: str,
) -> None:
    assert function(**good)
    with pytest.raises(error, match=f"(?s)`{argument}`.*{came}"):
        function(**{**good, argument: bad})


DIRECT_TOPK = {**TOPK, "workspace_bytes": 1 << 20}
DIRECT_METRICS = {name: value for name, value in METRICS.items() if name != "ks"} | {"workspace_bytes": 1 << 20}
BAD_DIRECT = [
    (op, good, name, bad)
    for op, good in (("topk_similarity", DIRECT_TOPK), ("retrieval_metrics", DIRECT_METRICS))
    for name, bad in [
        *[(name, bad) for name, _, bad, _ in FEATURES_REFUSED if isinstance(bad, Tensor) and bad.is_cpu],
        ("workspace_bytes", -1),
    ]
]
BAD_DIRECT += [
    ("topk_similarity", DIRECT_TOPK, "k", 0),
    ("topk_similarity", DIRECT_TOPK, "k", 6),
    ("topk_similarity", DIRECT_TOPK, "k", 2**62),
    ("retrieval_metrics", DIRECT_METRICS, "query_ids", torch.arange(4)),
    ("retrieval_metrics", DIRECT_METRICS, "query_ids", torch.arange(3).int()),
    ("retrieval_metrics", DIRECT_METRICS, "gallery_ids", torch.arange(4)),
    ("retrieval_metrics", DIRECT_METRICS, "gallery_ids", torch.zeros(5, 1).long()),
    ("retrieval_metrics", DIRECT_METRICS, "gallery_ids", torch.zeros(5)),
]


@pytest.mark.parametrize(("op", "good", "argument", "bad"), BAD_DIRECT)
def test_direct_calls_are_refused(op: str, good: dict[str, object], argument: str, bad: object) -> None:
    function = getattr(torch.ops.lcr2s, op)
    assert function(**good)[0].shape[0] == 3
    with pytest.raises(RuntimeError, match=f"`{argument}`"):
        function(**{**good, argument: bad})


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("op", ["topk_similarity", "retrieval_metrics"])
def test_direct_calls_in_triton_are_refused(op: str, backend: str) -> None:
    topk_similarity(*on(backend, (Q, G)), 1, backend=backend)  # imports the operators
    function = getattr(torch.ops.lcr2s_triton, op)
    for name, good, argument, bad in BAD_DIRECT:
        if name == op:
            with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
                function(**on(backend, {**good, argument: bad}))
