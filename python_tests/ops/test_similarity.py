"""Similarity losses: the kernels against their twins and against plain loops, and what they refuse."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import DEVICES, backends, cases, interpreted, on, widest_dtype
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerances import assert_matches_oracle, assert_no_worse_than_pytorch, gradients
from torch import Tensor

from lcr2s_ext import triton
from lcr2s_ext.ops import (
    _workspace,
    cmpm_loss,
    info_nce_loss,
    sdm_loss,
    set_workspace_limit,
    tal_loss,
    use_backend,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = backends()
DOUBLE_BACKENDS = backends("cpu", "reference", "cuda")
KERNELS = backends("cpu", "triton", "cuda")

# name: (image rows, text rows, width, identities)
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "one row": (1, 1, 8, 1),
    "one row, many columns": (1, 37, 5, 3),
    "width 1": (6, 6, 1, 3),
    "width 40": (33, 29, 40, 7),
    "width 513": (50, 50, 513, 12),
    "few positives": (60, 50, 24, 400),
    "no negatives": (20, 30, 12, 1),
    "several tiles": (101, 270, 20, 40),
    "more rows than columns": (210, 33, 9, 30),
}

Loss = Callable[..., Tensor]


def namespace(backend: str) -> Any:
    """The operators of `backend`."""
    if backend != "triton":
        return torch.ops.lcr2s
    triton.load("similarity")
    return torch.ops.lcr2s_triton


# Losses under one signature: (image, text, scale), the ids and the backend. CMPM and TAL ignore the scale.
def _info_nce(v: Tensor, t: Tensor, s: Any, a: Tensor, b: Tensor, backend: str | None = None) -> Tensor:
    return info_nce_loss(v, t, a, b, logit_scale=s, backend=backend)


def _sdm(v: Tensor, t: Tensor, s: Any, a: Tensor, b: Tensor, backend: str | None = None) -> Tensor:
    return sdm_loss(v, t, a, b, logit_scale=s, backend=backend)


def _cmpm(v: Tensor, t: Tensor, s: Any, a: Tensor, b: Tensor, backend: str | None = None) -> Tensor:
    return cmpm_loss(v, t, a, b, backend=backend)


def _cmpm_sum(v: Tensor, t: Tensor, s: Any, a: Tensor, b: Tensor, backend: str | None = None) -> Tensor:
    return cmpm_loss(v, t, a, b, target="sum", backend=backend)


def _tal(v: Tensor, t: Tensor, s: Any, a: Tensor, b: Tensor, backend: str | None = None) -> Tensor:
    return tal_loss(v, t, a, b, backend=backend)


LOSSES: dict[str, Loss] = {"info_nce": _info_nce, "sdm": _sdm, "cmpm": _cmpm, "cmpm sum": _cmpm_sum, "tal": _tal}
SCALED = ["info_nce", "sdm"]


# The definitions row by row, sharing nothing with the twin or the kernel.
def cosine_by_rows(v: Tensor, t: Tensor) -> list[Tensor]:
    def unit(x: Tensor) -> Tensor:
        return x / x.square().sum().sqrt() if bool((x != 0).any()) else torch.zeros_like(x)

    units = torch.stack([unit(row) for row in t])
    return [units @ unit(row) for row in v]


def row_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    return -torch.log_softmax(logits, 0)[positive].mean()


def row_matching(logits: Tensor, positive: Tensor, power: float) -> Tensor:
    target = positive.double() / max(int(positive.sum()), 1) ** power
    p = torch.softmax(logits, 0)
    return (p * (torch.log_softmax(logits, 0) - torch.log(target + 1e-8))).sum()


def row_triplet(cosine: Tensor, positive: Tensor, margin: float = 0.1, tau: float = 0.015) -> Tensor:
    weights = torch.softmax(cosine[positive].detach() / tau, 0)
    hardest = tau * torch.logsumexp(cosine[~positive] / tau, 0)
    return torch.clamp(margin - (weights * cosine[positive]).sum() + hardest, min=0)


def by_rows(name: str) -> Loss:
    def direction(v: Tensor, t: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = []
        for i, cosine in enumerate(cosine_by_rows(v, t)):
            positive = b == a[i]
            if name == "info_nce":
                if positive.any():
                    rows.append(row_cross_entropy(s * cosine, positive))
            elif name == "sdm":
                rows.append(row_matching(s * cosine, positive, 1.0))
            elif name == "tal":
                if positive.any() and not positive.all():
                    rows.append(row_triplet(cosine, positive))
            else:
                norm = v[i].square().sum().sqrt() if bool((v[i] != 0).any()) else v[i].new_zeros(())
                rows.append(row_matching(norm * cosine, positive, 1.0 if name == "cmpm sum" else 0.5))
        if not rows:
            return (v.sum() + t.sum() + s) * 0
        stacked = torch.stack(rows)
        return stacked.sum() if name == "tal" else stacked.mean()

    def loss(v: Tensor, t: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        both = direction(v, t, s, a, b) + direction(t, v, s, b, a)
        return (both / 2 if name == "info_nce" else both) + 0 * s

    return loss


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, scale: float = 10.0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[image, text, logit scale], image ids, text ids; features around identity centres."""
    rows, columns, width, identities = shape
    centres = torch.randn(identities, width, dtype=torch.float64)
    image_ids, text_ids = torch.randint(0, identities, (rows,)), torch.randint(0, identities, (columns,))
    # Norms near 3, whatever the width: they are CMPM's logits.
    image = (centres[image_ids] + torch.randn(rows, width, dtype=torch.float64)) * (2 / width**0.5)
    text = (centres[text_ids] + torch.randn(columns, width, dtype=torch.float64)) * (2 / width**0.5)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return [image.to(dtype), text.to(dtype), torch.tensor(scale, dtype=statistics)], image_ids, text_ids


def value_and_gradients(loss: Loss, inputs: list[Tensor], *ids: Tensor, **options: Any) -> list[Tensor]:
    """On the device of the backend among the options, the results on the CPU."""
    inputs, ids = on(options.get("backend", "cpu"), (inputs, ids))
    # Losses without a scale do not depend on it: adding nothing keeps the list of gradients the same for all.
    results = gradients(lambda v, t, s: loss(v, t, s, *ids, **options) + 0 * s, inputs)
    return [result.cpu() for result in results]


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in inputs]


PARTS = ("loss", "image", "text", "logit_scale")


@pytest.fixture
def _small_workspace() -> Iterator[None]:
    set_workspace_limit(1)
    yield
    set_workspace_limit(None)


SHAPES_IN_THE_INTERPRETER = {
    torch.float32: {"one row, many columns", "width 40", "few positives", "no negatives", "several tiles"},
    torch.bfloat16: {"width 40"},
    torch.float16: {"width 513"},
}


@pytest.mark.parametrize(
    ("name", "title", "dtype", "backend"),
    [
        case
        for case in cases(
            lambda name, title, dtype: title in SHAPES_IN_THE_INTERPRETER.get(dtype, ()) and name != "cmpm sum",
            LOSSES,
            SHAPES,
            DTYPES,
            among=BACKENDS,
        )
        if case.values[2:] != (torch.float64, "triton")
    ],
)
def test_value_and_gradients(name: str, title: str, dtype: torch.dtype, backend: str) -> None:
    inputs, image_ids, text_ids = problem(SHAPES[title], dtype)
    actual = value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend=backend)
    expected = value_and_gradients(by_rows(name), wide(inputs), image_ids, text_ids)
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for part, ours, exact, given_input in zip(PARTS, actual, expected, [actual[0], *inputs], strict=True):
        assert ours.dtype == given_input.dtype
        if float(exact.abs().max()) > 1e-6:
            assert_matches_oracle(ours, exact, dtype, part)
        else:
            # Nothing but rounding is left at a minimum, of terms that are of the order of log eps.
            assert float((ours.double() - exact).abs().max()) < (1e-12 if dtype == torch.float64 else 2e-5), part


@pytest.mark.parametrize(
    ("name", "scale", "backend"),
    cases(
        lambda name, scale: scale in ((50.0, 300.0) if name in SCALED else (1.0,)),
        LOSSES,
        (1.0, 50.0, 100.0, 300.0),
        among=KERNELS,
    ),
)
def test_no_worse_than_pytorch(name: str, scale: float, backend: str) -> None:
    results: list[list[list[Tensor]]] = [[], [], []]
    for _ in range(2 if interpreted(backend) else 6):
        inputs, image_ids, text_ids = problem((90, 140, 64, 30), torch.float32, scale)
        for found, tensors, chosen in zip(
            results, (inputs, inputs, wide(inputs)), (backend, "reference", "reference"), strict=True
        ):
            found.append(value_and_gradients(LOSSES[name], tensors, image_ids, text_ids, backend=chosen))
    for position, part in enumerate(PARTS):
        ours, pytorch, exact = (torch.stack([problem[position] for problem in found]) for found in results)
        assert_no_worse_than_pytorch(ours, pytorch, exact, part)


@pytest.mark.usefixtures("_small_workspace")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_small_workspace(name: str, dtype: torch.dtype) -> None:
    """Cosines that do not fit are formed again, in several blocks of rows and of columns."""
    inputs, image_ids, text_ids = problem((700, 2300, 6, 400), dtype)
    actual = value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend="cpu")
    expected = value_and_gradients(LOSSES[name], wide(inputs), image_ids, text_ids, backend="reference")
    for part, ours, exact in zip(PARTS, actual, expected, strict=True):
        assert_matches_oracle(ours, exact, dtype, part)


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize(
    ("name", "dtype"), [("info_nce", torch.float32), ("cmpm", torch.bfloat16), ("tal", torch.float16)]
)
def test_tiny_workspace(name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and gradients in blocks of a few tiles, not all of one size."""
    inputs, image_ids, text_ids = problem((300, 140, 6, 100), dtype)
    monkeypatch.setattr(_workspace, "workspace_bytes", lambda device: 2 * 128 * 128 * 4)
    actual = value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend=backend)
    expected = value_and_gradients(LOSSES[name], wide(inputs), image_ids, text_ids, backend="reference")
    for part, ours, exact in zip(PARTS, actual, expected, strict=True):
        assert_matches_oracle(ours, exact, dtype, part)


@pytest.mark.usefixtures("_small_workspace")
def test_memory_is_bounded() -> None:
    """No allocation of the size of the cosine matrix: what is allocated grows with rows times width."""
    rows, width = 3600, 4
    inputs, image_ids, text_ids = problem((rows, rows, width, 900), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sdm_loss(leaves[0], leaves[1], image_ids, text_ids, logit_scale=leaves[2], backend="cpu").backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < rows * rows * 4 / 4


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, backend: str) -> None:
    (image, text, scale), image_ids, text_ids = on(backend, problem((5, 7, 4, 3), scale=7.0))
    leaves = [image.requires_grad_(), text.requires_grad_()]
    if name == "tal":
        # The positives' weights are detached: only with one positive a row are they constant.
        image_ids, text_ids = on(backend, (torch.arange(5), torch.arange(7)))
    elif name in SCALED:
        leaves.append(scale.requires_grad_())

    def function(v: Tensor, t: Tensor, s: Tensor = scale) -> Tensor:
        return LOSSES[name](v, t, s, image_ids, text_ids, backend=backend)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_diagonal(backend: str) -> None:
    """Without ids row i belongs to row i, whatever the tile it is in."""
    dtype, rows = widest_dtype(backend), 150 if interpreted(backend) else 300
    inputs, _, _ = problem((rows, rows, 6, rows), dtype)
    ids = torch.arange(rows)
    image, text, scale = wide(inputs)
    expected = gradients(lambda v, t, s: info_nce_loss(v, t, ids, logit_scale=s, backend="reference"), wide(inputs))
    actual = value_and_gradients(
        lambda v, t, s, backend: info_nce_loss(v, t, logit_scale=s, backend=backend), inputs, backend=backend
    )
    logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
    entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(expected[0], (entropy(logits, ids) + entropy(logits.T, ids)) / 2)
    for part, ours, exact in zip(PARTS, actual, expected, strict=True):
        assert_matches_oracle(ours, exact, dtype, part)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(LOSSES)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    width=st.integers(1, 20),
    identities=st.integers(1, 50),
    scale=st.sampled_from([0.5, 20.0, 90.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(name: str, rows: int, columns: int, width: int, identities: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    inputs, image_ids, text_ids = problem((rows, columns, width, identities), scale=scale)
    actual = value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend="cpu")
    expected = value_and_gradients(by_rows(name), inputs, image_ids, text_ids)
    for part, ours, exact in zip(PARTS, actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10, msg=lambda m, part=part: f"{part}: {m}")


@settings(max_examples=3 if triton.INTERPRETED else 40, deadline=None, phases=(Phase.generate,))
@given(
    name=st.sampled_from(list(LOSSES)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    width=st.integers(1, 70),
    scale=st.sampled_from([0.5, 20.0, 90.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", backends("triton"))
def test_any_shape_in_triton(
    backend: str, name: str, dtype: torch.dtype, rows: int, columns: int, width: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs, image_ids, text_ids = problem((rows, columns, width, 20), dtype, scale)
    results = [
        value_and_gradients(LOSSES[name], tensors, image_ids, text_ids, backend=chosen)
        for tensors, chosen in ((inputs, backend), (inputs, "reference"), (wide(inputs), "reference"))
    ]
    for part, ours, pytorch, exact in zip(PARTS, *results, strict=True):
        theirs = float((pytorch.double() - exact).abs().max())
        # Gradients that cancel leave roundings of their terms behind, halves of the slab's. The scale multiplies the
        # rounding of a cosine, in float32, in the exponent.
        eps = 8 * torch.finfo(dtype).eps + scale * torch.finfo(torch.float32).eps
        rounding = eps * max(float(exact.abs().max()), 1e-2)
        assert float((ours.double() - exact).abs().max()) <= 2 * theirs + rounding, part


@pytest.mark.parametrize(("name", "backend"), cases(lambda name: name == "sdm", LOSSES, among=BACKENDS))
def test_layouts_and_id_dtypes(name: str, backend: str) -> None:
    """Transposed and strided features, ids of either dtype with any values, mixed."""
    (image, text, scale), image_ids, text_ids = on(backend, problem((20, 31, 12, 5), torch.float32))
    ids = on(backend, torch.tensor([7, -3, 2**30, 0, -(2**31)]))
    loss = functools.partial(LOSSES[name], backend=backend)
    expected = loss(image, text, scale, image_ids, text_ids)
    transposed = loss(image.T.contiguous().T, text[:, None].expand(-1, 2, -1).reshape(62, 12)[::2], scale,
                      ids[image_ids].int(), ids[text_ids])  # fmt: skip
    assert torch.equal(transposed, expected)
    wide_ids = torch.stack([ids[text_ids] * 2**31, text_ids], 1)[:, 0]
    assert torch.equal(loss(image, text, scale, ids[image_ids] * 2**31, wide_ids), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_ids_default_to_image_ids(backend: str) -> None:
    (image, text, scale), image_ids, _ = on(backend, problem((20, 20, 12, 5), torch.float32))
    for loss in (
        lambda *ids: info_nce_loss(image, text, *ids, logit_scale=scale, backend=backend),
        lambda *ids: sdm_loss(image, text, *ids, backend=backend),
        lambda *ids: cmpm_loss(image, text, *ids, backend=backend),
        lambda *ids: tal_loss(image, text, *ids, backend=backend),
    ):
        assert torch.equal(loss(image_ids), loss(image_ids, image_ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_positive(backend: str) -> None:
    (image, text, scale), _, _ = on(backend, problem((6, 5, 7, 4), widest_dtype(backend)))
    none = on(backend, (torch.arange(6), torch.arange(10, 15)))
    assert _info_nce(image, text, scale, *none, backend=backend) == 0
    assert _tal(image, text, scale, *none, backend=backend) == 0
    same = on(backend, (torch.zeros(6, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)))
    assert _tal(image, text, scale, *same, backend=backend) == 0
    for ids in (none, same):
        for gradient in value_and_gradients(_tal, [image, text, scale], *ids, backend=backend)[1:]:
            assert not gradient.any()
    # A target of eps alone: sum_j p (log p - log eps) = log N - H - log eps for each row.
    logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
    negentropy = sum((p.exp() * p).sum(1).mean() for p in (logits.log_softmax(1), logits.T.log_softmax(1)))
    torch.testing.assert_close(_sdm(image, text, scale, *none, backend=backend), negentropy - 2 * math.log(1e-8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_zero_rows(name: str, backend: str) -> None:
    """Cosine 0 and gradient 0, the other gradients finite."""
    inputs, image_ids, text_ids = problem((9, 12, 6, 4), widest_dtype(backend))
    inputs[0][2] = 0
    inputs[1][[0, 11]] = 0
    actual = value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend=backend)
    expected = value_and_gradients(by_rows(name), wide(inputs), image_ids, text_ids)
    assert not actual[1][2].any()
    assert not actual[2][[0, 11]].any()
    for part, ours, exact in zip(PARTS, actual, expected, strict=True):
        assert_matches_oracle(ours, exact, widest_dtype(backend), part)
    zeros = [torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), inputs[2]]
    for gradient in value_and_gradients(LOSSES[name], zeros, image_ids, text_ids, backend=backend)[1:3]:
        assert not gradient.any()


@pytest.mark.parametrize(
    ("name", "value", "ids", "backend"),
    cases(
        lambda name, value, ids: (math.isnan(value) or name == "sdm") and (ids == "some positives" or name == "tal"),
        LOSSES,
        (math.nan, math.inf),
        ("some positives", "no positive", "no negative"),
        among=BACKENDS,
    ),
)
def test_nan_shows(name: str, value: float, ids: str, backend: str) -> None:
    (image, text, scale), image_ids, text_ids = problem((9, 12, 6, 4), torch.float32)
    if ids != "some positives":
        image_ids, text_ids = image_ids * 0, text_ids * 0 + (ids == "no positive")
    for broken in (image, text):
        clean = broken[5, 3].clone()
        broken[5, 3] = value
        results = value_and_gradients(LOSSES[name], [image, text, scale], image_ids, text_ids, backend=backend)
        assert results[0].isnan(), "loss"
        assert results[1 if broken is image else 2][5].isnan().all()
        broken[5, 3] = clean


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCALED)
def test_nan_scale_shows(name: str, backend: str) -> None:
    (image, text, _), image_ids, text_ids = on(backend, problem((9, 12, 6, 4), torch.float32))
    scale = on(backend, torch.tensor(math.nan))
    assert LOSSES[name](image, text, scale, image_ids, text_ids, backend=backend).isnan()


@pytest.mark.parametrize(
    ("name", "backend"), cases(lambda name: name == "sdm", ["info_nce", "sdm", "tal"], among=KERNELS)
)
def test_any_norm(name: str, backend: str) -> None:
    """Norms whose squares leave float32's range change nothing."""
    (image, text, scale), image_ids, text_ids = problem((9, 12, 6, 4), torch.float32)
    expected = value_and_gradients(LOSSES[name], [image, text, scale], image_ids, text_ids, backend=backend)
    for power in (-90, 80):
        factor = 2.0**power
        actual = value_and_gradients(LOSSES[name], [image * factor, text, scale], image_ids, text_ids, backend=backend)
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1] * factor, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    inputs, image_ids, text_ids = problem((333, 520, 70, 50), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend="cpu"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "backend"), cases(lambda name: name == "cmpm", LOSSES, among=backends("triton", "cuda"))
)
def test_the_same_bits_again(name: str, backend: str) -> None:
    rows = 60 if interpreted(backend) else 900
    inputs, image_ids, text_ids = problem((rows, rows + 9, 70, 50), torch.float16)
    first, second = (value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "backend"), cases(lambda name: name == "sdm", LOSSES, among=KERNELS))
def test_only_what_is_needed(name: str, backend: str) -> None:
    """Each gradient alone is the same as with the others, and the loss is the same without any."""
    inputs, image_ids, text_ids = on(backend, problem((40, 30, 12, 5), torch.float32))
    full = on(backend, value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend=backend))
    for position in range(3 if name in SCALED else 2):
        leaves = [tensor.detach().clone() for tensor in inputs]
        leaves[position].requires_grad_()
        loss = LOSSES[name](*leaves, image_ids, text_ids, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaves[position])
        assert torch.equal(loss, full[0])
        torch.testing.assert_close(gradient, full[1 + position])
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        loss = LOSSES[name](*leaves, image_ids, text_ids, backend=backend)
    assert torch.equal(loss, full[0])
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", KERNELS)
def test_upstream_gradient_scales(backend: str) -> None:
    inputs, image_ids, text_ids = on(backend, problem((40, 30, 12, 5), torch.float16))
    once = gradients(lambda *t: _sdm(*t, image_ids, text_ids, backend=backend), [tensor.float() for tensor in inputs])
    # 2^16 would overflow float16 had the gradient been rounded before it was scaled.
    scaled = gradients(lambda *t: _sdm(*t, image_ids, text_ids, backend=backend) * 2.0**10, inputs)
    # A GPU's slab of gradients is float16 too, and so is the emulated one's.
    exact = backend == "cpu" and not torch.ops.lcr2s.emulates_cuda()
    atol = 1e-6 if exact else 1e-3 * float(once[1].abs().max())
    torch.testing.assert_close(scaled[1].float() / 2.0**10, once[1], rtol=2e-3, atol=atol)


def arguments(name: str, grad: bool = True, backend: str = "cpu") -> tuple[Any, ...]:
    (image, text, scale), image_ids, text_ids = on(backend, problem((6, 5, 7, 3), torch.float32))
    leaves = [tensor.requires_grad_(grad) for tensor in (image, text, scale)]
    features = (*leaves[:2], image_ids, text_ids)
    return {
        "info_nce": (*features, leaves[2], 1 << 20, grad, grad, grad),
        "sdm": (*features, leaves[2], 1e-8, 1 << 20, grad, grad, grad),
        "cmpm": (*features, True, 1e-8, 1 << 20, grad, grad),
        "tal": (*features, 0.1, 0.015, 1 << 20, grad, grad),
    }[name]


@pytest.mark.parametrize(
    ("name", "grad", "backend"),
    cases(lambda name, grad: name == "sdm" and grad, ["info_nce", "sdm", "cmpm", "tal"], [False, True], among=KERNELS),
)
def test_opcheck(name: str, grad: bool, backend: str) -> None:
    if backend == "triton":
        LOSSES[name](*on(backend, (IMAGE, TEXT, torch.tensor(3.0), IDS, IDS)), backend=backend)  # registers the fakes
    torch.library.opcheck(getattr(namespace(backend), name).default, arguments(name, grad, backend))


@pytest.mark.parametrize(("name", "backend"), cases(lambda name: name == "sdm", LOSSES, among=KERNELS))
def test_compile(name: str, backend: str) -> None:
    inputs, image_ids, text_ids = problem((40, 30, 12, 5), torch.float32)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    for part, ours, eager in zip(
        PARTS,
        value_and_gradients(compiled, inputs, image_ids, text_ids, backend=backend),
        value_and_gradients(LOSSES[name], inputs, image_ids, text_ids, backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, eager), part


@pytest.mark.parametrize(("name", "backend"), cases(lambda name: name in ("info_nce", "cmpm"), LOSSES, among=BACKENDS))
def test_autocast(name: str, backend: str) -> None:
    """The features keep their dtype, which may differ; statistics and the scale stay in float32."""
    inputs, image_ids, text_ids = problem((20, 24, 12, 5), torch.float32)
    inputs[0] = inputs[0].bfloat16()
    exact = value_and_gradients(LOSSES[name], wide(inputs), image_ids, text_ids, backend="reference")
    leaves = [tensor.detach().requires_grad_() for tensor in on(backend, inputs)]
    with torch.autocast(DEVICES[backend], torch.bfloat16):
        loss = LOSSES[name](*leaves, *on(backend, (image_ids, text_ids)), backend=backend) + 0 * leaves[2]
    actual = on("cpu", [loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert actual[0].dtype == torch.float32
    assert [gradient.dtype for gradient in actual[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    assert_matches_oracle(actual[0], exact[0], torch.float32)
    assert_matches_oracle(actual[2], exact[2], torch.float32)
    with pytest.raises(TypeError, match="`text` must have the dtype of `image`"):
        LOSSES[name](*inputs, image_ids, text_ids)


@pytest.mark.parametrize(("name", "backend"), cases(lambda name: name == "tal", LOSSES, among=KERNELS))
def test_double_backward_is_refused(name: str, backend: str) -> None:
    inputs, image_ids, text_ids = on(backend, problem((6, 5, 7, 3), torch.float32))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    loss = LOSSES[name](*leaves, image_ids, text_ids, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .* is not supported"):
        gradient.sum().backward()


def test_backend_of_the_forward_stays() -> None:
    inputs, image_ids, text_ids = problem((6, 5, 7, 3), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with use_backend("reference"):
        loss = _sdm(*leaves, image_ids, text_ids)
    assert torch.autograd.grad(loss, leaves[0], create_graph=True)[0].requires_grad


IMAGE, TEXT, IDS = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 1, 2])
ALL = ("info_nce", "sdm", "cmpm", "tal")
# change of the call: (losses, error, message)
MALFORMED: list[tuple[dict[str, Any], tuple[str, ...], type[Exception], str]] = [
    ({"image": [1.0]}, ALL, TypeError, "`image` must be a tensor of shape (B, d), got list"),
    ({"image": IMAGE[0]}, ALL, ValueError, "`image` must have shape (B, d), got (6,)"),
    ({"image": IMAGE.int()}, ALL, TypeError, "`image` must have dtype"),
    ({"image": IMAGE[:0]}, ALL, ValueError, "`image` must not be empty, got shape (0, 6)"),
    ({"text": TEXT[:0]}, ALL, ValueError, "`text` must not be empty"),
    ({"image": IMAGE[:, :0], "text": TEXT[:, :0]}, ALL, ValueError, "`image` must not be empty, got shape (4, 0)"),
    ({"text": TEXT[:, :5]}, ALL, ValueError, "`text` must have size 6 (width of `image`)"),
    ({"text": TEXT.double()}, ALL, TypeError, "`text` must have the dtype of `image` (float32), got float64"),
    ({"text": TEXT.to("meta")}, ALL, ValueError, "`text` must be on the device of `image` (cpu), got meta"),
    ({"image_ids": IDS[:3]}, ALL, ValueError, "`image_ids` must have size 4 (rows of `image`)"),
    ({"image_ids": IDS.float()}, ALL, TypeError, "`image_ids` must have dtype int32, int64, got float32"),
    ({"image_ids": IDS[None]}, ALL, ValueError, "`image_ids` must have shape (N,), got (1, 4)"),
    ({"text_ids": IDS[:3]}, ALL, ValueError, "`text_ids` must have size 4 (rows of `text`)"),
    ({"text_ids": "a"}, ALL, TypeError, "`text_ids` must be a tensor"),
    ({"text": TEXT[:3], "text_ids": None}, ALL, ValueError, "`text_ids` is needed where the 3 rows of `text`"),
    ({"image_ids": None}, ("sdm", "cmpm", "tal"), TypeError, "`image_ids` must be a tensor"),
    ({"image_ids": None}, ("info_nce",), ValueError, "`image_ids` must be given where `text_ids` is"),
    ({"image_ids": None, "text_ids": None, "text": TEXT[:3]}, ("info_nce",), ValueError, "`text` must have size 4"),
    ({"logit_scale": "50"}, ("info_nce", "sdm"), TypeError, "`logit_scale` must be a number, got str"),
    ({"logit_scale": True}, ("info_nce", "sdm"), TypeError, "`logit_scale` must be a number, got bool"),
    ({"logit_scale": 0.0}, ("info_nce", "sdm"), ValueError, "`logit_scale` must be a finite number above 0, got 0.0"),
    ({"logit_scale": torch.ones(2)}, ("info_nce", "sdm"), ValueError, "`logit_scale` must have one element"),
    ({"logit_scale": torch.tensor(5)}, ("info_nce", "sdm"), TypeError, "`logit_scale` must have dtype"),
    ({"eps": 0.0}, ("sdm", "cmpm"), ValueError, "`eps` must be a finite number above 0, got 0.0"),
    ({"eps": None}, ("sdm", "cmpm"), TypeError, "`eps` must be a number, got NoneType"),
    ({"target": "l1"}, ("cmpm",), ValueError, "`target` must be one of 'l2', 'sum'; got 'l1'"),
    ({"tau": -1}, ("tal",), ValueError, "`tau` must be a finite number above 0, got -1"),
    ({"margin": math.nan}, ("tal",), ValueError, "`margin` must be finite, got nan"),
    ({"margin": "1"}, ("tal",), TypeError, "`margin` must be a number, got str"),
    ({"backend": "gpu"}, ALL, ValueError, "`backend` must be one of"),
]
PUBLIC: dict[str, Loss] = {"info_nce": info_nce_loss, "sdm": sdm_loss, "cmpm": cmpm_loss, "tal": tal_loss}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [(name, change, error, message) for change, names, error, message in MALFORMED for name in names],
)
def test_malformed_calls(name: str, change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    call: dict[str, Any] = {"image": IMAGE, "text": TEXT, "image_ids": IDS, "text_ids": IDS, "backend": backend}
    if name == "info_nce":
        call["logit_scale"] = 10.0
    message = message.replace("(cpu)", f"({on(backend, IMAGE).device})")
    with pytest.raises(error, match=re.escape(message)):
        PUBLIC[name](**{key: value if meta(value) else on(backend, value) for key, value in (call | change).items()})


def meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("name", ALL)
def test_float64_is_refused(name: str, backend: str) -> None:
    call = {"image": IMAGE.double(), "text": TEXT.double(), "image_ids": IDS, "backend": backend}
    if name == "info_nce":
        call["logit_scale"] = 10.0
    with pytest.raises(TypeError, match=r"`image` must have dtype .* on backend 'triton', got float64"):
        PUBLIC[name](**on(backend, call))


# position, value, message of calls straight to torch.ops.lcr2s; positions 0..3 are the features and the ids.
DIRECT: list[tuple[int, Any, str]] = [
    (0, torch.randn(6), "`image` must have 2 dimension(s), got shape (6)"),
    (0, torch.ones(6, 7, dtype=torch.int64), "`image` must be float32, float64, bfloat16 or float16"),
    (0, torch.randn(0, 7), "`image` must not be empty"),
    (0, torch.randn(6, 8), "`text` must have size 8 in dimension 1, got shape (5, 7)"),
    (1, torch.randn(5, 0), "`text` must not be empty"),
    (2, torch.zeros(5, dtype=torch.int64), "`image_ids` must have size 6 in dimension 0, got shape (5)"),
    (2, torch.zeros(6), "`image_ids` must be int32 or int64"),
    (2, torch.zeros(6, 1, dtype=torch.int64), "`image_ids` must have 1 dimension(s)"),
    (3, torch.zeros(6, dtype=torch.int32), "`text_ids` must have size 5 in dimension 0"),
]
DIRECT_ONE: list[tuple[str, int, Any, str]] = [
    ("info_nce", 2, None, "`image_ids` and `text_ids` must be given together"),
    ("info_nce", 4, torch.ones(2), "`logit_scale` must have 0 dimension(s), got shape (2)"),
    ("sdm", 4, torch.tensor(3), "`logit_scale` must be float32, float64, bfloat16 or float16"),
    ("sdm", 5, 0.0, "`eps` must be a finite number above 0, got 0"),
    ("sdm", 6, -1, "`workspace_bytes` must not be negative, got -1"),
    ("cmpm", 5, math.inf, "`eps` must be a finite number above 0, got inf"),
    ("tal", 4, math.inf, "`margin` must be finite, got inf"),
    ("tal", 5, 0.0, "`tau` must be a finite number above 0, got 0"),
]


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [(name, *case) for case in DIRECT for name in ALL] + DIRECT_ONE,
)
def test_malformed_direct_calls(name: str, position: int, value: Any, message: str) -> None:
    call = list(arguments(name, grad=False))
    call[position] = value
    with pytest.raises(RuntimeError, match=re.escape(f"lcr2s::{name}: {message}")):
        getattr(torch.ops.lcr2s, name)(*call)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [(name, *case) for case in DIRECT for name in ALL] + DIRECT_ONE,
)
def test_malformed_direct_calls_in_triton(name: str, position: int, value: Any, message: str, backend: str) -> None:
    call = list(arguments(name, grad=False, backend=backend))
    call[position] = on(backend, value)
    with pytest.raises((TypeError, ValueError), match=re.escape(message.split(" must")[0])):
        getattr(namespace(backend), name)(*call)


def test_direct_diagonal_needs_pairs() -> None:
    image, text, _, _, *rest = arguments("info_nce", grad=False)
    with pytest.raises(RuntimeError, match="`text` must have size 6 in dimension 0"):
        torch.ops.lcr2s.info_nce(image, text, None, None, *rest)
