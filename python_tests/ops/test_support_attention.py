"""Support attention: the kernel against its twin and against plain loops, and what it refuses."""

import math
import re
from typing import Any

import pytest
import torch
from backends import DEVICES, backends, on
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerances import assert_matches_oracle, assert_no_worse_than_pytorch, gradients
from torch import Tensor

from lcr2s_ext import triton
from lcr2s_ext.ops import SupportIndex, support_attention, use_backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KERNELS = backends("cpu", "triton", "cuda")
BACKENDS = backends()
DOUBLE_BACKENDS = backends("cpu", "reference", "cuda")

# name: (lengths of the sets, pool rows, heads, width, value width)
SHAPES: dict[str, tuple[list[int], int, int, int, int]] = {
    "one row": ([3], 5, 2, 8, 8),
    "one entry each": ([1, 1, 1], 3, 1, 4, 4),
    "empty sets": ([0, 2, 0, 3, 0], 7, 3, 16, 16),
    "all sets empty": ([0, 0, 0], 4, 2, 8, 8),
    "no queries": ([], 4, 2, 8, 8),
    "no pool": ([0, 0], 0, 2, 8, 8),
    "a set of 500": ([2, 500, 1], 40, 2, 24, 24),
    "more pool rows than queries": ([4, 0, 2], 97, 8, 16, 16),
    "fewer pool rows than queries": ([3] * 16, 2, 4, 8, 8),
    "width 1": ([2, 3, 1], 5, 3, 1, 1),
    "width 40": ([5, 0, 9], 11, 1, 40, 40),
    "width 513": ([5, 1, 2], 6, 2, 513, 513),
    "value wider than key": ([4, 3], 9, 3, 7, 70),
    "value narrower than key": ([4, 3], 9, 17, 33, 5),
    "many tasks": ([3, 0, 8, 1] * 50, 60, 8, 200, 200),
}


# In the interpreter a program is a few hundred calls of numpy: what the tiles of other shapes show already is left out.
SLOW_IN_THE_INTERPRETER = {"many tasks"}
HALF_IN_THE_INTERPRETER = {"empty sets", "fewer pool rows than queries", "width 40", "width 513", "no queries"}


def value_cases() -> list[Any]:
    """("backend", "dtype", "shape") of every case that runs."""
    cases = []
    for backend in BACKENDS:
        name = backend.values[0]
        for dtype in DTYPES:
            for title, shape in SHAPES.items():
                if name == "triton" and dtype == torch.float64:
                    continue
                half = dtype in (torch.bfloat16, torch.float16)
                slow = title in SLOW_IN_THE_INTERPRETER or (half and title not in HALF_IN_THE_INTERPRETER)
                if name == "triton" and triton.INTERPRETED and slow:
                    continue
                cases.append(pytest.param(name, dtype, shape, id=f"{name}-{dtype}-{title}", marks=backend.marks))
    return cases


def problem(
    shape: tuple[list[int], int, int, int, int], dtype: torch.dtype = torch.float64, backend: str = "cpu"
) -> tuple[list[Tensor], SupportIndex, Tensor]:
    """[query, key, value], the index, and a gradient of the result, where `backend` takes them."""
    lengths, pool, heads, width, value_width = shape
    indptr = torch.tensor([0, *lengths]).cumsum(0)
    indices = torch.randint(0, max(pool, 1), (sum(lengths),))
    batch = len(lengths)
    sizes = [(batch, heads, width), (pool, heads, width), (pool, heads, value_width), (batch, heads, value_width)]
    query, key, value, upstream = (torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)
    return on(backend, ([query, key, value], SupportIndex(indptr, indices, pool), upstream))


def loops(query: Tensor, key: Tensor, value: Tensor, index: SupportIndex, scale: float | None = None) -> Tensor:
    """Attention set by set with torch.softmax: shares nothing with the twin or the kernel."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    bounds = index.indptr.tolist()
    rows = []
    for i in range(len(index)):
        members = index.indices[bounds[i] : bounds[i + 1]]
        probs = torch.softmax(torch.einsum("hd,shd->sh", query[i], key[members]) * scale, dim=0)
        rows.append(torch.einsum("sh,shd->hd", probs, value[members]))
    return torch.stack(rows) if rows else value.new_zeros(0, query.shape[1], value.shape[2])


def padded(query: Tensor, key: Tensor, value: Tensor, index: SupportIndex) -> Tensor:
    """What PyTorch offers: rows gathered into padded slots, then scaled_dot_product_attention."""
    lengths = index.indptr.diff()
    slots = torch.arange(int(lengths.max()), device=query.device) < lengths.unsqueeze(1)
    rows = torch.zeros(slots.shape, dtype=torch.int64, device=query.device).masked_scatter(slots, index.indices)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.unsqueeze(2), key[rows].transpose(1, 2), value[rows].transpose(1, 2), attn_mask=slots[:, None, None]
    )
    return out.squeeze(2)


@pytest.mark.parametrize(("backend", "dtype", "shape"), value_cases())
def test_value_and_gradients(backend: str, dtype: torch.dtype, shape: tuple[list[int], int, int, int, int]) -> None:
    inputs, index, upstream = problem(shape, dtype, backend)
    actual = gradients(lambda q, k, v: support_attention(q, k, v, index, backend=backend), inputs, upstream)
    if not shape[0]:
        assert actual[0].shape == (0, shape[2], shape[4])
        assert all(not gradient.any() for gradient in actual[1:])
        return
    expected = gradients(lambda *t: loops(*t, index), [t.double() for t in inputs], upstream)
    for name, ours, exact in zip(("out", "query", "key", "value"), actual, expected, strict=True):
        assert ours.dtype == dtype
        assert_matches_oracle(ours, exact, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["a set of 500", "width 513", "fewer pool rows than queries"])
@pytest.mark.parametrize("backend", KERNELS)
def test_no_worse_than_pytorch(backend: str, name: str, dtype: torch.dtype) -> None:
    if backend == "triton" and triton.INTERPRETED and name == "a set of 500":
        name = "width 40"
    inputs, index, upstream = problem(SHAPES[name], dtype, backend)
    exact = gradients(lambda *t: loops(*t, index), [t.double() for t in inputs], upstream)
    pytorch = gradients(lambda *t: padded(*t, index), inputs, upstream)
    ours = gradients(lambda *t: support_attention(*t, index, backend=backend), inputs, upstream)
    for part, a, b, c in zip(("out", "query", "key", "value"), ours, pytorch, exact, strict=True):
        assert_no_worse_than_pytorch(a, b, c, part)


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs, index, _ = problem(([2, 0, 3, 1], 4, 2, 3, 5), backend=backend)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *t: support_attention(*t, index, backend=backend), leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda *t: support_attention(*t, index, backend=backend), leaves)


ANY_SHAPE = {
    "lengths": st.lists(st.integers(0, 9), min_size=1, max_size=12),
    "pool": st.integers(1, 12),
    "heads": st.integers(1, 9),
    "width": st.integers(1, 35),
    "value_width": st.integers(1, 35),
    "scale": st.sampled_from([None, 0.0, -0.7, 3.0]),
    "seed": st.integers(0, 1000),
}


def check_any_shape(
    backend: str, dtype: torch.dtype, scale: float | None, seed: int, shape: tuple[list[int], int, int, int, int]
) -> None:
    torch.manual_seed(seed)
    inputs, index, upstream = problem(shape, dtype, backend)
    expected = gradients(lambda *t: loops(*t, index, scale), [t.double() for t in inputs], upstream)
    actual = gradients(lambda *t: support_attention(*t, index, scale=scale, backend=backend), inputs, upstream)
    # Gradients that cancel leave roundings of their terms behind, and steep scores magnify those of float32.
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-4, 5e-5)
    atol *= max(1.0, *(float(exact.abs().max()) for exact in expected))
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None)
@given(**ANY_SHAPE)
def test_any_shape(
    lengths: list[int], pool: int, heads: int, width: int, value_width: int, scale: float | None, seed: int
) -> None:
    check_any_shape("cpu", torch.float64, scale, seed, (lengths, pool, heads, width, value_width))


@pytest.mark.parametrize("backend", backends("triton"))
@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # shrinking in the interpreter would take minutes
@given(**ANY_SHAPE)
def test_any_shape_in_triton(
    backend: str,
    lengths: list[int],
    pool: int,
    heads: int,
    width: int,
    value_width: int,
    scale: float | None,
    seed: int,
) -> None:
    check_any_shape(backend, torch.float32, scale, seed, (lengths, pool, heads, width, value_width))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("backend", KERNELS)
def test_some_gradients_only(backend: str, wanted: tuple[bool, bool, bool]) -> None:
    inputs, index, upstream = problem(SHAPES["empty sets"], torch.float32, backend)
    full = gradients(lambda *t: support_attention(*t, index, backend=backend), inputs, upstream)
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(inputs, wanted, strict=True)]
    support_attention(*leaves, index, backend=backend).backward(upstream)
    for leaf, need, gradient in zip(leaves, wanted, full[1:], strict=True):
        assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None


@pytest.mark.parametrize("backend", KERNELS)
def test_no_grad_gives_the_same_bits_and_keeps_nothing(backend: str) -> None:
    inputs, index, _ = problem(SHAPES["value wider than key"], torch.float32, backend)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.no_grad():
        inference = support_attention(*leaves, index, backend=backend)
    training = support_attention(*leaves, index, backend=backend)
    assert not inference.requires_grad
    assert training.requires_grad
    assert torch.equal(inference, training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    inputs, index, upstream = problem(SHAPES["many tasks"], dtype)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(gradients(lambda *t: support_attention(*t, index), inputs, upstream))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("value_width", [128, 136])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_the_caches_hold(dtype: torch.dtype, value_width: int) -> None:
    # The kernel asks for rows ahead, and writes rows of whole cache lines (width 128, not 136) past the caches.
    inputs, index, upstream = problem(([3, 0, 8, 1] * 400 + [300], 1601, 8, 128, value_width), dtype)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(gradients(lambda *t: support_attention(*t, index, backend="cpu"), inputs, upstream))
    exact_inputs = [tensor.double() for tensor in inputs]
    expected = gradients(lambda *t: support_attention(*t, index, backend="reference"), exact_inputs, upstream)
    for name, one, two, exact in zip(("out", "query", "key", "value"), *runs, expected, strict=True):
        assert torch.equal(one, two)
        assert_matches_oracle(one, exact, dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend: str) -> None:
    (query, key, value), index, upstream = problem(SHAPES["empty sets"], torch.float32, backend)
    expected = gradients(lambda *t: support_attention(*t, index, backend=backend), [query, key, value], upstream)
    layouts = [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
        # Rows of a fused projection: dense rows, wide stride.
        lambda t: torch.stack([t, t], 1)[:, 0],
        lambda t: t.repeat_interleave(2, 0)[::2],
    ]
    for layout in layouts:
        views = [layout(t.detach()).requires_grad_() for t in (query, key, value)]
        out = support_attention(*views, index, backend=backend)
        torch.testing.assert_close(out.detach(), expected[0])
        for ours, exact in zip(torch.autograd.grad(out, views, layout(upstream)), expected[1:], strict=True):
            torch.testing.assert_close(ours, exact)
    # A sum's gradient is one number expanded.
    out = support_attention(query.requires_grad_(), key, value, index, backend=backend)
    ones = torch.ones_like(upstream)
    exact = gradients(lambda *t: support_attention(*t, index, backend=backend), [query, key, value], ones)[1]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), query)[0], exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_reaches_its_own_sets_only(where: int, backend: str) -> None:
    inputs, _, upstream = problem(([2, 2, 0], 4, 2, 8, 8), torch.float32, backend)
    index = on(backend, SupportIndex(torch.tensor([0, 2, 4, 4]), torch.tensor([0, 1, 2, 3]), 4))
    inputs[where][0, 0, 3] = math.nan
    out, query, key, value = gradients(lambda *t: support_attention(*t, index, backend=backend), inputs, upstream)
    assert out[0, 0].isnan().any()
    assert out[0, 1].isfinite().all()
    assert out[1:].isfinite().all()
    assert key[:2, 0].isnan().any()
    for untouched in (query[1:], key[2:], value[2:], query[:, 1], key[:, 1], value[:, 1]):
        assert untouched.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    inputs, index, upstream = problem(SHAPES["empty sets"], torch.float32, backend)
    inputs[0] *= 1e4
    expected = gradients(lambda *t: loops(*t, index), [t.double() for t in inputs], upstream)
    actual = gradients(lambda *t: support_attention(*t, index, backend=backend), inputs, upstream)
    assert_matches_oracle(actual[0], expected[0], torch.float16, "out")
    assert all(result.isfinite().all() for result in actual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_rows_and_order(backend: str) -> None:
    inputs, _, _ = problem(([4], 3, 2, 8, 8), torch.float32, backend)
    one = on(backend, SupportIndex(torch.tensor([0, 4]), torch.tensor([2, 0, 0, 1]), 3))
    other = on(backend, SupportIndex(torch.tensor([0, 4]), torch.tensor([0, 1, 2, 0]), 3))
    torch.testing.assert_close(
        support_attention(*inputs, one, backend=backend), support_attention(*inputs, other, backend=backend)
    )
    torch.testing.assert_close(support_attention(*inputs, one, backend=backend), loops(*inputs, one))


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    inputs, index, upstream = problem(([2, 0, 3], 5, 2, 6, 4), torch.float32, backend)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    arrays = (index.indptr, index.indices, index.entry_rows, index.t_indptr, index.t_entries)
    support_attention(*leaves, index, backend=backend)  # registers Triton's
    library = torch.ops.lcr2s_triton if backend == "triton" else torch.ops.lcr2s
    torch.library.opcheck(library.support_attention.default, (*leaves, *arrays, 0.4, True))
    probs = library.support_attention(*leaves, *arrays, 0.4, True)[1]
    plain = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(
        library.support_attention_backward.default,
        (upstream, *plain, probs, *arrays, 0.4, True, False, True),
    )
    # A row of probabilities sums to one, over sets that are not empty.
    assert torch.allclose(probs[:2].sum(0), torch.ones(2, device=probs.device))


@pytest.mark.parametrize("backend", KERNELS)
def test_compile_without_graph_breaks(backend: str) -> None:
    inputs, index, upstream = problem(SHAPES["empty sets"], torch.float32, backend)
    expected = gradients(lambda *t: support_attention(*t, index, backend=backend), inputs, upstream)

    def attention(query: Tensor, key: Tensor, value: Tensor, support: SupportIndex) -> Tensor:
        return support_attention(query, key, value, support)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    with use_backend(backend):
        actual = gradients(lambda *t: compiled(*t, index), inputs, upstream)
    for ours, exact in zip(actual, expected, strict=True):
        assert torch.equal(ours, exact)
    # Another backend is another graph, not the old one again.
    with use_backend("reference"):
        torch.testing.assert_close(compiled(*inputs, index), expected[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_export(backend: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, support: SupportIndex) -> Tensor:
            return support_attention(query, key, value, support, backend=backend)

    inputs, index, _ = problem(SHAPES["empty sets"], torch.float32, backend)
    program = torch.export.export(Attention(), (*inputs, index))
    namespace = "lcr2s_triton" if backend == "triton" else "lcr2s"
    assert any(f"{namespace}.support_attention" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs, index), support_attention(*inputs, index, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    (query, key, value), index, _ = problem(SHAPES["empty sets"], torch.float32, backend)
    exact = loops(query.bfloat16().double(), key.bfloat16().double(), value.bfloat16().double(), index)
    leaf = query.clone().requires_grad_()
    with torch.autocast(DEVICES[backend], torch.bfloat16):
        out = support_attention(leaf, key.bfloat16(), value, index, backend=backend)
    assert out.dtype == torch.bfloat16
    assert_matches_oracle(out.detach(), exact, torch.bfloat16)
    out.sum().backward()
    assert leaf.grad.dtype == torch.float32
    doubles = [tensor.double() for tensor in (query, key, value)]
    with torch.autocast(DEVICES[backend], torch.bfloat16):
        if backend == "triton":
            with pytest.raises(TypeError, match=r"`query`.*on backend 'triton', got float64"):
                support_attention(*doubles, index, backend=backend)
        else:
            assert support_attention(*doubles, index, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward_is_refused(backend: str) -> None:
    inputs, index, _ = problem(SHAPES["one row"], torch.float32, backend)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = support_attention(*leaves, index, backend=backend)
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first[0].sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_stays_on_the_backend_of_its_forward(backend: str) -> None:
    inputs, index, _ = problem(SHAPES["one row"], torch.float32, backend)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = support_attention(*leaves, index, backend=backend)
    with use_backend("reference"):
        out.sum().backward()
    assert out.grad_fn is not None
    assert "lcr2s" in type(out.grad_fn).__name__.lower()
    assert leaves[0].grad.isfinite().all()


Q, K, V = torch.zeros(2, 3, 4), torch.zeros(5, 3, 4), torch.zeros(5, 3, 6)
SETS = SupportIndex(torch.tensor([0, 1, 3]), torch.tensor([0, 4, 2]), 5)
REFUSED = {
    "query": [
        (ValueError, {"query": Q[0]}, r"\(B, H, D\)"),
        (TypeError, {"query": [1.0]}, "list"),
        (TypeError, {"query": Q.long()}, "int64"),
        (ValueError, {"query": torch.zeros(3, 3, 4)}, "sets"),
        (ValueError, {"query": Q[:, :, :0], "key": K[:, :, :0]}, "at least 1"),
    ],
    "key": [
        (ValueError, {"key": K[:4]}, "num_rows"),
        (ValueError, {"key": K[:, :2]}, "heads"),
        (ValueError, {"key": K[:, :, :3]}, "head width"),
        (TypeError, {"key": K.double()}, "float64"),
        (ValueError, {"key": K.to("meta")}, "meta"),
    ],
    "value": [
        (ValueError, {"value": V[:4]}, "num_rows"),
        (ValueError, {"value": V[:, :2]}, "heads"),
        (TypeError, {"value": V.half()}, "float16"),
        (TypeError, {"value": None}, "NoneType"),
    ],
    "support": [
        (TypeError, {"support": torch.zeros(3)}, "SupportIndex"),
        (ValueError, {"support": SETS.to("meta")}, "meta"),
    ],
    "scale": [
        (TypeError, {"scale": "1"}, "str"),
        (TypeError, {"scale": True}, "bool"),
        (ValueError, {"scale": math.nan}, "nan"),
        (ValueError, {"scale": math.inf}, "inf"),
    ],
    "backend": [(ValueError, {"backend": "gpu"}, "gpu")],
}


@pytest.mark.parametrize(
    ("argument", "error", "change", "came"),
    [(argument, *case) for argument, cases in REFUSED.items() for case in cases],
)
def test_refused(argument: str, error: type[Exception], change: dict[str, object], came: str) -> None:
    arguments: dict[str, object] = {"query": Q, "key": K, "value": V, "support": SETS}
    assert support_attention(**arguments).shape == (2, 3, 6)
    with pytest.raises(error, match=f"(?s)`{argument}`.*{came}"):
        support_attention(**{**arguments, **change})


FORWARD = {
    "query": Q,
    "key": K,
    "value": V,
    "indptr": SETS.indptr,
    "indices": SETS.indices,
    "entry_rows": SETS.entry_rows,
    "t_indptr": SETS.t_indptr,
    "t_entries": SETS.t_entries,
    "scale": 1.0,
    "need_probs": True,
}
BACKWARD = {
    **{name: value for name, value in FORWARD.items() if name != "need_probs"},
    "grad_out": torch.zeros(2, 3, 6),
    "probs": torch.zeros(3, 3),
    "need_query": True,
    "need_key": True,
    "need_value": True,
}
LONG = torch.tensor
BAD_SHAPES = [
    ("query", Q[0]),
    ("query", Q.long()),
    ("key", K[:, :2]),
    ("key", K[:, :, :3]),
    ("key", K.double()),
    ("value", V[:4]),
    ("value", V[:, :1]),
    ("value", V[0]),
    ("indptr", LONG([0, 1])),
    ("indptr", LONG([0, 1, 3], dtype=torch.int32)),
    ("indptr", LONG([[0, 1, 3]])),
    ("indptr", LONG([1, 1, 3])),
    ("indptr", LONG([0, 4, 3])),
    ("indptr", LONG([0, -2, 3])),
    ("indptr", LONG([0, 1, 2])),
    ("indptr", LONG([0, 1, 2**62])),
    ("indices", LONG([0, 5, 2])),
    ("indices", LONG([0, -1, 2])),
    ("indices", LONG([0, 2**62, 2])),
    ("indices", LONG([[0, 1, 2]])),
    ("indices", LONG([0.0, 1.0, 2.0])),
    ("entry_rows", LONG([0, 1])),
    ("t_indptr", LONG([0, 1, 3])),
    ("t_entries", LONG([0, 1])),
    ("t_entries", LONG([0, 1, 2], dtype=torch.int32)),
]
BAD_BACKWARD = [
    ("grad_out", torch.zeros(2, 3, 4)),
    ("grad_out", torch.zeros(3, 3, 6)),
    ("grad_out", torch.zeros(2, 3, 6).double()),
    ("probs", torch.zeros(0, 3)),
    ("probs", torch.zeros(3, 2)),
    ("probs", torch.zeros(3, 3).double()),
    ("entry_rows", LONG([0, 1, 2])),
    ("entry_rows", LONG([0, -1, 1])),
    ("t_indptr", LONG([0, 1, 1, 2, 2, 4])),
    ("t_indptr", LONG([0, 1, 0, 2, 2, 3])),
    ("t_entries", LONG([0, 3, 1])),
    ("t_entries", LONG([-1, 2, 1])),
]


@pytest.mark.parametrize(("argument", "bad"), BAD_SHAPES)
def test_direct_calls_are_checked(argument: str, bad: Tensor) -> None:
    torch.ops.lcr2s.support_attention(**FORWARD)
    with pytest.raises(RuntimeError, match=f"lcr2s::support_attention: .*`{argument}`"):
        torch.ops.lcr2s.support_attention(**{**FORWARD, argument: bad})


@pytest.mark.parametrize(("argument", "bad"), BAD_SHAPES + BAD_BACKWARD)
def test_direct_backward_calls_are_checked(argument: str, bad: Tensor) -> None:
    torch.ops.lcr2s.support_attention_backward(**BACKWARD)
    with pytest.raises(RuntimeError, match=f"lcr2s::support_attention_backward: .*`{argument}`"):
        torch.ops.lcr2s.support_attention_backward(**{**BACKWARD, argument: bad})


def test_direct_backward_without_probabilities_says_how_to_get_them() -> None:
    query = Q.clone().requires_grad_()
    out, _ = torch.ops.lcr2s.support_attention(**{**FORWARD, "query": query, "need_probs": False})
    with pytest.raises(RuntimeError, match=re.escape("need_probs=True")):
        out.sum().backward()


def test_no_padding_in_memory() -> None:
    """One set of 3000 among 3000 small ones: a padded gather would take 9 million slots."""
    lengths = [1] * 2999 + [3000]
    inputs, index, upstream = problem((lengths, 3000, 1, 4, 4), torch.float32)
    assert index.indices.shape == (5999,)
    actual = gradients(lambda *t: support_attention(*t, index), inputs, upstream)
    expected = gradients(lambda *t: support_attention(*t, index, backend="reference"), inputs, upstream)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def host_sees(argument: str, bad: Tensor) -> bool:
    """Whether shape or dtype give a bad argument away; what an index holds lives on the device."""
    good = BACKWARD.get(argument, FORWARD.get(argument))
    return bad.shape != good.shape or bad.dtype != good.dtype


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize(("argument", "bad"), [case for case in BAD_SHAPES + BAD_BACKWARD if host_sees(*case)])
def test_direct_triton_calls_are_checked(argument: str, bad: Tensor, backend: str) -> None:
    support_attention(*on(backend, (Q, K, V, SETS)), backend=backend)  # registers the operators
    arguments = {**BACKWARD, argument: bad}
    with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
        torch.ops.lcr2s_triton.support_attention_backward(**on(backend, arguments))
    if argument in FORWARD and argument not in ("entry_rows", "t_indptr", "t_entries"):
        with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
            torch.ops.lcr2s_triton.support_attention(**on(backend, {**FORWARD, argument: bad}))


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize(("argument", "bad"), [case for case in BAD_SHAPES + BAD_BACKWARD if not host_sees(*case)])
def test_triton_follows_no_bad_index(argument: str, bad: Tensor, backend: str) -> None:
    support_attention(*on(backend, (Q, K, V, SETS)), backend=backend)  # registers the operators
    out, _ = torch.ops.lcr2s_triton.support_attention(**on(backend, {**FORWARD, argument: bad}))
    if argument == "indices":
        (wrong,) = ((bad < 0) | (bad >= 5)).nonzero()
        assert out[SETS.entry_rows[wrong]].isnan().all()
    grads = torch.ops.lcr2s_triton.support_attention_backward(**on(backend, {**BACKWARD, argument: bad}))
    if argument in ("entry_rows", "t_entries"):
        (users,) = ((bad < 0) | (bad >= (2 if argument == "entry_rows" else 3))).nonzero()
        row = K.new_tensor([0, 4, 2]).long()[users] if argument == "entry_rows" else None
        spoilt = grads[1].isnan().flatten(1).any(1).nonzero().flatten()
        assert len(spoilt) == 1
        assert row is None or torch.equal(spoilt.cpu(), row)
