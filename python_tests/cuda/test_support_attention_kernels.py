"""The CUDA kernels of support attention, run whole in the emulator.

Every layout, both forms of launch, and indices that no checked call could hand over. The operator's own tests
(python_tests/ops/test_support_attention.py) run on the same kernels with `make emulate`.
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
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ORDERS = ["forward", "reverse", "random:3"]
# With as many multiprocessors the backward of the problems below is one launch or two.
MULTIPROCESSORS = {"one launch": 132, "two launches": 1}


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
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("kernels")
    sources = [
        Path(__file__).with_name("support_attention_kernels.cu"),
        CSRC / "emulation/emulator.cpp",
        CSRC / "emulation/fiber.cpp",
    ]
    flags = [
        "-std=c++20",
        "-O1",
        "-DLCR2S_EMULATE_CUDA",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Werror",
        "-fPIC",
    ]
    include = [f"-I{CSRC / 'emulation'}", f"-I{CSRC}"]
    library = folder / "kernels.so"
    subprocess.run(
        [COMPILER, *flags, *include, "-shared", "-x", "c++", *map(str, sources), "-o", str(library)], check=True
    )
    loaded = ctypes.CDLL(str(library))
    for name in ("forward", "backward", "plan"):
        getattr(loaded, f"kernels_{name}").restype = ctypes.c_char_p
    loaded.kernels_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(params=MULTIPROCESSORS)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("LCR2S_EMULATE_MULTIPROCESSORS", str(MULTIPROCESSORS[request.param]))
    return 1 if request.param == "one launch" else 2


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def rows(tensor: Tensor) -> Rows:
    return Rows(tensor.data_ptr(), tensor.stride(0))


class Call:
    """The forward and backward of one problem; all memory starts as NaN."""

    def __init__(self, kernels: ctypes.CDLL, inputs: list[Tensor], index: SupportIndex) -> None:
        self.kernels = kernels
        self.query, self.key, self.value = self.inputs = inputs
        self.index = index
        (batch, heads, width), (pool, _, value_width) = self.query.shape, self.value.shape
        self.statistics = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        self.entries = (index.indices.shape[0], heads)
        self.shape = Shape(
            DTYPES[self.query.dtype],
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

    def forward(self) -> tuple[Tensor, Tensor]:
        probs = torch.full(self.entries, torch.nan, dtype=self.statistics)
        out = torch.full((*self.query.shape[:2], self.value.shape[2]), torch.nan, dtype=self.query.dtype)
        args = Forward(self.shape, *map(rows, self.inputs), pointer(probs), pointer(out))
        error = self.kernels.kernels_forward(ctypes.byref(args))
        assert error is None, error
        return out, probs

    def backward(
        self, probs: Tensor, upstream: Tensor, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> list[Tensor | None]:
        grads = [
            torch.full(t.shape, torch.nan, dtype=t.dtype) if need else None
            for t, need in zip(self.inputs, needs, strict=True)
        ]
        grad_scores = torch.full(self.entries, torch.nan, dtype=self.statistics)
        workspace = torch.full((self.kernels.kernels_workspace(ctypes.byref(self.shape)),), 255, dtype=torch.uint8)
        index = self.index
        args = Backward(
            self.shape,
            *map(pointer, (index.entry_rows, index.t_indptr, index.t_entries)),
            *map(rows, (upstream, *self.inputs)),
            *map(pointer, (probs, grad_scores, *grads)),
        )
        error = self.kernels.kernels_backward(ctypes.byref(args), pointer(workspace))
        assert error is None, error
        return grads

    def run(self, upstream: Tensor) -> list[Tensor]:
        out, probs = self.forward()
        return [out, *(grad for grad in self.backward(probs, upstream) if grad is not None)]


def problem(
    dtype: torch.dtype, heads: int = 3, width: int = 32, value_width: int = 16, lengths: tuple[int, ...] = ()
) -> tuple[list[Tensor], SupportIndex, Tensor]:
    """Empty sets, sets of one chunk and of several, one that is not kept in shared memory; two pool rows with some 150
    users each, one without any, and few enough units for one cooperative launch."""
    sizes = torch.tensor(lengths or (3, 0, 1, 40, 2, 4, 5, 32, 33, 8, 0, 300))
    members = torch.randint(0, 19, (int(sizes.sum()),))
    members[members < 14] %= 2
    index = SupportIndex(torch.cat([torch.zeros(1), sizes.cumsum(0)]).long(), members, 20)
    shapes = [
        (len(sizes), heads, width),
        (20, heads, width),
        (20, heads, value_width),
        (len(sizes), heads, value_width),
    ]
    query, key, value, upstream = (torch.randn(shape).to(dtype) for shape in shapes)
    return [query, key, value], index, upstream


def exact(inputs: list[Tensor], index: SupportIndex, upstream: Tensor) -> list[Tensor]:
    return gradients(
        lambda *t: support_attention(*t, index, backend="reference"), [t.double() for t in inputs], upstream
    )


def assert_all_match(actual: list[Tensor], oracle: list[Tensor], dtype: torch.dtype) -> None:
    for name, ours, wanted in zip(("out", "query", "key", "value"), actual, oracle, strict=True):
        assert_matches_oracle(ours, wanted, dtype, name)


def test_plan(kernels: ctypes.CDLL) -> None:
    assert kernels.kernels_plan() is None


# Heads of 8, 16 and 32 lanes, idle lanes, heads that take several blocks of lanes, and widths that are not packed.
WIDTHS = [(32, 32), (64, 64), (128, 128), (40, 72), (256, 512), (520, 16), (513, 513), (1, 1), (7, 70)]


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(kernels: ctypes.CDLL, dtype: torch.dtype, width: int, value_width: int) -> None:
    inputs, index, upstream = problem(dtype, width=width, value_width=value_width, lengths=(3, 0, 37, 5, 100))
    assert_all_match(Call(kernels, inputs, index).run(upstream), exact(inputs, index, upstream), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_forms_of_launch_in_every_order(
    kernels: ctypes.CDLL, dtype: torch.dtype, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, index, upstream = problem(dtype)
    call = Call(kernels, inputs, index)
    multiprocessors = int(os.environ["LCR2S_EMULATE_MULTIPROCESSORS"])
    assert kernels.kernels_launches(ctypes.byref(call.shape), multiprocessors) == launches
    assert int(index.t_indptr.diff().max()) > 2 * 64
    oracle = exact(inputs, index, upstream)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("LCR2S_EMULATE_ORDER", order)
        results.append(call.run(upstream))
        assert_all_match(results[-1], oracle, dtype)
    monkeypatch.setenv("LCR2S_EMULATE_MULTIPROCESSORS", "3")
    results.append(call.run(upstream))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_some_gradients_only(kernels: ctypes.CDLL, needs: tuple[bool, bool, bool], launches: int) -> None:
    inputs, index, upstream = problem(torch.float32)
    call = Call(kernels, inputs, index)
    _, probs = call.forward()
    for ours, full, need in zip(
        call.backward(probs, upstream, needs), call.backward(probs, upstream), needs, strict=True
    ):
        assert (ours is None) == (not need)
        if ours is not None:
            assert torch.equal(ours, full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_start_at_16_bytes(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    inputs, index, upstream = problem(dtype)
    aligned = Call(kernels, inputs, index).run(upstream)
    shifted = []
    for tensor in inputs:
        memory = torch.empty(tensor.numel() + 1, dtype=dtype)
        shifted.append(memory[1:].view(tensor.shape).copy_(tensor))
    odd = torch.cat([inputs[0].flatten(1), torch.zeros(inputs[0].shape[0], 1).to(dtype)], 1)
    strided = odd[:, :-1].unflatten(1, inputs[0].shape[1:])
    for changed in (shifted, [strided, *inputs[1:]]):
        for ours, same in zip(Call(kernels, changed, index).run(upstream), aligned, strict=True):
            assert_matches_oracle(ours, same.double(), dtype)


def test_a_pool_row_that_almost_everybody_uses(kernels: ctypes.CDLL, launches: int) -> None:
    inputs, _, upstream = problem(torch.float32, heads=5)
    members = torch.full((2400,), 7)
    members[::9] = 3
    index = SupportIndex(torch.arange(13) * 200, members, 20)
    results = Call(kernels, inputs, index).run(upstream)
    assert_all_match(results, exact(inputs, index, upstream), torch.float32)
    unused = torch.tensor([row for row in range(20) if row not in (3, 7)])
    assert not results[2][unused].any()
    assert not results[3][unused].any()


@pytest.mark.parametrize("width", [32, 33])
def test_an_index_that_points_outside_is_not_followed(kernels: ctypes.CDLL, width: int, launches: int) -> None:
    inputs, index, upstream = problem(torch.float32, width=width)
    healthy = Call(kernels, inputs, index).run(upstream)
    index.indices = index.indices.clone()
    first, last = 0, index.indices.shape[0] - 1
    index.indices[first], index.indices[last] = 20, -(2**62)
    index.t_entries = index.t_entries.clone()
    index.t_entries[-1] = index.indices.shape[0]
    index.entry_rows = index.entry_rows.clone()
    index.entry_rows[1] = 12
    out, query, key, _ = Call(kernels, inputs, index).run(upstream)
    assert out[[0, 11]].isnan().all()
    assert query[[0, 11]].isnan().all()
    assert torch.equal(out[1:11], healthy[0][1:11])
    assert torch.equal(query[1:11], healthy[1][1:11])
    assert key[18].isnan().all()
    assert key[int(index.indices[1])].isnan().all()
    index.indptr = index.indptr.clone()
    index.indptr[[1, 2]] = torch.tensor([10**6, -5])
    out, _ = Call(kernels, inputs, index).forward()
    assert not out[:3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    name = "half" if dtype == torch.float16 else "bfloat16"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    widened = torch.empty(2**16)
    getattr(kernels, f"kernels_{name}_to_float")(pointer(every), pointer(widened), ctypes.c_int64(2**16))
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
    getattr(kernels, f"kernels_float_to_{name}")(pointer(floats), pointer(narrowed), ctypes.c_int64(floats.shape[0]))
    torch.testing.assert_close(narrowed.view(dtype), floats.to(dtype), rtol=0, atol=0, equal_nan=True)
