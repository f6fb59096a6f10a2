"""The matrix product and the exponential under the CPU kernels, at every vector width.

The 64-byte build has the tiles of AVX-512; compiled for the baseline instruction set it runs on any machine.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FUNCTIONS = {np.float32: "gemm_f32", np.float64: "gemm_f64"}


@pytest.fixture(scope="module", params=[16, 32, 64])
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    library = tmp_path_factory.mktemp("core") / "kernels.so"
    flags = ["-std=gnu++20", "-O2", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-function", "-fPIC", "-shared"]
    defines = ["-DLCR2S_ISA=tested", f"-DLCR2S_VECTOR_BYTES={request.param}"]
    source = Path(__file__).with_name("kernels.cpp")
    subprocess.run([compiler, *flags, *defines, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.vector_bytes() == request.param
    return loaded


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def multiply(core: ctypes.CDLL, a: np.ndarray, b: np.ndarray, c: np.ndarray, accumulate: bool) -> None:
    size = a.itemsize
    strides = [[ctypes.c_int64(stride // size) for stride in x.strides] for x in (a, b)]
    m, k, n, ldc = (ctypes.c_int64(i) for i in (*a.shape, b.shape[1], c.strides[0] // size))
    function: Callable[..., None] = getattr(core, FUNCTIONS[a.dtype.type])
    function(pointer(a), *strides[0], m, k, pointer(b), *strides[1], n, pointer(c), ldc, ctypes.c_bool(accumulate))


# Around the micro-tiles (6 x 8 to 14 x 32), the row block (96 to 112), the column task (256) and the depth block (256).
SHAPES = [(1, 1, 1), (6, 8, 16), (14, 32, 32), (15, 33, 31), (97, 257, 40), (113, 513, 259), (3, 0, 5), (225, 5, 300)]
SHAPES += [(2, 3, 16400)]  # enough columns for wide tasks (512)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_product_matches_numpy(core: ctypes.CDLL, dtype: type, shape: tuple[int, int, int], transposed: str) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    a = rng.standard_normal((k, m) if "a" in transposed else (m, k)).astype(dtype)
    b = rng.standard_normal((n, k) if "b" in transposed else (k, n)).astype(dtype)
    a, b = a.T if "a" in transposed else a, b.T if "b" in transposed else b
    exact = a.astype(np.float64) @ b.astype(np.float64)
    for accumulate in (False, True):
        c = np.full((m, n + 3), 7, dtype)
        multiply(core, a, b, c, accumulate)
        expected = exact + 7 if accumulate else exact
        bound = 4 * np.finfo(dtype).eps * (np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)) + 7)
        assert (np.abs(c[:, :n] - expected) <= bound).all()
        assert (c[:, n:] == 7).all(), "the product wrote beyond its columns"


def test_an_element_has_the_same_bits_anywhere(core: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((120, 300)).astype(np.float32), rng.standard_normal((300, 290)).astype(np.float32)
    whole = np.empty((120, 290), np.float32)
    multiply(core, a, b, whole, False)
    for rows, columns in (
        (slice(17, 18), slice(5, 6)),
        (slice(101, 120), slice(33, 290)),
        (slice(0, 7), slice(250, 267)),
    ):
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        multiply(core, a[rows], np.ascontiguousarray(b[:, columns]), part, False)
        assert (part == whole[rows, columns]).all()


def test_exp_is_within_two_units_in_the_last_place(core: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-87.3, 88.7, 1 << 18), np.linspace(-1, 1, 1 << 16)]).astype(np.float32)
    y = np.empty_like(x)
    core.exp_f32(pointer(x), pointer(y), ctypes.c_int64(x.size))
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y - exact) / np.spacing(exact.astype(np.float32))).max() < 2


def test_exp_of_the_extremes(core: ctypes.CDLL) -> None:
    x = np.array([-np.inf, -1e30, -200, 0, 89, 1e30, np.inf, np.nan] * 4, np.float32)
    y = np.empty_like(x)
    core.exp_f32(pointer(x), pointer(y), ctypes.c_int64(x.size))
    np.testing.assert_array_equal(y, np.array([0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan] * 4, np.float32))
