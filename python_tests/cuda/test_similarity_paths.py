"""Every path of the similarity losses on CUDA, whatever the size that would choose it: the workspace's budget decides.

Run on a GPU, or in the emulator (`make emulate`).
"""

from typing import Any

import pytest
import torch
from tolerances import assert_matches_oracle
from torch import Tensor

from lcr2s_ext.ops import cmpm_loss, info_nce_loss, sdm_loss, tal_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (image rows, text rows, width): several tiles each way, the last ones nearly empty or nearly full.
SHAPES = [(130, 260, 20), (257, 100, 130)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = ["info_nce", "sdm", "cmpm", "tal"]


def budgets(rows: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Budgets in bytes that choose the paths of csrc/cuda/similarity_plan.h: cooperative, kept, formed twice."""
    arithmetic = 8 if dtype == torch.float64 else 4
    kept = rows * (-(-columns // 128) * 128) * arithmetic
    block = 0 if dtype.itemsize == arithmetic else (-(-rows // 128) * 128) * (-(-columns // 128) * 128) * 2
    return {"cooperative": 1 << 26, "kept": kept + block, "formed twice": 0}


def call(name: str, inputs: list[Tensor], ids: tuple[Tensor, Tensor], budget: int, needs: tuple[bool, ...]) -> Any:
    image, text, scale = inputs
    op = getattr(torch.ops.lcr2s, name)
    if name == "info_nce":
        return op(image, text, *ids, scale, budget, *needs)
    if name == "sdm":
        return op(image, text, *ids, scale, 1e-8, budget, *needs)
    if name == "cmpm":
        return op(image, text, *ids, True, 1e-8, budget, *needs[:2])
    return op(image, text, *ids, 0.1, 0.1, budget, *needs[:2])


def oracle(name: str, inputs: list[Tensor], ids: tuple[Tensor, Tensor]) -> list[Tensor]:
    image, text, scale = (tensor.double().cpu().requires_grad_() for tensor in inputs)
    ids = (ids[0].cpu(), ids[1].cpu())
    if name == "info_nce":
        loss = info_nce_loss(image, text, *ids, logit_scale=scale, backend="reference")
    elif name == "sdm":
        loss = sdm_loss(image, text, *ids, logit_scale=scale, backend="reference")
    elif name == "cmpm":
        loss = cmpm_loss(image, text, *ids, backend="reference")
    else:
        loss = tal_loss(image, text, *ids, margin=0.1, tau=0.1, backend="reference")
    leaves = [image, text, scale] if name in ("info_nce", "sdm") else [image, text]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    rows, columns, width = shape
    centres = torch.randn(40, width, dtype=torch.float64)
    ids = torch.randint(0, 40, (rows,)), torch.randint(0, 40, (columns,))
    image, text = ((centres[i] + torch.randn(i.shape[0], width).double()) * (2 / width**0.5) for i in ids)
    scale = torch.tensor(12.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [image.to(DEVICE, dtype), text.to(DEVICE, dtype), scale.to(DEVICE)], (ids[0].to(DEVICE), ids[1].to(DEVICE))


def assert_all_match(actual: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for position, (ours, expected) in enumerate(zip(actual, exact, strict=True)):
        assert_matches_oracle(ours.cpu(), expected, dtype, ("loss", "image", "text", "logit_scale")[position])


@pytest.mark.parametrize("path", ["cooperative", "kept", "formed twice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_paths(name: str, shape: tuple[int, int, int], dtype: torch.dtype, path: str) -> None:
    inputs, ids = problem(shape, dtype)
    actual = call(name, inputs, ids, budgets(*shape[:2], dtype)[path], (True, True, True))
    assert_all_match(actual, oracle(name, inputs, ids), dtype)


@pytest.mark.parametrize("path", ["cooperative", "kept", "formed twice"])
@pytest.mark.parametrize("name", LOSSES)
def test_only_what_is_needed(name: str, path: str) -> None:
    """Each gradient alone is the one that comes with the others, to the bit, and so is the loss without any."""
    inputs, ids = problem(SHAPES[0], torch.bfloat16)
    budget = budgets(*SHAPES[0][:2], torch.bfloat16)[path]
    full = call(name, inputs, ids, budget, (True, True, True))
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        some = call(name, inputs, ids, budget, needs)
        assert torch.equal(some[0], full[0])
        for need, ours, with_others in zip(needs, some[1:], full[1:], strict=False):
            assert torch.equal(ours, with_others) if need else ours.numel() == 0


@pytest.mark.parametrize("path", ["cooperative", "formed twice"])
@pytest.mark.parametrize("name", ["info_nce", "sdm"])
@pytest.mark.parametrize("value", [-7.0, 0.0, 1e-3, 400.0])
def test_any_logit_scale(value: float, name: str, path: str) -> None:
    inputs, ids = problem(SHAPES[0], torch.float64)
    inputs[2] = torch.full_like(inputs[2], value)
    actual = call(name, inputs, ids, budgets(*SHAPES[0][:2], torch.float64)[path], (True, True, True))
    assert_all_match(actual, oracle(name, inputs, ids), torch.float64)


@pytest.mark.parametrize("path", ["cooperative", "kept", "formed twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_nan_and_zero_rows(name: str, dtype: torch.dtype, path: str) -> None:
    inputs, ids = problem(SHAPES[0], dtype)
    budget = budgets(*SHAPES[0][:2], dtype)[path]
    inputs[0][129] = 0
    inputs[1][[3, 259]] = 0
    actual = call(name, inputs, ids, budget, (True, True, True))
    assert not actual[1][129].any()
    assert not actual[2][[3, 259]].any()
    assert_all_match(actual, oracle(name, inputs, ids), dtype)
    inputs[0][5, 7] = torch.nan
    loss, image, *_ = call(name, inputs, ids, budget, (True, True, True))
    assert loss.isnan()
    assert image[5].isnan().all()


@pytest.mark.parametrize("shape", [(3, 131100, 4), (131100, 3, 4)], ids=str)
def test_blocks_with_several_tiles(shape: tuple[int, int, int]) -> None:
    """So many tiles that a block takes several and goes on with the statistics of the last one."""
    inputs, ids = problem(shape, torch.float32)
    assert_all_match(call("sdm", inputs, ids, 0, (True, True, True)), oracle("sdm", inputs, ids), torch.float32)
