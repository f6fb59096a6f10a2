"""Relation losses: the kernels against plain PyTorch in float64, near the teacher, at the edges, what they refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from backends import backends, backends_and_dtypes, cases, interpreted, on, widest_dtype
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerances import assert_matches_oracle, assert_no_worse_than_pytorch, gradients
from torch import Tensor

from lcr2s_ext.ops import _workspace, relation_frobenius_loss, relation_kl_loss, set_workspace_limit, use_backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = backends()
DOUBLE_BACKENDS = backends("cpu", "reference", "cuda")
KERNELS = backends("cpu", "triton", "cuda")
LOSSES = ["frobenius", "kl"]

# name: (B, N, student width, teacher width)
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "one row": (1, 1, 8, 8),
    "one row, many columns": (1, 9, 8, 8),
    "width 1": (6, 5, 1, 1),
    "width 40": (30, 17, 40, 40),
    "width 513": (5, 11, 513, 513),
    "wide student": (12, 7, 70, 3),
    "wide teacher": (130, 65, 17, 40),
    "more rows than widths": (330, 290, 20, 20),
    "many rows, other width": (280, 530, 16, 9),
}
# The same edges with fewer tiles, for triton's interpreter.
INTERPRETED_SHAPES = {
    **SHAPES,
    "width 513": (5, 11, 130, 130),
    "wide teacher": (30, 65, 17, 40),
    "more rows than widths": (140, 90, 20, 20),
    "many rows, other width": (80, 130, 16, 9),
}


def cosine(image: Tensor, text: Tensor) -> Tensor:
    return (image @ text.T) / image.norm(dim=1)[:, None] / text.norm(dim=1)


def oracle(loss: str, reduction: str = "mean", teacher_scale: float = 17.0) -> Callable[..., Tensor]:
    """f(student image, student text, student scale, teacher image, teacher text), sharing nothing with the twin."""

    def frobenius(image: Tensor, text: Tensor, scale: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
        squares = (cosine(image, text) - cosine(soft_image, soft_text)) ** 2
        total = {"sum": squares.sum, "row": lambda: squares.sum(1).mean(), "mean": squares.mean}[reduction]()
        return total + 0 * scale

    def kl(image: Tensor, text: Tensor, scale: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
        student, teacher = scale * cosine(image, text), teacher_scale * cosine(soft_image, soft_text)
        rows, columns = (
            torch.nn.functional.kl_div(
                student.log_softmax(dim), teacher.log_softmax(dim), reduction="none", log_target=True
            ).sum(dim)
            for dim in (1, 0)
        )
        return rows.mean() + columns.mean()

    return frobenius if loss == "frobenius" else kl


def ours(
    loss: str, backend: str | None = None, reduction: str = "mean", teacher_scale: float = 17.0
) -> Callable[..., Tensor]:
    def frobenius(image: Tensor, text: Tensor, scale: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
        value = relation_frobenius_loss(image, text, soft_image, soft_text, reduction=reduction, backend=backend)
        return value + 0 * scale

    def kl(image: Tensor, text: Tensor, scale: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
        return relation_kl_loss(
            image, text, soft_image, soft_text, student_scale=scale, teacher_scale=teacher_scale, backend=backend
        )

    return frobenius if loss == "frobenius" else kl


def problem(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    teacher_dtype: torch.dtype | None = None,
    scale: float = 12.0,
    backend: str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """[student image, student text, student scale], [teacher image, teacher text], where `backend` takes them."""
    rows, columns, width, teacher_width = shape
    sizes = [(rows, width), (columns, width), (rows, teacher_width), (columns, teacher_width)]
    image, text, soft_image, soft_text = (torch.randn(size, dtype=torch.float64) for size in sizes)
    factor = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    other = dtype if teacher_dtype is None else teacher_dtype
    return on(backend, ([image.to(dtype), text.to(dtype), factor], [soft_image.to(other), soft_text.to(other)]))


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


PARTS = ("loss", "student_image", "student_text", "student_scale")


# In the interpreter one dtype a shape, in turn.
TURN = dict(zip(SHAPES, [torch.float32, torch.bfloat16, torch.float16] * len(SHAPES), strict=False))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    [
        pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=case.marks)
        for case in backends_and_dtypes(DTYPES)
        for name in SHAPES
        if not interpreted(case.values[0]) or case.values[1] == TURN[name]
    ],
)
def test_value_and_gradients(loss: str, name: str, dtype: torch.dtype, backend: str) -> None:
    shape = (INTERPRETED_SHAPES if interpreted(backend) else SHAPES)[name]
    student, teacher = problem(shape, dtype, backend=backend)
    # What a gradient scaler does: float16 gradients of a mean would be subnormal.
    upstream = on(backend, torch.tensor(1024.0))
    exact = gradients(lambda *t: oracle(loss)(*t, *double(teacher)), double(student), upstream)
    actual = gradients(lambda *t: ours(loss, backend)(*t, *teacher), student, upstream)
    assert actual[0].dtype == student[2].dtype
    for part, got, expected, like in zip(PARTS, actual, exact, [student[2], *student], strict=True):
        assert got.dtype == like.dtype
        # A unit vector of width 1 does not move, a softmax over one entry is 1: such gradients are 0 but for rounding.
        if expected.abs().max() < 1e-9:
            assert got.abs().max() < 1e-5 * upstream, part
        else:
            assert_matches_oracle(got, expected, dtype, part)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        ("frobenius", "wide teacher"),
        ("frobenius", "width 513"),
        ("kl", "wide teacher"),
        ("kl", "width 513"),
        ("kl", "more rows than widths"),
    ],
)
def test_gradients_no_worse_than_pytorch(loss: str, shape: str, backend: str) -> None:
    shapes = INTERPRETED_SHAPES if interpreted(backend) else SHAPES
    student, teacher = problem(shapes[shape], torch.float32, backend=backend)
    exact = gradients(lambda *t: oracle(loss)(*t, *double(teacher)), double(student))
    pytorch = gradients(lambda *t: oracle(loss)(*t, *teacher), student)
    actual = gradients(lambda *t: ours(loss, backend)(*t, *teacher), student)
    for name, a, b, c in list(zip(PARTS, actual, pytorch, exact, strict=True))[1:3]:
        assert_no_worse_than_pytorch(a, b, c, name)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(330, 290, 20, 20), (1300, 1100, 24, 32)])
def test_rounding_of_the_gram_form(shape: tuple[int, int, int, int], backend: str) -> None:
    # Sums over all rows come before the difference: more rounding than PyTorch's, but bounded.
    student, teacher = problem(shape, torch.float32, backend=backend)
    exact = gradients(lambda *t: oracle("frobenius")(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("frobenius", backend)(*t, *teacher), student)
    assert abs(float(actual[0]) - float(exact[0])) <= 5e-7 * float(exact[0])
    for got, expected in zip(actual[1:3], exact[1:3], strict=True):
        assert (got.double() - expected).norm() <= 3e-6 * expected.norm()


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (4, 6, 3, 5), (13, 11, 2, 2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, shape: tuple[int, int, int, int], backend: str) -> None:
    student, teacher = problem(shape, backend=backend)
    leaves = [tensor.requires_grad_() for tensor in student]
    assert torch.autograd.gradcheck(lambda *t: ours(loss, backend)(*t, *teacher), leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda *t: ours(loss, backend)(*t, *teacher), leaves)


@settings(max_examples=60, deadline=None)
@given(
    loss=st.sampled_from(LOSSES),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    width=st.integers(1, 40),
    teacher_width=st.integers(1, 40),
    same_width=st.booleans(),
    reduction=st.sampled_from(["sum", "row", "mean"]),
    scale=st.sampled_from([0.5, 20.0, 320.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    loss: str,
    rows: int,
    columns: int,
    width: int,
    teacher_width: int,
    same_width: bool,
    reduction: str,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    student, teacher = problem((rows, columns, width, width if same_width else teacher_width), scale=scale)
    exact = gradients(lambda *t: oracle(loss, reduction)(*t, *teacher), student)
    actual = gradients(lambda *t: ours(loss, "cpu", reduction)(*t, *teacher), student)
    for name, got, expected in zip(PARTS, actual, exact, strict=True):
        floor = 1e-12 * max(1.0, scale) * max(1.0, float(exact[0]))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=floor, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", backends("triton"))
@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # shrinking in the interpreter would take minutes
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 80),
    width=st.integers(1, 40),
    teacher_width=st.integers(1, 40),
    same_width=st.booleans(),
    reduction=st.integers(0, 2),
    budget=st.sampled_from([0, 1000, 1 << 28]),
    needs=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_frobenius_in_triton(
    backend: str,
    rows: int,
    columns: int,
    width: int,
    teacher_width: int,
    same_width: bool,
    reduction: int,
    budget: int,
    needs: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = rows if budget > 0 else 1 + rows % 4
    shape = (rows, columns, width, width if same_width else teacher_width)
    student, teacher = problem(shape, torch.float32, backend=backend)
    relation_frobenius_loss(*student[:2], *teacher, backend=backend)  # imports the operators
    name = ("sum", "row", "mean")[reduction]
    exact = gradients(lambda *t: oracle("frobenius", name)(*t, *double(teacher)), double(student))
    function = torch.ops.lcr2s_triton.relation_frobenius
    actual = function(*student[:2], *teacher, reduction, budget, *needs)
    assert_matches_oracle(actual[0], exact[0], torch.float32)
    for got, expected, need in zip(actual[1:], exact[1:3], needs, strict=True):
        assert got.shape == (expected.shape if need else (0,))
        if need:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-6 * max(1.0, float(exact[0])))
    assert all(map(torch.equal, actual, function(*student[:2], *teacher, reduction, budget, *needs)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "row", "mean"])
@pytest.mark.parametrize("shape", ["one row, many columns", "more rows than widths"])
def test_reduction(shape: str, reduction: str, backend: str) -> None:
    dtype = widest_dtype(backend)
    student, teacher = problem(SHAPES[shape], dtype, backend=backend)
    exact = gradients(lambda *t: oracle("frobenius", reduction)(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("frobenius", backend, reduction)(*t, *teacher), student)
    for got, expected in zip(actual, exact, strict=True):
        assert_matches_oracle(got, expected, dtype)


@pytest.mark.parametrize(
    ("scale", "teacher_scale", "backend"),
    cases(
        lambda scale, teacher_scale: (scale, teacher_scale) in ((0.01, 100.0), (60.0, 1.0), (500.0, 100.0)),
        [0.01, 30.0, 60.0, 74.9, 75.1, 500.0],
        [1.0, 100.0],
        among=KERNELS,
    ),
)
def test_scales(scale: float, teacher_scale: float, backend: str) -> None:
    shape = (50, 70, 24, 24) if interpreted(backend) else (150, 270, 24, 24)
    student, teacher = problem(shape, torch.float32, scale=scale, backend=backend)
    exact = gradients(lambda *t: oracle("kl", teacher_scale=teacher_scale)(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("kl", backend, teacher_scale=teacher_scale)(*t, *teacher), student)
    # Rounding a cosine moves a logit by scale times as much.
    for name, got, expected in zip(PARTS, actual, exact, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 2e-6 + 1e-6 * (scale + teacher_scale), name


def test_scales_may_be_numbers_and_tensors() -> None:
    (image, text, scale), teacher = problem((9, 7, 5, 5), torch.float32)
    expected = ours("kl")(image, text, scale, *teacher)
    for student_scale, teacher_scale in (
        (12, 17),
        (torch.tensor([12.0]), torch.tensor(17.0)),
        (12.0, torch.tensor(17)),
    ):
        if isinstance(teacher_scale, Tensor) and not teacher_scale.is_floating_point():
            with pytest.raises(TypeError, match="`teacher_scale`"):
                relation_kl_loss(image, text, *teacher, student_scale=student_scale, teacher_scale=teacher_scale)
            continue
        got = relation_kl_loss(image, text, *teacher, student_scale=student_scale, teacher_scale=teacher_scale)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str
)
@pytest.mark.parametrize("loss", LOSSES)
def test_teacher_of_another_dtype(
    loss: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype, backend: str
) -> None:
    student, teacher = problem((20, 31, 12, 12), student_dtype, teacher_dtype, backend=backend)
    wide = torch.float64 in (student_dtype, teacher_dtype)
    if wide and backend == "triton":
        side = "student" if student_dtype == torch.float64 else "teacher"
        with pytest.raises(TypeError, match=f"`{side}_image`.*float64"):
            ours(loss, backend)(*student, *teacher)
        return
    exact = gradients(lambda *t: oracle(loss)(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours(loss, backend)(*t, *teacher), student)
    assert actual[0].dtype == (torch.float64 if wide else torch.float32)
    assert_matches_oracle(actual[0], exact[0], torch.float64 if wide else torch.float32)
    for got, expected in zip(actual[1:], exact[1:], strict=True):
        assert_matches_oracle(got, expected, student_dtype)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(60, 70, 64, 64), (500, 400, 32, 32)], ids=["direct", "gram"])
def test_frobenius_keeps_its_digits_near_the_teacher(
    shape: tuple[int, int, int, int], distance: float, backend: str
) -> None:
    student, teacher = problem(shape, torch.float32, backend=backend)
    student[:2] = [t + distance * s for s, t in zip(student[:2], teacher, strict=True)]
    exact = gradients(lambda *t: oracle("frobenius")(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("frobenius", backend)(*t, *teacher), student)
    for name, got, expected in zip(PARTS[:3], actual, exact, strict=False):
        assert (got.double() - expected).norm() <= 3e-6 * expected.norm(), name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("distance", "loss_error", "gradient_error"), [(1e-1, 1e-6, 5e-5), (1e-3, 1e-4, 3e-3)])
@pytest.mark.parametrize("scale", [50.0, 90.0])
def test_kl_keeps_its_digits_near_the_teacher(
    scale: float, distance: float, loss_error: float, gradient_error: float, backend: str
) -> None:
    shape = (110, 120, 128, 128) if interpreted(backend) else (300, 280, 128, 128)
    student, teacher = problem(shape, torch.float32, scale=scale, backend=backend)
    student[:2] = [t + distance * s for s, t in zip(student[:2], teacher, strict=True)]
    exact = gradients(lambda *t: oracle("kl", teacher_scale=scale)(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("kl", backend, teacher_scale=scale)(*t, *teacher), student)
    assert abs(float(actual[0]) - float(exact[0])) <= loss_error * float(exact[0])
    for got, expected in zip(actual[1:3], exact[1:3], strict=True):
        assert (got.double() - expected).norm() <= gradient_error * expected.norm()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(DTYPES, "cpu", "triton", "cuda"))
def test_student_equal_to_the_teacher(backend: str, dtype: torch.dtype, loss: str) -> None:
    student, _ = problem((150, 40, 24, 24), dtype, scale=17.0, backend=backend)
    for result in gradients(lambda *t: ours(loss, backend)(*t, *student[:2]), student):
        assert not result.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_bits_do_not_depend_on_threads(loss: str) -> None:
    for shape in ((330, 290, 20, 20), (130, 140, 70, 30)):
        student, teacher = problem(shape, torch.float32)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(gradients(lambda *t: ours(loss, "cpu")(*t, *teacher), student))  # noqa: B023
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_small_workspace_only_moves_the_last_digits() -> None:
    # 1 MiB: several blocks, some cosines kept and others computed again.
    student, teacher = problem((700, 900, 16, 24), torch.float32)
    direct, direct_teacher = problem((700, 900, 300, 300), torch.float32)
    full = gradients(lambda *t: ours("kl", "cpu")(*t, *teacher), student)
    full_direct = gradients(lambda *t: ours("frobenius", "cpu")(*t, *direct_teacher), direct)
    set_workspace_limit(1)
    try:
        small = gradients(lambda *t: ours("kl", "cpu")(*t, *teacher), student)
        small_direct = gradients(lambda *t: ours("frobenius", "cpu")(*t, *direct_teacher), direct)
    finally:
        set_workspace_limit(None)
    for a, b in zip([*full, *full_direct], [*small, *small_direct], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(float(a.abs().max()), 1e-30))


@pytest.mark.parametrize("kibibytes", [16, 256, 1024, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_keeps_no_some_or_all_cosines(dtype: torch.dtype, kibibytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of neither model, of some rows of one, of one, of both (float32); gradients take the place of what was kept.
    student, teacher = problem((300, 500, 20, 33), dtype)
    monkeypatch.setattr(_workspace, "workspace_bytes", lambda device: kibibytes << 10)
    exact = gradients(lambda *t: oracle("kl")(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("kl", "cpu")(*t, *teacher), student)
    for name, got, expected in zip(PARTS, actual, exact, strict=True):
        assert_matches_oracle(got, expected, dtype, name)


@pytest.mark.parametrize("backend", backends("triton", "cuda"))
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"), [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)], ids=str
)
def test_kl_in_a_tiny_workspace(
    dtype: torch.dtype, teacher_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Statistics and gradients in blocks of a few tiles, not all of one size.
    student, teacher = problem((300, 140, 16, 24), dtype, teacher_dtype, backend=backend)
    monkeypatch.setattr(_workspace, "workspace_bytes", lambda device: 2 * 128 * 128 * 4)
    exact = gradients(lambda *t: oracle("kl")(*t, *double(teacher)), double(student))
    actual = gradients(lambda *t: ours("kl", backend)(*t, *teacher), student)
    for name, got, expected in zip(PARTS, actual, exact, strict=True):
        assert_matches_oracle(got, expected, dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_non_contiguous(loss: str, backend: str) -> None:
    student, teacher = problem((9, 14, 6, 6), torch.float32, backend=backend)
    expected = gradients(lambda *t: ours(loss, backend)(*t, *teacher), student)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t.repeat_interleave(2, 0)[::2],
    ]
    for layout in layouts:
        leaves = [layout(t).detach().requires_grad_() for t in student[:2]]
        value = ours(loss, backend)(*leaves, student[2], *[layout(t) for t in teacher])
        torch.testing.assert_close(value.detach(), expected[0])
        for got, exact in zip(torch.autograd.grad(value, leaves), expected[1:3], strict=True):
            torch.testing.assert_close(got, exact)
    # One row for all.
    row = student[0][:1].expand(9, 6)
    torch.testing.assert_close(
        ours(loss, backend)(row, *student[1:], *teacher), ours(loss, "reference")(row.clone(), *student[1:], *teacher)
    )


@pytest.mark.parametrize(
    ("loss", "value", "where", "shape", "backend"),
    cases(
        lambda loss, value, where, shape: (loss == "frobenius") == (value == math.inf) or shape[0] == 4,
        LOSSES,
        [math.nan, math.inf],
        range(4),
        [(4, 5, 8, 8), (40, 30, 4, 4), (40, 30, 4, 6)],
        among=BACKENDS,
    ),
)
def test_nan_in_gives_nan_out(
    loss: str, value: float, where: int, shape: tuple[int, int, int, int], backend: str
) -> None:
    (image, text, scale), (soft_image, soft_text) = problem(shape, torch.float32, backend=backend)
    features = [image, text, soft_image, soft_text]
    features[where][-1, 2] = value
    result, grad_image, grad_text, _ = gradients(
        lambda i, t, s: ours(loss, backend)(i, t, s, *features[2:]), [features[0], features[1], scale]
    )
    assert result.isnan()
    assert grad_image.isnan().any()
    assert grad_text.isnan().any()


@pytest.mark.parametrize("name", ["student_scale", "teacher_scale"])
def test_nan_scale(name: str) -> None:
    (image, text, _), teacher = problem((4, 5, 8, 8), torch.float32)
    scales = {"student_scale": 3.0, "teacher_scale": 3.0, name: torch.tensor(math.nan)}
    assert relation_kl_loss(image, text, *teacher, **scales).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 6, 8, 8), (50, 40, 4, 4), (50, 40, 4, 6)])
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_rows_have_cosine_zero_and_no_gradient(loss: str, shape: tuple[int, int, int, int], backend: str) -> None:
    dtype = widest_dtype(backend)
    (image, text, scale), teacher = problem(shape, dtype, backend=backend)
    image[1] = text[0] = 0
    teacher[0][2] = teacher[1][3] = 0

    def expected(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
        # A row of ones times 0 keeps its cosines at 0 without dividing by its norm.
        keep_image, keep_text = torch.ones_like(i[:, :1]), torch.ones_like(t[:, :1])
        keep_image[1] = keep_text[0] = 0
        unit_image = (i + 1 - keep_image) / (i + 1 - keep_image).norm(dim=1, keepdim=True) * keep_image
        unit_text = (t + 1 - keep_text) / (t + 1 - keep_text).norm(dim=1, keepdim=True) * keep_text
        soft_image, soft_text = (torch.nn.functional.normalize(x.double(), dim=1) for x in teacher)
        relations, soft = unit_image @ unit_text.T, soft_image @ soft_text.T
        if loss == "frobenius":
            return ((relations - soft) ** 2).mean() + 0 * s
        student, target = s * relations, 17.0 * soft
        return sum(
            (target.softmax(dim) * (target.log_softmax(dim) - student.log_softmax(dim))).sum(dim).mean()
            for dim in (0, 1)
        )

    exact = gradients(expected, double([image, text, scale]))
    actual = gradients(lambda *t: ours(loss, backend)(*t, *teacher), [image, text, scale])
    for got, want in zip(actual, exact, strict=True):
        assert_matches_oracle(got, want, dtype)
    assert not actual[1][1].any()
    assert not actual[2][0].any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_size_of_features_does_not_matter(loss: str, backend: str) -> None:
    student, teacher = problem((12, 9, 20, 20), torch.float32, backend=backend)
    expected = ours(loss, backend)(*student, *teacher)
    # Squares of these leave float32, and those of the last pair float64.
    for factor in (1e-25, 1e25):
        scaled = [t * factor for t in (*student[:2], *teacher)]
        got = ours(loss, backend)(*scaled[:2], student[2], *scaled[2:])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    if backend == "triton":
        return
    for factor in (1e-200, 1e200):
        got = ours(loss, backend)(
            student[0].double() * factor,
            student[1].double(),
            student[2].double(),
            *[t.double() * factor for t in teacher],
        )
        torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_some_gradients_only(loss: str, backend: str) -> None:
    # The Frobenius loss takes another path for each.
    shapes = ((30, 40, 8, 8), (30, 40, 50, 50))
    for shape in shapes[:1] if interpreted(backend) and loss == "kl" else shapes:
        student, teacher = problem(shape, torch.float32, backend=backend)
        full = gradients(lambda *t: ours(loss, backend)(*t, *teacher), student)  # noqa: B023
        for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
            leaves = [t.clone().requires_grad_(need) for t, need in zip(student, wanted, strict=True)]
            ours(loss, backend)(*leaves, *teacher).backward()
            for leaf, need, gradient in zip(leaves, wanted, full[1:], strict=True):
                assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_for_the_teacher(loss: str, backend: str) -> None:
    student, teacher = problem((6, 7, 5, 5), torch.float32, backend=backend)
    leaves = [t.requires_grad_() for t in [*student, *teacher]]
    ours(loss, backend)(*leaves).backward()
    assert leaves[0].grad is not None
    assert leaves[3].grad is None
    assert leaves[4].grad is None
    soft = on(backend, torch.tensor(3.0)).requires_grad_()
    relation_kl_loss(*leaves[:2], *leaves[3:], student_scale=2.0, teacher_scale=soft, backend=backend).backward()
    assert soft.grad is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_grad_gives_the_same_bits(loss: str, backend: str) -> None:
    shape = (70, 50, 30, 40) if interpreted(backend) else (200, 150, 30, 40)
    student, teacher = problem(shape, torch.float32, backend=backend)
    leaves = [t.requires_grad_() for t in student]
    with torch.no_grad():
        inference = ours(loss, backend)(*leaves, *teacher)
    training = ours(loss, backend)(*leaves, *teacher)
    assert not inference.requires_grad
    assert training.requires_grad
    assert torch.equal(inference, training.detach())


def test_upstream_gradient_is_applied() -> None:
    student, teacher = problem((20, 30, 8, 8), torch.float16)
    one = gradients(lambda *t: ours("kl")(*t, *teacher), student)
    many = gradients(lambda *t: 4096 * ours("kl")(*t, *teacher), student)
    for small, large in zip(one[1:], many[1:], strict=True):
        torch.testing.assert_close(large.double() / 4096, small.double(), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    (image, text, scale), teacher = problem((6, 5, 4, 4), torch.float32, backend=backend)
    for loss in LOSSES:
        ours(loss, backend)(image, text, scale, *teacher)  # registers Triton's
    operators = torch.ops.lcr2s_triton if backend == "triton" else torch.ops.lcr2s
    image, text, scale = (t.requires_grad_() for t in (image, text, scale))
    budget = 1 << 20
    torch.library.opcheck(operators.relation_frobenius.default, (image, text, *teacher, 2, budget, True, True))
    torch.library.opcheck(
        operators.relation_kl.default,
        (image, text, *teacher, scale, on(backend, torch.tensor(3.0)), budget, True, True, True),
    )
    plain = [t.detach() for t in (image, text)]
    torch.library.opcheck(
        operators.relation_frobenius.default, (*plain, *[t.bfloat16() for t in teacher], 0, budget, False, False)
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_compile_without_graph_breaks(loss: str, backend: str) -> None:
    student, teacher = problem((12, 9, 6, 6), torch.float32, backend=backend)
    expected = gradients(lambda *t: ours(loss, backend)(*t, *teacher), student)
    compiled = torch.compile(ours(loss, backend), fullgraph=True, dynamic=True)
    for got, exact in zip(gradients(lambda *t: compiled(*t, *teacher), student), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_compiled_code_follows_the_chosen_backend() -> None:
    student, teacher = problem((12, 9, 6, 6), torch.float32)
    compiled = torch.compile(ours("kl"), fullgraph=True)
    expected = compiled(*student, *teacher)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(*student, *teacher), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_keeps_dtypes(loss: str, backend: str) -> None:
    student, teacher = problem((20, 30, 16, 16), torch.float32, backend=backend)
    mixed = [student[0].bfloat16(), student[1], student[2]]
    soft = [teacher[0], teacher[1].half()]
    exact = oracle(loss)(*double(mixed), *double(soft))
    leaves = [t.requires_grad_() for t in mixed]
    with torch.autocast(student[0].device.type, torch.bfloat16):
        value = ours(loss, backend)(*leaves, *soft)
        same = ours(loss, backend)(*student, *teacher)
    assert value.dtype == torch.float32
    assert_matches_oracle(value.detach(), exact.detach(), torch.float32)
    torch.testing.assert_close(same, ours(loss, backend)(*student, *teacher))
    value.backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    # Outside autocast the two sides of one model have one dtype.
    with pytest.raises(TypeError, match="`student_text`"):
        ours(loss, backend)(*mixed, *teacher)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward_is_refused(loss: str, backend: str) -> None:
    student, teacher = problem((5, 4, 3, 3), torch.float32, backend=backend)
    leaves = [t.requires_grad_() for t in student]
    first = torch.autograd.grad(ours(loss, backend)(*leaves, *teacher), leaves[:2], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first[0].sum().backward()


IMAGE, TEXT = torch.ones(4, 3), torch.ones(5, 3)
SOFT_IMAGE, SOFT_TEXT = torch.ones(4, 6), torch.ones(5, 6)
REFUSED = [
    ("student_image", TypeError, [[1.0]], "list"),
    ("student_image", ValueError, IMAGE[0], r"\(B, d\)"),
    ("student_image", TypeError, IMAGE.long(), "int64"),
    ("student_image", ValueError, IMAGE[:0], "empty"),
    ("student_image", ValueError, IMAGE[:, :0], "empty"),
    ("student_text", ValueError, TEXT[:, :2], "width of `student_image`"),
    ("student_text", TypeError, TEXT.double(), "float64"),
    ("student_text", ValueError, TEXT[:0], "empty"),
    ("student_text", ValueError, TEXT.to("meta"), "meta"),
    ("teacher_image", ValueError, SOFT_IMAGE[:3], "rows of `student_image`"),
    ("teacher_image", ValueError, SOFT_IMAGE[:, :0], "empty"),
    ("teacher_image", TypeError, None, "NoneType"),
    ("teacher_text", ValueError, SOFT_TEXT[:4], "rows of `student_text`"),
    ("teacher_text", ValueError, SOFT_TEXT[:, :5], "width of `teacher_image`"),
    ("teacher_text", TypeError, SOFT_TEXT.half(), "float16"),
    ("teacher_text", TypeError, SOFT_TEXT.bool(), "bool"),
    ("backend", ValueError, "gpu", "gpu"),
]
ARGUMENTS: dict[str, object] = {
    "student_image": IMAGE,
    "student_text": TEXT,
    "teacher_image": SOFT_IMAGE,
    "teacher_text": SOFT_TEXT,
}
EXTRA: dict[str, dict[str, object]] = {
    "frobenius": {"reduction": "mean"},
    "kl": {"student_scale": 2.0, "teacher_scale": 3.0},
}
REFUSED_EXTRA = [
    ("frobenius", "reduction", ValueError, "batchmean", "batchmean"),
    ("frobenius", "reduction", ValueError, None, "None"),
    *[
        ("kl", name, *case)
        for name in ("student_scale", "teacher_scale")
        for case in (
            (TypeError, "50", "str"),
            (TypeError, True, "bool"),
            (ValueError, 0.0, "0"),
            (ValueError, -1.0, "-1"),
            (ValueError, math.nan, "nan"),
            (ValueError, math.inf, "inf"),
            (ValueError, torch.ones(2), "one element"),
            (TypeError, torch.tensor(3), "int64"),
            (ValueError, torch.tensor(3.0, device="meta"), "meta"),
        )
    ],
]


@pytest.mark.parametrize(
    ("loss", "argument", "error", "bad", "came"),
    [*[(loss, *case) for loss in LOSSES for case in REFUSED], *REFUSED_EXTRA],
)
def test_refused(loss: str, argument: str, error: type[Exception], bad: object, came: str) -> None:
    function = relation_frobenius_loss if loss == "frobenius" else relation_kl_loss
    good = {**ARGUMENTS, **EXTRA[loss]}
    assert function(**good).shape == ()
    with pytest.raises(error, match=f"(?s)`{argument}`.*{came}"):
        function(**{**good, argument: bad})


DIRECT: dict[str, dict[str, object]] = {
    "frobenius": {**ARGUMENTS, "reduction": 2, "workspace_bytes": 1 << 20, "need_image": True, "need_text": True},
    "kl": {
        **ARGUMENTS,
        "student_scale": torch.tensor(2.0),
        "teacher_scale": torch.tensor(2.0),
        "workspace_bytes": 1 << 20,
        "need_image": True,
        "need_text": True,
        "need_scale": True,
    },
}
BAD_DIRECT = [
    *[(loss, name, bad) for loss in LOSSES for name, _, bad, _ in REFUSED if isinstance(bad, Tensor) and bad.is_cpu],
    *[(loss, "workspace_bytes", -1) for loss in LOSSES],
    ("frobenius", "reduction", 3),
    ("frobenius", "reduction", -1),
    ("kl", "student_scale", torch.ones(2)),
    ("kl", "student_scale", torch.tensor(2)),
    ("kl", "teacher_scale", torch.ones(1, 1)),
    ("kl", "teacher_scale", torch.tensor(True)),
]


@pytest.mark.parametrize("backend", backends("triton"))
def test_direct_frobenius_in_triton_is_refused(backend: str) -> None:
    relation_frobenius_loss(*on(backend, [IMAGE, TEXT, SOFT_IMAGE, SOFT_TEXT]), backend=backend)  # imports it
    function = torch.ops.lcr2s_triton.relation_frobenius
    good = on(backend, DIRECT["frobenius"])
    assert function(**good)[0].shape == ()
    for loss, argument, bad in BAD_DIRECT:
        if loss == "frobenius" and not (isinstance(bad, Tensor) and bad.dtype in (torch.float16, torch.float64)):
            with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
                function(**on(backend, {**good, argument: bad}))
    with pytest.raises(TypeError, match=r"`teacher_text`.*float64"):
        function(**{**good, "teacher_text": good["teacher_text"].double()})


@pytest.mark.parametrize(("loss", "argument", "bad"), BAD_DIRECT)
def test_direct_calls_are_refused(loss: str, argument: str, bad: object) -> None:
    op = torch.ops.lcr2s.relation_frobenius if loss == "frobenius" else torch.ops.lcr2s.relation_kl
    assert op(**DIRECT[loss])[0].shape == ()
    call = {**DIRECT[loss], argument: bad}
    # Two sides of one model may differ in dtype here: the public functions allow that under autocast.
    if isinstance(bad, Tensor) and argument.endswith("text") and bad.is_floating_point():
        other = call[argument.replace("text", "image")]
        if bad.numel() and bad.shape[1] == other.shape[1] and bad.shape[0] == 5:
            assert op(**call)[0].isfinite()
            return
    with pytest.raises(RuntimeError, match=f"`{argument}`"):
        op(**call)
