"""Cosines of bfloat16 features by products of pairs, as AVX512_BF16 has them.

The 64-byte build computes what that instruction computes on any machine; `similarity_in_pairs.cpp` chooses the product.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    built = tmp_path_factory.mktemp("pairs") / "pairs.so"
    flags = ["-std=gnu++20", "-O1", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-function", "-fPIC", "-shared"]
    # Half types in memory need no instructions of their own here.
    defines = ["-DLCR2S_ISA=tested", "-DLCR2S_VECTOR_BYTES=64"]
    source = Path(__file__).with_name("similarity_in_pairs.cpp")
    subprocess.run([compiler, *flags, *defines, f"-I{CSRC}", str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def run(
    library: ctypes.CDLL, in_pairs: bool, kind: int, image: Tensor, text: Tensor, ids: tuple[Tensor, Tensor], room: int
) -> list[Tensor]:
    pointer = ctypes.c_void_p
    labels = [x.int().contiguous() for x in ids]
    same = ids[0][:, None] == ids[1][None]
    positives = [same.sum(1).int(), same.sum(0).int()]
    results = [torch.full(shape, torch.nan) for shape in ((), image.shape, text.shape, ())]
    library.similarity_loss(
        ctypes.c_bool(in_pairs),
        kind,
        pointer(image.data_ptr()),
        pointer(text.data_ptr()),
        *(ctypes.c_int64(size) for size in (len(image), len(text), image.shape[1])),
        *(pointer(x.data_ptr()) for x in (*labels, *positives)),
        ctypes.c_float(30),
        ctypes.c_int64(room),
        *(pointer(x.data_ptr()) for x in results),
    )
    return results


@pytest.mark.parametrize("room", [1 << 26, 1 << 16], ids=["kept", "formed again"])
@pytest.mark.parametrize("width", [3, 41, 600])
@pytest.mark.parametrize("kind", range(4), ids=["info_nce", "sdm", "cmpm", "tal"])
def test_pairs_round_nothing_that_single_products_do_not(
    library: ctypes.CDLL, kind: int, width: int, room: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    image, text = (torch.randn((rows, width), generator=generator) for rows in (130, 300))
    ids = tuple(torch.randint(40, (rows,), generator=generator) for rows in (130, 300))
    if kind != 2:  # whose logits are products of norms
        # Lengths at both ends of the type's range, and a row without a direction.
        image[3] *= 2.0**100
        image[4] *= 2.0**-100
        text[5] *= 2.0**-90
        text[7] = 0
    image, text = image.bfloat16(), text.bfloat16()
    single, paired = (run(library, in_pairs, kind, image, text, ids, room) for in_pairs in (False, True))
    for name, ours, expected in zip(("loss", "image", "text", "scale"), paired, single, strict=True):
        if name == "scale" and kind >= 2:  # they have none
            continue
        # Each row by its own magnitude: gradients go with the inverse norm.
        magnitude = expected.abs().amax(-1, keepdim=True) if expected.dim() else expected.abs()
        error = ((ours - expected).abs() / magnitude.clamp_min(1e-38)).max()
        assert error < 1e-4, f"{name}: {error:.3g}"
    assert not torch.equal(paired[1], single[1]), "both took the same product"
