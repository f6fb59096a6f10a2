"""Tiles loaded by descriptors: the same bits as by pointers, whatever overruns, and only where descriptors may be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import DEVICES
from tolerances import assert_matches_oracle, gradients
from torch import Tensor

from lcr2s_ext import ops, triton

pytestmark = pytest.mark.skipif(triton.UNAVAILABLE is not None, reason=str(triton.UNAVAILABLE))

DEVICE = DEVICES["triton"]
POINTERS, DESCRIPTORS, SPECIALIZED = range(3)
Loads = dict[str, set[int]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """Kernel -> the values of LOADS that it was launched with, on a GPU of compute capability 9.0 or as if on one."""
    from lcr2s_ext.triton import _launch, _tiles, relation_kl, retrieval, similarity

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no Tensor Memory Accelerator")
    monkeypatch.setattr(_launch, "off_cuda_capability", 90)
    found: Loads = {}

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                if "LOADS" in options:
                    name = getattr(self.kernel, "fn", self.kernel).__name__
                    found.setdefault(name, set()).add(options["LOADS"])
                _launch.wrap_triton(self.kernel)[grid](*args, **options)

            return launch

    for module in (_tiles, relation_kl, retrieval, similarity):
        monkeypatch.setattr(module, "wrap_triton", Spy)
    return found


def features(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width).to(DEVICE, dtype)


def sdm(image: Tensor, text: Tensor, ids: Tensor, backend: str) -> Tensor:
    return ops.sdm_loss(image, text, ids[: len(image)], ids[: len(text)], logit_scale=30.0, backend=backend)


def relation_kl(image: Tensor, text: Tensor, ids: Tensor, backend: str) -> Tensor:
    teacher = image.detach().flip(1)[:, :40], text.detach().flip(0)[:, 24:]
    scales = {"student_scale": 30.0, "teacher_scale": 20.0}
    return ops.relation_kl_loss(image, text, teacher[0], teacher[1][:, :40], **scales, backend=backend)


@pytest.mark.parametrize(
    ("loss", "dtype", "kernels"),
    [
        (sdm, torch.bfloat16, {"similarity_statistics_kernel", "similarity_gradient_kernel"}),
        (relation_kl, torch.float16, {"similarity_statistics_kernel", "relation_kl_kernel"}),
    ],
)
def test_losses(loss: Callable[..., Tensor], dtype: torch.dtype, kernels: set[str], loads: Loads) -> None:
    """Two row tiles, the last nearly empty; a width that fills no block."""
    sides = [features(130, 72, dtype), features(70, 72, dtype)]
    ids = torch.randint(0, 30, (130,), device=DEVICE)
    found = {}
    for name in ("pointers", "tma"):
        with triton.tile_loads(name):
            found[name] = gradients(lambda *s: loss(*s, ids, "triton"), sides)
    for by_pointers, by_descriptors in zip(found["pointers"], found["tma"], strict=True):
        assert torch.equal(by_pointers, by_descriptors)
    oracle = gradients(lambda *s: loss(*s, ids, "reference"), [side.double() for side in sides])
    for result, exact in zip(found["tma"], oracle, strict=True):
        assert_matches_oracle(result, exact, dtype)
    assert loads == {kernel: {POINTERS, DESCRIPTORS} for kernel in kernels}


def test_top_k(loads: Loads) -> None:
    """Queries and gallery rows that end within a tile, a slab that begins within one, a width that ends in a block."""
    query, gallery = features(140, 72, torch.bfloat16), features(270, 72, torch.bfloat16)
    results = {}
    for name in triton.LOADS:
        with triton.tile_loads(name):
            results[name] = torch.ops.lcr2s_triton.topk_similarity(query, gallery, 2, 100 * (3 * 18 + 2 * 3120))
    exact = ops.topk_similarity(query.double(), gallery.double(), 2, backend="reference")
    for values, indices in results.values():
        assert torch.equal(values, results["pointers"][0])
        assert torch.equal(indices, results["pointers"][1])
        assert_matches_oracle(values, exact[0].double(), torch.float32)
    assert loads == {
        "topk_similarity_maxima_kernel": {POINTERS, DESCRIPTORS, SPECIALIZED},
        "topk_similarity_rescore_kernel": {POINTERS, DESCRIPTORS},
    }


def test_metrics(loads: Loads) -> None:
    query, gallery = features(30, 72, torch.float16), features(150, 72, torch.float16)
    ids = torch.randint(0, 20, (150,), device=DEVICE)
    results = []
    for name in ("pointers", "tma"):
        with triton.tile_loads(name):
            results.append(ops.retrieval_metrics(query, gallery, ids[:30], ids, backend="triton"))
    results.append(ops.retrieval_metrics(query.double(), gallery.double(), ids[:30], ids, backend="reference"))
    assert results[0] == results[1] == pytest.approx(results[2], rel=1e-12)
    assert loads == {"retrieval_metrics_count_kernel": {POINTERS, DESCRIPTORS}}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: features(20, 70, torch.bfloat16), id="rows not a multiple of 16 bytes apart"),
        pytest.param(lambda: features(21, 72, torch.bfloat16).flatten()[1:1441].view(20, 72), id="begins in between"),
        pytest.param(lambda: features(20, 72, torch.float32), id="exact float32"),
    ],
)
def test_pointers_where_descriptors_cannot_be(make: Callable[[], Tensor], loads: Loads) -> None:
    rows = make()
    with triton.tile_loads("specialized"):
        _, indices = ops.topk_similarity(rows, rows, 1, backend="triton")
    assert torch.equal(indices.flatten().cpu(), torch.arange(20))
    assert loads == {"topk_similarity_rescore_kernel": {POINTERS}}


def test_older_gpus_load_by_pointers(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcr2s_ext.triton import _launch

    monkeypatch.setattr(_launch, "capability", lambda device: 89)
    rows = features(20, 72, torch.bfloat16)
    with triton.tile_loads("tma"):
        ops.topk_similarity(rows, rows, 1, backend="triton")
    assert loads == {"topk_similarity_rescore_kernel": {POINTERS}}


def test_an_unknown_way_is_refused() -> None:
    message = "`name` must be one of pointers, tma, specialized, got 'fast'"
    with pytest.raises(ValueError, match=message), triton.tile_loads("fast"):
        pass
    assert triton.requested_loads() == "pointers"
