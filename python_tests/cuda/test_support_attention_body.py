"""The CUDA kernels' device code, compiled for the host by the C++ compiler and run there lane by lane.

What this cannot see: the launch, the shuffles between lanes, and anything else that only a GPU does.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tolerances import assert_matches_oracle, gradients
from torch import Tensor

from lcr2s_ext.ops import SupportIndex, support_attention

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Shape(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("queries", "pool_rows", "entries", "heads", "width", "value_width")),
        ("scale", ctypes.c_double),
        ("indptr", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
    ]


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class Forward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, Rows) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("probs", "out")),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, ctypes.c_void_p) for name in ("entry_rows", "t_indptr", "t_entries")),
        *((name, Rows) for name in ("grad_out", "query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("probs", "grad_scores", "grad_query", "grad_key", "grad_value")),
    ]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    library = tmp_path_factory.mktemp("host") / "host_kernels.so"
    source = Path(__file__).with_name("host_kernels.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.host_dot.restype = ctypes.c_double
    return loaded


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def rows(tensor: Tensor) -> Rows:
    return Rows(tensor.data_ptr(), tensor.stride(0))


def run(
    host: ctypes.CDLL,
    inputs: list[Tensor],
    upstream: Tensor,
    index: SupportIndex,
    packed: bool,
    t_entries: Tensor | None = None,
) -> list[Tensor]:
    """[out, gradients of query, key and value] by the device code; buffers start as NaN."""
    query, key, value = inputs
    (batch, heads, width), (pool, _, value_width) = query.shape, value.shape
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = Shape(
        DTYPES[query.dtype],
        batch,
        pool,
        index.indices.shape[0],
        heads,
        width,
        value_width,
        width**-0.5,
        pointer(index.indptr),
        pointer(index.indices),
    )
    probs, grad_scores = (torch.full((index.indices.shape[0], heads), torch.nan, dtype=statistics) for _ in range(2))
    out = torch.full((batch, heads, value_width), torch.nan, dtype=query.dtype)
    host.host_forward(
        ctypes.byref(Forward(shape, rows(query), rows(key), rows(value), pointer(probs), pointer(out))), int(packed)
    )
    grads = [torch.full(tensor.shape, torch.nan, dtype=tensor.dtype) for tensor in inputs]
    entries = index.t_entries if t_entries is None else t_entries
    host.host_backward(
        ctypes.byref(
            Backward(
                shape,
                pointer(index.entry_rows),
                pointer(index.t_indptr),
                pointer(entries),
                rows(upstream),
                rows(query),
                rows(key),
                rows(value),
                pointer(probs),
                pointer(grad_scores),
                *map(pointer, grads),
            )
        ),
        int(packed),
    )
    return [out, *grads]


def problem(dtype: torch.dtype, width: int = 24, value_width: int = 16) -> tuple[list[Tensor], SupportIndex, Tensor]:
    lengths = torch.tensor([3, 0, 1, 40, 2])
    index = SupportIndex(torch.cat([torch.zeros(1), lengths.cumsum(0)]).long(), torch.randint(0, 9, (46,)), 9)
    sizes = [(5, 3, width), (9, 3, width), (9, 3, value_width), (5, 3, value_width)]
    query, key, value, upstream = (torch.randn(size).to(dtype) for size in sizes)
    return [query, key, value], index, upstream


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(host: ctypes.CDLL, dtype: torch.dtype, packed: bool) -> None:
    inputs, index, upstream = problem(dtype)
    exact = gradients(
        lambda *t: support_attention(*t, index, backend="reference"), [t.double() for t in inputs], upstream
    )
    for name, ours, oracle in zip(
        ("out", "query", "key", "value"), run(host, inputs, upstream, index, packed), exact, strict=True
    ):
        assert_matches_oracle(ours, oracle, dtype, name)


def test_odd_widths(host: ctypes.CDLL) -> None:
    inputs, index, upstream = problem(torch.float64, width=7, value_width=1)
    exact = gradients(lambda *t: support_attention(*t, index, backend="reference"), inputs, upstream)
    for ours, oracle in zip(run(host, inputs, upstream, index, False), exact, strict=True):
        assert_matches_oracle(ours, oracle, torch.float64)


def test_an_index_that_points_outside_is_not_followed(host: ctypes.CDLL) -> None:
    inputs, index, upstream = problem(torch.float32)
    healthy = run(host, inputs, upstream, index, True)
    index.indices = index.indices.clone()
    index.indices[0], index.indices[45] = 9, -(2**62)
    t_entries = index.t_entries.clone()
    t_entries[-1] = 46
    out, query, key, _ = run(host, inputs, upstream, index, True, t_entries)
    assert out[[0, 4]].isnan().all()
    assert query[[0, 4]].isnan().all()
    assert torch.equal(out[1:4], healthy[0][1:4])
    assert torch.equal(query[1:4], healthy[1][1:4])
    assert key[8].isnan().all()
    index.indptr = torch.tensor([0, 3, 3, 99, -5, 46])
    out = run(host, inputs, upstream, index, True)[0]
    assert torch.equal(out[1:4], torch.zeros_like(out[1:4]))


@pytest.mark.parametrize("lanes", [1, 2, 8, 32])
@pytest.mark.parametrize("width", [2, 30, 256])
def test_lanes_share_the_work(host: ctypes.CDLL, width: int, lanes: int) -> None:
    a, b, weights = torch.randn(5, width).double(), torch.randn(width).double(), torch.randn(5).double()
    dot = host.host_dot(pointer(a), pointer(b), ctypes.c_int64(width), lanes)
    assert dot == pytest.approx(float(a[0] @ b), rel=1e-12, abs=1e-12)
    out = torch.full((width,), torch.nan, dtype=torch.float64)
    host.host_weighted_sum(
        pointer(a),
        pointer(weights),
        ctypes.c_int64(5),
        ctypes.c_int64(width),
        ctypes.c_double(0.5),
        pointer(out),
        lanes,
    )
    torch.testing.assert_close(out, 0.5 * (weights @ a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    name = "half" if dtype == torch.float16 else "bfloat16"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    widened = torch.empty(2**16)
    getattr(host, f"host_{name}_to_float")(pointer(every), pointer(widened), ctypes.c_int64(2**16))
    torch.testing.assert_close(widened, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    # Every value, the ties between neighbours, what lies just beside them, and what overflows.
    middles = (widened[:-1].double() + widened[1:].double()).div(2).float()
    one = torch.tensor(torch.inf)
    floats = torch.cat(
        [
            widened,
            middles,
            middles.nextafter(one),
            middles.nextafter(-one),
            torch.randn(10000),
            torch.randn(10000) * 1e30,
        ]
    )
    narrowed = torch.empty(floats.shape[0], dtype=torch.int16)
    getattr(host, f"host_float_to_{name}")(pointer(floats), pointer(narrowed), ctypes.c_int64(floats.shape[0]))
    torch.testing.assert_close(narrowed.view(dtype), floats.to(dtype), rtol=0, atol=0, equal_nan=True)
