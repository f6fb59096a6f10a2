"""The two passes of a loss over a matrix in blocks: blocks against the whole loss, opcheck, threads, refusals."""

import functools
import math
from typing import Any

import pytest
import torch
from backends import backends, cases, interpreted, on, widest_dtype
from tolerances import assert_matches_oracle, gradients
from torch import Tensor

from lcr2s_ext import ops, triton
from lcr2s_ext.ops import _backend, _library, relation, similarity
from lcr2s_ext.reference import relation as relation_reference
from lcr2s_ext.reference import similarity as reference

NAMES = ["info_nce", "sdm", "cmpm", "tal"]
OPTIONS: dict[str, Any] = {"eps": 1e-8, "l2_target": False, "margin": 0.1, "tau": 0.05}
WORKSPACE = 1 << 20
BACKENDS = [
    parameter
    for parameter in backends()
    if _backend.with_passes("similarity_statistics", str(parameter.values[0]), torch.float32) == parameter.values[0]
]
CPU = pytest.mark.skipif(not _library.has_kernel("similarity_statistics", "cpu"), reason="no CPU kernels in this build")


def problem(dtype: torch.dtype, texts: int = 150) -> list[Tensor]:
    """image (37, 24), text (texts, 24), their ids, some of which the other side lacks, scale."""
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randn(rows, 24, generator=generator, dtype=torch.float64) for rows in (37, texts))
    image[3] = 0
    image_ids = torch.randint(0, 30, (37,), generator=generator)
    text_ids = torch.randint(8, 38, (texts,), generator=generator)
    return [image.to(dtype), text.to(dtype), image_ids, text_ids, torch.tensor(20.0, dtype=dtype)]


def blocks(rows: int, backend: str) -> list[slice]:
    if interpreted(backend):
        return [slice(0, rows)] if rows == 37 else [slice(0, 20), slice(20, rows)]
    return [slice(0, rows // 3), slice(rows // 3, rows // 3 + 1), slice(rows // 3 + 1, rows)]


def whole_loss(name: str, backend: str, image: Tensor, text: Tensor, ids: list[Tensor], scale: Tensor) -> Tensor:
    if name == "info_nce":
        return ops.info_nce_loss(image, text, *ids, logit_scale=scale, backend=backend)
    if name == "sdm":
        return ops.sdm_loss(image, text, *ids, logit_scale=scale, backend=backend)
    if name == "cmpm":
        return ops.cmpm_loss(image, text, *ids, target="sum", backend=backend) + 0 * scale
    return ops.tal_loss(image, text, *ids, tau=OPTIONS["tau"], backend=backend) + 0 * scale


@pytest.mark.parametrize(("name", "backend"), cases(lambda name: name != "sdm", NAMES, among=BACKENDS))
def test_blocks_give_the_whole(name: str, backend: str) -> None:
    dtype, loss = widest_dtype(backend), NAMES.index(name)
    texts = 60 if interpreted(backend) else 150
    exact = problem(torch.float64, texts)
    expected = gradients(
        lambda v, t, s: whole_loss(name, "reference", v, t, exact[2:4], s), [exact[0], exact[1], exact[4]]
    )
    image, text, image_ids, text_ids, scale = on(backend, problem(dtype, texts))
    passes, unit = similarity._passes(backend, dtype)  # type: ignore[misc]
    merge = functools.partial(reference.merge_statistics, loss=loss, unit=unit)
    rows, columns = blocks(len(image), backend), blocks(len(text), backend)
    found = {
        (i, j): passes.similarity_statistics(
            image[a], text[b], image_ids[a], text_ids[b], scale, loss, OPTIONS["tau"], WORKSPACE
        )
        for i, a in enumerate(rows)
        for j, b in enumerate(columns)
    }
    across, down = range(len(columns)), range(len(rows))
    of_images = torch.cat([functools.reduce(merge, [found[i, j][0].T for j in across]) for i in down])
    of_texts = torch.cat([functools.reduce(merge, [found[i, j][1].T for i in down]) for j in across])
    finished = [
        reference.finish_statistics(of_images, len(text), loss, unit, **OPTIONS),
        reference.finish_statistics(of_texts, len(image), loss, unit, **OPTIONS),
    ]
    weights = [1 / torch.tensor(len(side), dtype=torch.float64) for side in (image, text)]
    if name == "info_nce":
        weights = [0.5 / valid for _, valid, _ in finished]
    if name == "tal":
        weights = [torch.ones_like(weights[0])] * 2
    value = sum(weight * total for weight, (total, _, _) in zip(weights, finished, strict=True))
    coefficients = [
        reference.weigh(side[2], weight, loss).to(dtype) for side, weight in zip(finished, weights, strict=True)
    ]
    result = [torch.zeros_like(image), torch.zeros_like(text), torch.zeros_like(scale)]
    for a in rows:
        for b in columns:
            parts = passes.similarity_gradients(
                image[a],
                text[b],
                image_ids[a],
                text_ids[b],
                scale,
                coefficients[0][a].T.contiguous(),
                coefficients[1][b].T.contiguous(),
                loss,
                OPTIONS["tau"],
                WORKSPACE,
                True,
                True,
                True,
            )
            result[0][a] += parts[0]
            result[1][b] += parts[1]
            result[2] += parts[2]
    assert_matches_oracle(value.to(dtype), expected[0], dtype, "loss")  # type: ignore[union-attr]
    for what, ours, theirs in zip(("image", "text"), result, expected[1:], strict=False):
        assert_matches_oracle(ours, theirs, dtype, what)
    if name in ("info_nce", "sdm"):
        assert_matches_oracle(result[2], expected[3], dtype, "scale")


@pytest.mark.parametrize("backend", BACKENDS)
def test_relation_blocks_give_the_whole(backend: str) -> None:
    dtype = widest_dtype(backend)
    texts = 60 if interpreted(backend) else 150
    generator = torch.Generator().manual_seed(4)
    exact = [torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (24, 17) for n in (37, texts)]
    scales = [torch.tensor(s, dtype=torch.float64) for s in (12.0, 30.0)]
    expected = gradients(
        lambda v, t, s: ops.relation_kl_loss(
            v, t, exact[2], exact[3], student_scale=s, teacher_scale=scales[1], backend="reference"
        ),
        [exact[0], exact[1], scales[0]],
    )
    features = on(backend, [x.to(dtype) for x in exact])
    student, teacher = on(backend, [s.to(dtype) for s in scales])
    passes, unit = relation._kl_passes(backend, dtype)  # type: ignore[misc]
    merge = functools.partial(relation_reference.merge_kl_statistics, unit=unit)
    rows, columns = blocks(37, backend), blocks(texts, backend)

    def block(a: slice, b: slice) -> list[Tensor]:
        return [features[0][a], features[1][b], features[2][a], features[3][b], student, teacher]

    found = [[passes.relation_kl_statistics(*block(a, b), WORKSPACE) for b in columns] for a in rows]
    of_rows = [functools.reduce(merge, [block[0].T for block in row]).T.contiguous() for row in found]
    of_columns = [functools.reduce(merge, [row[j][1].T for row in found]).T.contiguous() for j in range(len(columns))]
    result = [torch.zeros_like(x) for x in (student, features[0], features[1], student)]
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            parts = passes.relation_kl_gradients(
                *block(a, b), of_rows[i], of_columns[j], 1 / 37, 1 / texts, WORKSPACE, True, True, True
            )
            for total, part in zip((result[0], result[1][a], result[2][b], result[3]), parts, strict=True):
                total += part
    for what, ours, theirs in zip(("loss", "image", "text", "scale"), result, expected, strict=True):
        assert_matches_oracle(ours, theirs, dtype, what)


def similarity_arguments(dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    tensors = problem(dtype)
    coefficients = [torch.rand(4, len(side), dtype=dtype) for side in tensors[:2]]
    return [*tensors, 1, 1.0, WORKSPACE], [*tensors, *coefficients, 1, 1.0, WORKSPACE, True, False, True]


def relation_arguments() -> tuple[list[Any], list[Any]]:
    image, text, *_ = problem(torch.float32)
    tensors = [image, text, image, text, torch.tensor(3.0), torch.tensor(2.0)]
    statistics = [torch.rand(4, len(side)) + 1 for side in (image, text)]
    return [*tensors, WORKSPACE], [*tensors, *statistics, 0.1, 0.2, WORKSPACE, False, True, False]


@CPU
def test_opcheck() -> None:
    namespace = torch.ops.lcr2s
    statistics, of_blocks = similarity_arguments(torch.float32)
    torch.library.opcheck(namespace.similarity_statistics.default, tuple(statistics))
    torch.library.opcheck(namespace.similarity_gradients.default, tuple(of_blocks))
    statistics, of_blocks = relation_arguments()
    torch.library.opcheck(namespace.relation_kl_statistics.default, tuple(statistics))
    torch.library.opcheck(namespace.relation_kl_gradients.default, tuple(of_blocks))


@CPU
def test_bits_do_not_depend_on_threads() -> None:
    found = []
    before = torch.get_num_threads()
    torch.manual_seed(0)
    calls = [
        *zip(("similarity_statistics", "similarity_gradients"), similarity_arguments(torch.float32), strict=True),
        *zip(("relation_kl_statistics", "relation_kl_gradients"), relation_arguments(), strict=True),
    ]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([x for name, arguments in calls for x in getattr(torch.ops.lcr2s, name)(*arguments)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))


@CPU
def test_malformed_calls() -> None:
    statistics, of_blocks = similarity_arguments(torch.float32)
    with pytest.raises(RuntimeError, match=r"`loss` must be 0 \(InfoNCE\), 1 \(SDM\), 2 \(CMPM\) or 3 \(TAL\), got 4"):
        torch.ops.lcr2s.similarity_statistics(*statistics[:5], 4, 1.0, WORKSPACE)
    with pytest.raises(RuntimeError, match="`tau` must be a finite number above 0"):
        torch.ops.lcr2s.similarity_statistics(*statistics[:5], 3, math.nan, WORKSPACE)
    with pytest.raises(RuntimeError, match="`text_coefficients` must have size 150 in dimension 1, got shape"):
        torch.ops.lcr2s.similarity_gradients(*of_blocks[:6], of_blocks[5], *of_blocks[7:])
    with pytest.raises(RuntimeError, match="`image_coefficients` must have the dtype of the statistics"):
        torch.ops.lcr2s.similarity_gradients(*of_blocks[:5], of_blocks[5].double(), *of_blocks[6:])
    _, of_blocks = relation_arguments()
    with pytest.raises(RuntimeError, match="`row_statistics` must have size 37 in dimension 1"):
        torch.ops.lcr2s.relation_kl_gradients(*of_blocks[:6], of_blocks[7], *of_blocks[7:])
    features = problem(torch.float32)[0].requires_grad_()
    rows, _ = torch.ops.lcr2s.similarity_statistics(features, *statistics[1:])
    with pytest.raises(RuntimeError, match="similarity_statistics: one pass of a loss is not differentiable"):
        rows.sum().backward()


def test_whose_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend without passes of its own takes Triton's on a GPU, or none."""
    monkeypatch.setattr(triton, "UNAVAILABLE", None)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    absent = functools.partial(_backend.with_passes, "no_such_operator")
    assert absent("cuda", torch.float32) == "triton"
    assert absent("cuda", torch.float64) is None
    assert absent("cpu", torch.float32) is None
    assert absent("reference", torch.float64) == "reference"
    monkeypatch.setattr(triton, "UNAVAILABLE", "not installed")
    assert absent("cuda", torch.float32) is None
