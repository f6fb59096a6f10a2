"""The tile products and the packing of unit rows (csrc/cuda/tile.h, panel.h; pack.h here), run whole in the emulator.

Where nvcc is found the same kernels are also compiled for GPUs, and must fit their registers.
"""

import ctypes
import faulthandler
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = Path(__file__).with_name("tile_kernels.cu")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SIMT_OR_MMA, WGMMA = 0, 1
# The plain engine with sums of chunks, which has products only.
CHUNK_SUMS = (torch.float32, 1)
ENGINES = [
    (torch.float32, SIMT_OR_MMA),
    (torch.float64, SIMT_OR_MMA),
    (torch.bfloat16, SIMT_OR_MMA),
    (torch.float16, SIMT_OR_MMA),
    (torch.bfloat16, WGMMA),
    (torch.float16, WGMMA),
]
ENGINE_NAMES = ["float32", "float64", "bfloat16-mma", "float16-mma", "bfloat16-wgmma", "float16-wgmma"]
ORDERS = ["forward", "reverse", "random:1"]
PRODUCT, DUAL, STATISTICS, REPACK, PRODUCT_NN = range(5)
ROW_TILE = 128


def compile_for_emulator(target: Path, source: Path) -> None:
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
    subprocess.run([COMPILER, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)


class Library:
    def __init__(self, path: Path) -> None:
        self.calls = ctypes.CDLL(str(path))
        for name in ("tiles_pack", "tiles_run"):
            getattr(self.calls, name).restype = ctypes.c_char_p
        for name in ("tiles_panels_bytes", "tiles_panel_offset"):
            getattr(self.calls, name).restype = ctypes.c_int64

    def panels_bytes(self, rows: int, width: int, dtype: torch.dtype) -> int:
        return int(self.calls.tiles_panels_bytes(*map(ctypes.c_int64, (rows, width, dtype.itemsize))))

    def run(
        self,
        task: int,
        engine: int,
        dtype: torch.dtype,
        columns: int,
        operands: "list[Panels]",
        out: Tensor | None,
        more: Tensor | None = None,
    ) -> None:
        four = [*operands, *[operands[0]] * (4 - len(operands))]
        bases = (ctypes.c_void_p * 4)(*[p.memory.data_ptr() for p in four])
        rows = (ctypes.c_int64 * 4)(*[p.rows for p in four])
        widths = (ctypes.c_int64 * 4)(*[p.width for p in four])
        error = self.calls.tiles_run(
            task, engine, DTYPES[dtype], columns, bases, rows, widths, pointer(out), pointer(more)
        )
        assert error is None, error


@dataclass
class Panels:
    memory: Tensor
    rows: int
    width: int


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def poisoned(size: int) -> Tensor:
    """Bytes aligned to 1024, all ones: NaN in every dtype."""
    memory = torch.full((size + 1024,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 1024
    return memory[start : start + size]


def pack(
    library: Library,
    rows: Tensor,
    dtype: torch.dtype | None = None,
    *,
    normalise: bool = False,
    unit: Tensor | None = None,
    norms: Tensor | None = None,
    panels: bool = True,
) -> Panels:
    dtype = dtype or rows.dtype
    memory = poisoned(library.panels_bytes(rows.shape[0], rows.shape[1], dtype)) if panels else None
    error = library.calls.tiles_pack(
        pointer(rows),
        DTYPES[rows.dtype],
        *map(ctypes.c_int64, (rows.shape[0], rows.shape[1], rows.stride(0))),
        DTYPES[dtype],
        int(normalise),
        pointer(memory),
        pointer(unit),
        ctypes.c_int64(0 if unit is None else unit.stride(0)),
        pointer(norms),
    )
    if error is not None:
        raise ValueError(error.decode())
    return Panels(torch.empty(0) if memory is None else memory, *rows.shape)


def unpack(panels: Panels, dtype: torch.dtype) -> Tensor:
    """The padded matrix, by the layout as panel.h describes it."""
    pack_elements = 16 // dtype.itemsize
    chunk = 128 // dtype.itemsize
    tiles, chunks = -(-panels.rows // ROW_TILE), -(-panels.width // chunk)
    packs = panels.memory.view(dtype).reshape(tiles, chunks, ROW_TILE, 8, pack_elements)
    place = torch.arange(8) ^ (torch.arange(ROW_TILE) % 8)[:, None]
    straight = packs.gather(3, place[None, None, :, :, None].expand(packs.shape))
    return straight.permute(0, 2, 1, 3, 4).reshape(tiles * ROW_TILE, chunks * chunk)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_product(out: Tensor, exact: Tensor, k: int) -> None:
    # Sums of k products of numbers around 1, in float32 or float64.
    bound = 4 * k**0.5 * torch.finfo(out.dtype).eps * (1 + exact.abs().max())
    assert (out.double() - exact).abs().max() <= bound


def product(library: Library, a: Tensor, b: Tensor, engine: int, columns: int = 128, task: int = PRODUCT) -> Tensor:
    out = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=accumulate(a.dtype))
    library.run(task, engine, a.dtype, columns, [pack(library, a), pack(library, b)], out)
    return out


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The emulator and the packing kernels, compiled once."""
    folder = tmp_path_factory.mktemp("emulator")
    built = []
    for source in (KERNELS.with_name("pack.cu"), CSRC / "emulation/emulator.cpp", CSRC / "emulation/fiber.cpp"):
        built.append(folder / f"{source.stem}.o")
        compile_for_emulator(built[-1], source)
    return built


def link(target: Path, kernels: Path, objects: list[Path]) -> Path:
    compiled = target.with_suffix(".o")
    compile_for_emulator(compiled, kernels)
    subprocess.run([COMPILER, "-shared", str(compiled), *map(str, objects), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def library(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(link(tmp_path_factory.mktemp("tiles") / "tiles.so", KERNELS, objects))


@pytest.mark.parametrize("shape", [(150, 140, 200), (1, 1, 1), (128, 192, 64), (129, 65, 513)], ids=str)
@pytest.mark.parametrize("columns", [128, 64])
@pytest.mark.parametrize(("dtype", "engine"), [*ENGINES, CHUNK_SUMS], ids=[*ENGINE_NAMES, "float32-chunks"])
def test_products_in_every_order_of_threads(
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    engine: int,
    columns: int,
    shape: tuple[int, int, int],
) -> None:
    m, n, k = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("LCR2S_EMULATE_ORDER", order)
        results.append(product(library, a, b, engine, columns))
    assert_product(results[0], a.double() @ b.double().T, k)
    assert all(torch.equal(result, results[0]) for result in results)


# In float64 two products of 128 columns do not fit the registers.
@pytest.mark.parametrize(
    ("dtype", "engine", "columns"), [(*e, c) for e in ENGINES for c in (128, 64) if (e[0], c) != (torch.float64, 128)]
)
def test_two_products_at_once(library: Library, dtype: torch.dtype, engine: int, columns: int) -> None:
    a, b = (torch.randn(rows, 72).to(dtype) for rows in (140, 200))
    c, d = (torch.randn(rows, 300).to(dtype) for rows in (140, 200))
    out = torch.full((140, 200), torch.nan, dtype=accumulate(dtype))
    library.run(DUAL, engine, dtype, columns, [pack(library, x) for x in (a, b, c, d)], out)
    assert_product(out, a.double() @ b.double().T - 2 * c.double() @ d.double().T, 600)


def tile_statistics(product: Tensor, tile: int) -> Tensor:
    """(tiles, rows, 3): maximum, sum of exponentials and weighted sum of every `tile` columns."""
    parts = []
    for part in product.split(tile, dim=1):
        maximum = part.amax(1)
        weights = torch.arange(1, part.shape[1] + 1, dtype=part.dtype)
        parts.append(torch.stack([maximum, (part - maximum[:, None]).exp().sum(1), part @ weights], -1))
    return torch.stack(parts)


@pytest.mark.parametrize("columns", [128, 64])
@pytest.mark.parametrize(("dtype", "engine"), ENGINES, ids=ENGINE_NAMES)
def test_statistics_of_rows_and_columns(
    library: Library, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, engine: int, columns: int
) -> None:
    m, n = 150, 140
    a, b = torch.randn(m, 40).to(dtype), torch.randn(n, 40).to(dtype)
    operands = [pack(library, a, normalise=True), pack(library, b, normalise=True)]
    outs = []
    for order in ORDERS:
        monkeypatch.setenv("LCR2S_EMULATE_ORDER", order)
        rows = torch.full((-(-n // columns), m, 3), torch.nan, dtype=accumulate(dtype))
        cols = torch.full((-(-m // ROW_TILE), n, 3), torch.nan, dtype=accumulate(dtype))
        library.run(STATISTICS, engine, dtype, columns, operands, rows, cols)
        outs.append((rows, cols))
    unit_a, unit_b = (unpack(p, dtype)[: p.rows].double() for p in operands)
    exact = unit_a @ unit_b.T
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for out, oracle in zip(outs[0], (tile_statistics(exact, columns), tile_statistics(exact.T, ROW_TILE)), strict=True):
        torch.testing.assert_close(out.double(), oracle, rtol=tolerance, atol=100 * tolerance)
    for rows, cols in outs[1:]:
        assert torch.equal(rows, outs[0][0])
        assert torch.equal(cols, outs[0][1])


@pytest.mark.parametrize("columns", [128, 64])
@pytest.mark.parametrize(("dtype", "engine"), ENGINES, ids=ENGINE_NAMES)
def test_products_of_products(library: Library, dtype: torch.dtype, engine: int, columns: int) -> None:
    m, n, k = 150, 140, 72
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    operands = [pack(library, a), pack(library, b)]
    g = Panels(poisoned(library.panels_bytes(m, n, dtype)), m, n)
    transposed = Panels(poisoned(library.panels_bytes(n, m, dtype)), n, m)
    library.run(REPACK, engine, dtype, columns, [*operands, g, transposed], None)
    exact = a.double() @ b.double().T
    kept = unpack(g, dtype)
    torch.testing.assert_close(kept[:m, :n].double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
    assert not kept[m:].any()
    assert not kept[:, n:].any()
    assert torch.equal(unpack(transposed, dtype)[:n, :m], kept[:m, :n].T)
    assert not unpack(transposed, dtype)[n:].any()
    assert not unpack(transposed, dtype)[:, m:].any()
    if engine == WGMMA:
        return
    for left, right, rows in ((g, operands[1], m), (transposed, operands[0], n)):
        out = torch.full((rows, k), torch.nan, dtype=accumulate(dtype))
        library.run(PRODUCT_NN, engine, dtype, columns, [left, right], out)
        factors = [unpack(p, dtype)[: p.rows, : p.width].double() for p in (left, right)]
        assert_product(out, factors[0] @ factors[1], 150)


WIDER = [
    (s, t) for t in DTYPES for s in DTYPES if s == t or t == torch.float64 or (t, s.itemsize) == (torch.float32, 2)
]


@pytest.mark.parametrize(("source", "dtype"), WIDER, ids=str)
@pytest.mark.parametrize("width", [5, 64, 200])
def test_unit_rows(library: Library, source: torch.dtype, dtype: torch.dtype, width: int) -> None:
    rows = torch.randn(131, width + 3, dtype=torch.float64).mul(3).to(source)[:, 1 : width + 1]
    rows[7] = 0
    rows[8, 2] = torch.nan
    rows[9, 3] = -torch.inf
    unit = torch.full((131, width + 1), torch.nan, dtype=dtype)
    norms = torch.full((131,), torch.nan, dtype=accumulate(dtype))
    panels = pack(library, rows, dtype, normalise=True, unit=unit, norms=norms)
    exact_norms = rows.double().norm(dim=1)
    exact = rows.double() / exact_norms[:, None]
    exact[7] = 0
    exact[8:10] = exact_norms[8:10] = torch.nan
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(
        norms.double(), exact_norms, rtol=2 * torch.finfo(norms.dtype).eps, atol=0, equal_nan=True
    )
    torch.testing.assert_close(unit[:, :width].double(), exact, rtol=4 * epsilon, atol=1e-7 * epsilon, equal_nan=True)
    padded = unpack(panels, dtype)
    torch.testing.assert_close(padded[:131, :width], unit[:, :width], rtol=0, atol=0, equal_nan=True)
    assert not padded[131:].any()
    assert not padded[:, width:].any()
    again = torch.full((131, width), torch.nan, dtype=dtype)
    pack(library, rows, dtype, normalise=True, unit=again, panels=False)
    torch.testing.assert_close(again, unit[:, :width], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_stay_as_they_are(library: Library, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 70).to(dtype)
    norms = torch.full((3,), torch.nan, dtype=accumulate(dtype))
    panels = pack(library, rows, norms=norms)
    assert torch.equal(unpack(panels, dtype)[:3, :70], rows)
    torch.testing.assert_close(norms.double(), rows.double().norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, (1e38, 1e-42)), (torch.float64, (1e300, 1e-300))], ids=str
)
def test_norms_neither_overflow_nor_underflow(library: Library, dtype: torch.dtype, sizes: tuple[float, float]) -> None:
    rows = torch.ones(2, 9, dtype=torch.float64) * torch.tensor(sizes, dtype=torch.float64)[:, None]
    norms = torch.full((2,), torch.nan, dtype=dtype)
    panels = pack(library, rows.to(dtype), normalise=True, norms=norms)
    torch.testing.assert_close(unpack(panels, dtype)[:2, :9], torch.full((2, 9), 1 / 3, dtype=dtype))
    assert norms.double().tolist() == pytest.approx((3 * rows.to(dtype)[:, 0].double()).tolist())


def test_panels_are_not_narrower_than_the_features(library: Library) -> None:
    for source, dtype in (
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="narrower than the features"):
            pack(library, torch.randn(2, 8).to(source), dtype)


@pytest.mark.parametrize("bytes_each", [2, 4, 8])
def test_places_in_panels_are_all_different(library: Library, bytes_each: int) -> None:
    rows, width = 130, 512 // bytes_each
    size = library.calls.tiles_panels_bytes(*map(ctypes.c_int64, (rows, width, bytes_each)))
    places = {
        library.calls.tiles_panel_offset(*map(ctypes.c_int64, (row, column, rows, width, bytes_each)))
        for row in range(256)
        for column in range(width)
    }
    assert places == set(range(0, size, bytes_each))


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (8, 2), (17, 3)])
def test_blocks_take_every_tile_once(library: Library, tiles: tuple[int, int]) -> None:
    seen = set()
    for block in range(tiles[0] * tiles[1]):
        at = (ctypes.c_int64 * 2)()
        library.calls.tiles_of_block(*map(ctypes.c_int64, (block, *tiles)), at)
        seen.add(tuple(at))
    assert seen == {(row, column) for row in range(tiles[0]) for column in range(tiles[1])}


FULL_WAIT = "ptx::barrier_wait(full_ + turn % kStages, turn / kStages % 2);"
# What an engine must not forget: the header and the statement that is replaced, by what, and the engine.
FORGOTTEN = {
    "arrival of cp.async": ("tile.h", "ptx::wait_copies<kStages - 2>();", "", "TileMma"),
    "barrier between stages": ("tile.h", "stage that is filled next.\n      __syncthreads();", "\n", "TileMma"),
    "arrival of bulk copies": ("tile_wgmma.h", FULL_WAIT, "", "TileWgmma"),
    "release of a stage": ("tile_wgmma.h", "if (turn >= kStages) ptx::", "if (turn < 0) ptx::", "TileWgmma"),
    "wgmma before release": ("tile_wgmma.h", "ptx::wgmma_wait<1>();", "", "TileWgmma"),
    "wgmma's last results": ("tile_wgmma.h", "ptx::wgmma_wait<0>();", "", "TileWgmma"),
    "fence of registers": ("tile_wgmma.h", "ptx::wgmma_fence();", "", "TileWgmma"),
}

FORGETFUL_LAUNCH = """
extern "C" const char* forgetful_{number}(const lcr2s::cuda::Panels* a, const lcr2s::cuda::Panels* b, float* out) {{
  using namespace lcr2s::cuda;
  using Tile = forgetful_{number}_::{engine}<BFloat16, 64>;
  return launch(product_kernel<Tile>, 1, Tile::kThreads, Tile::kSharedBytes, nullptr, *a, *b, out);
}}
"""


def forgetful_source() -> str:
    """Every engine without one of its waits, in a namespace of its own."""
    text = """
#include "cuda/launch.h"
#include "cuda/panel.h"
#include "cuda/ptx.h"
template <class Tile>
__global__ void product_kernel(lcr2s::cuda::Panels a, lcr2s::cuda::Panels b, float* out) {
  Tile tile(lcr2s::cuda::dynamic_shared());
  typename Tile::Accumulator c;
  tile.multiply(c, a, 0, b, 0);
  Tile::store_rows(c, out, b.rows, a.rows, b.rows);
}
"""
    for number, (header, statement, instead, engine) in enumerate(FORGOTTEN.values()):
        for name in ("tile.h", "tile_mma.h" if engine == "TileMma" else "tile_wgmma.h"):
            lines = (CSRC / "cuda" / name).read_text()
            if name == header:
                assert lines.count(statement) == 1
                lines = lines.replace(statement, instead)
            lines = re.sub(r"^#(pragma once|include .*)$", "", lines, flags=re.MULTILINE)
            text += lines.replace("namespace lcr2s::cuda {", f"namespace lcr2s::cuda::forgetful_{number}_ {{")
        text += FORGETFUL_LAUNCH.format(number=number, engine=engine)
    return text


class PanelsStruct(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("rows", "width", "k_chunks"))]


@pytest.fixture(scope="module")
def forgetful(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("forgetful") / "forgetful.cu"
    source.write_text(forgetful_source())
    return ctypes.CDLL(str(link(source.with_suffix(".so"), source, objects)))


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_is_forgotten_is_noticed(library: Library, forgetful: ctypes.CDLL, what: str) -> None:
    """Negative controls: a product without one of its waits is wrong in some order of threads, or ends in an error."""
    a, b = torch.randn(128, 700).bfloat16(), torch.randn(64, 700).bfloat16()
    exact = a.double() @ b.double().T
    operands = [PanelsStruct(p.memory.data_ptr(), p.rows, p.width, 11) for p in (pack(library, a), pack(library, b))]
    call = getattr(forgetful, f"forgetful_{list(FORGOTTEN).index(what)}")
    call.restype = ctypes.c_char_p
    # In a process of its own, which the emulator may end.
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        right = True
        for order in [*ORDERS, *(f"random:{seed}" for seed in range(2, 9))]:
            os.environ["LCR2S_EMULATE_ORDER"] = order
            out = torch.full((128, 64), torch.nan)
            right = right and call(*map(ctypes.byref, operands), pointer(out)) is None
            right = right and bool((out.double() - exact).abs().max() < 1e-3)
            if not right:
                break
        os._exit(0 if right else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (3, -signal.SIGABRT)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_kernels_fit_the_registers(tmp_path: Path, arch: str) -> None:
    report = subprocess.run(
        [
            *("nvcc", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-DLCR2S_TILES_FEW"),
            *(f"-I{CSRC}", "-cubin", str(KERNELS), "-o", str(tmp_path / "tiles.cubin")),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills
    assert all(spill == ("0", "0", "0") for spill in spills), report
    assert "wgmma" not in report, report
