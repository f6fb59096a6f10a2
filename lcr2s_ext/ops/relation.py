"""Relation distillation: the student's image-text cosines follow the teacher's.

The compiled kernels never form the B x N matrices: memory is O((B + N) d + d^2) and a bounded workspace.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lcr2s_ext import _checks
from lcr2s_ext.ops import _backend, _distributed, _registration, _workspace
from lcr2s_ext.reference import relation as reference

_REDUCTIONS = ("sum", "row", "mean")
_FEATURES = ("student_image", "student_text", "teacher_image", "teacher_text")


def _check(
    student_image: object, student_text: object, teacher_image: object, teacher_text: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four features, the teacher's detached."""
    image = _checks.check_tensor("student_image", student_image, "(B, d)")
    text = _checks.check_tensor("student_text", student_text, "(N, d)")
    soft_image = _checks.check_tensor("teacher_image", teacher_image, "(B, e)")
    soft_text = _checks.check_tensor("teacher_text", teacher_text, "(N, e)")
    autocast = torch.is_autocast_enabled(image.device.type)
    pairs = (("student_image", image, "student_text", text), ("teacher_image", soft_image, "teacher_text", soft_text))
    for first_name, first, second_name, second in pairs:
        _checks.check_nonempty(first_name, first)
        _checks.check_nonempty(second_name, second)
        # Autocast lets encoders return different dtypes.
        _checks.check_like(second_name, second, first_name, first, dtype=not autocast)
        _checks.check_size(second_name, second, 1, first.shape[1], f"width of `{first_name}`")
    _checks.check_like("teacher_image", soft_image, "student_image", image, dtype=False)
    _checks.check_size("teacher_image", soft_image, 0, image.shape[0], "rows of `student_image`")
    _checks.check_size("teacher_text", soft_text, 0, text.shape[0], "rows of `student_text`")
    return image, text, soft_image.detach(), soft_text.detach()


def _statistics(*features: Tensor) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in features)
    return torch.float64 if wide else torch.float32


def relation_frobenius_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    reduction: str = "mean",
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Squared Frobenius distance between the cosine matrices of student and teacher.

    sum_ij (cos(student_image_i, student_text_j) - cos(teacher_image_i, teacher_text_j))^2, the inter-modal relation
    loss of LCR²S. Any two modalities will do: pass images twice for intra-modal relations. The compiled kernel takes
    products of d x d Gram matrices, O((B + N) d^2), or the relations row by row where that is cheaper.

    Args:
        student_image: (B, d) float32, float64, bfloat16 or float16 features, normalised inside; B and d at least 1.
        student_text: (N, d), dtype and device of `student_image` (under autocast the dtypes may differ).
        teacher_image: (B, e) on the same device; dtype and width may differ from the student's. No gradient.
        teacher_text: (N, e), dtype of `teacher_image` (under autocast the dtypes may differ). No gradient.
        reduction: "sum", "row" (the sum divided by B) or "mean" (divided by B * N).
        backend: see :func:`lcr2s_ext.ops.use_backend`.
        group: ranks of which each holds rows of one larger batch, as many on each; the loss is that of the whole
            batch, the same on all ranks, and gradients summed over the ranks are those of one process on the whole
            batch. DistributedDataParallel averages: multiply the loss by the number of ranks there. Only d x d
            matrices travel, and library products take the place of the backend.

    Returns:
        () float32, or float64 where any of the features are. A zero row has cosine 0 and gradient 0; NaN in gives NaN
        out. Differentiable once in the student's features.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or value; the message names it.
        BackendUnavailableError: the backend cannot run here.

    Where the widths agree the loss keeps its digits as the student approaches the teacher; where they differ its
    rounding error is about 1e-7 of |R_student|^2 + |R_teacher|^2 in float32.

    References:
        Yan et al., "Learning Comprehensive Representations with Richer Self for Text-to-Image Person
        Re-Identification", ACM MM 2023, arXiv 2310.11210.
    """
    features = _check(student_image, student_text, teacher_image, teacher_text)
    reduction = _checks.check_choice("reduction", reduction, _REDUCTIONS)
    chosen = _backend.resolve("relation_frobenius", backend, student_image.device, student_image.shape[0])
    _checks.check_backend_dtype(chosen, **dict(zip(_FEATURES, features, strict=True)))
    group = _distributed.check_group(group)
    if group is not None:
        return _distributed.frobenius(group, features, reduction)
    if chosen == "reference":
        return reference.relation_frobenius_loss(*features, reduction)
    needs = _registration.needs_grad(*features[:2])
    return _frobenius_operators(chosen).relation_frobenius(
        *features, _REDUCTIONS.index(reduction), _workspace.workspace_bytes(student_image.device), *needs
    )[0]


class _ReferenceKlPasses:
    """The reference's passes under the operators' signatures."""

    @staticmethod
    def relation_kl_statistics(*args: Any) -> tuple[Tensor, Tensor]:
        return reference.relation_kl_statistics(*args[:6])

    @staticmethod
    def relation_kl_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return reference.relation_kl_gradients(*args[:10])


def _kl_passes(backend: str, dtype: torch.dtype) -> tuple[Any, float] | None:
    """The namespace with the two passes for `backend` and the unit in which they count logits; None: it has none."""
    chosen = _backend.with_passes("relation_kl_statistics", backend, dtype)
    if chosen is None:
        return None
    passes = _ReferenceKlPasses if chosen == "reference" else _kl_operators(chosen)
    return passes, math.log(2) if chosen == "triton" else 1.0


def _group_kl(
    group: ProcessGroup,
    passes: Any,
    unit: float,
    features: tuple[Tensor, Tensor, Tensor, Tensor],
    student_scale: Tensor,
    teacher_scale: Tensor,
) -> Tensor:
    """The loss over the rows of all ranks, each of which works on its images' rows of the matrices alone."""
    needs = _registration.needs_grad(*features[:2], student_scale)
    workspace = _workspace.workspace_bytes(features[0].device)
    _distributed.check_agreement(
        group,
        dict(zip(_FEATURES, features, strict=True)),
        gradients_needed=sum(need << bit for bit, need in enumerate(needs)),
        workspace_limit=workspace,
    )
    dtype = _statistics(*features)
    image, text, soft_image, soft_text = (tensor.detach() for tensor in features)
    scales = student_scale.detach(), teacher_scale
    block: Sequence[Tensor] = (text, soft_text)
    ring = _distributed.travels_in_ring(group, block, _gradient(text, dtype, True) if needs[1] else None, workspace)
    block = _distributed.spread(group, ring, block)
    merge = functools.partial(reference.merge_kl_statistics, unit=unit)
    of_rows: list[Tensor] = []

    def statistics(block: Sequence[Tensor]) -> Tensor:
        rows, columns = passes.relation_kl_statistics(image, block[0], soft_image, block[1], *scales, workspace)
        of_rows.append(rows.T)
        return columns.T

    with torch.no_grad():
        of_columns = _distributed.pass_over(group, ring, block, (), statistics, merge)
        whole_rows = functools.reduce(merge, of_rows).T.contiguous()
        weights = [1 / (group.size() * side.shape[0]) for side in (image, text)]
        of_image: list[Tensor] = []
        # Of the loss and of the gradient of the scale, block by block.
        sums: list[Tensor] = []

        def gradients(block: Sequence[Tensor]) -> Tensor | None:
            text, soft_text, whole_columns = block
            loss, grad_image, grad_text, grad_scale = passes.relation_kl_gradients(
                image,
                text,
                soft_image,
                soft_text,
                *scales,
                whole_rows,
                whole_columns.T.contiguous(),
                *weights,
                workspace,
                *needs,
            )
            if needs[0]:
                of_image[:] = [of_image[0].add_(grad_image) if of_image else grad_image]
            sums.append(torch.stack([loss, grad_scale if needs[2] else torch.zeros_like(loss)]).double())
            return grad_text if needs[1] else None

        of_text = _distributed.pass_over(group, ring, block, (of_columns,), gradients, torch.add)
        loss, of_scale = _distributed.total(group, functools.reduce(torch.add, sums)).to(dtype)
    # Each rank holds the scale: it keeps an equal part of the whole gradient.
    found = [of_image[0] if needs[0] else None, of_text, of_scale / group.size() if needs[2] else None]
    return _distributed.computed("relation_kl", loss, (features[0], features[1], student_scale), found)


def relation_kl_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax relations from the teacher's, in both directions.

    Row i: KL(softmax_j(teacher_scale * cos(teacher_image_i, teacher_text_j)) || softmax_j(student_scale *
    cos(student_image_i, student_text_j))), mean over the B rows; the same over the N columns; the two summed.

    Args:
        student_image: (B, d) float32, float64, bfloat16 or float16 features, normalised inside; B and d at least 1.
        student_text: (N, d), dtype and device of `student_image` (under autocast the dtypes may differ).
        teacher_image: (B, e) on the same device; dtype and width may differ from the student's. No gradient.
        teacher_text: (N, e), dtype of `teacher_image` (under autocast the dtypes may differ). No gradient.
        student_scale: 1 / temperature of the student, a number above 0 or a one-element tensor, which may need a
            gradient and is not read on the host.
        teacher_scale: the teacher's, likewise, without a gradient.
        backend: see :func:`lcr2s_ext.ops.use_backend`.
        group: ranks of which each holds rows of one larger batch, as many on each; the loss is that of the whole
            batch, the same on all ranks, and gradients summed over the ranks are those of one process on the whole
            batch. DistributedDataParallel averages: multiply the loss by the number of ranks there.

    Returns:
        () float32, or float64 where any of the features are. A zero row has cosine 0 and gradient 0; NaN in gives NaN
        out. Differentiable once in the student's features and scale.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or value; the message names it.
        BackendUnavailableError: the backend cannot run here.

    References:
        Yang et al., "CLIP-KD: An Empirical Study of CLIP Model Distillation", CVPR 2024, arXiv 2307.12732
        (contrastive relational distillation).
    """
    features = _check(student_image, student_text, teacher_image, teacher_text)
    dtype = _statistics(*features)
    device = student_image.device
    student = _checks.check_scale("student_scale", student_scale, device, dtype)
    teacher = _checks.check_scale("teacher_scale", teacher_scale, device, dtype).detach()
    chosen = _backend.resolve("relation_kl", backend, device, student_image.shape[0])
    _checks.check_backend_dtype(chosen, **dict(zip(_FEATURES, features, strict=True)))
    group = _distributed.check_group(group)
    if group is not None:
        if (passes := _kl_passes(chosen, dtype)) is not None:
            return _group_kl(group, *passes, features, student, teacher)
        gathered = _distributed.gather(group, dict(zip(_FEATURES, features, strict=True)))
        features = (gathered[0], gathered[1], gathered[2], gathered[3])
        student = _distributed.share(group, student)
    if chosen == "reference":
        return reference.relation_kl_loss(*features, student, teacher)
    needs = _registration.needs_grad(*features[:2], student)
    return _kl_operators(chosen).relation_kl(
        *features, student, teacher, _workspace.workspace_bytes(student_image.device), *needs
    )[0]


def _gradient(like: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    return like.new_empty(like.shape if needed else (0,), dtype=dtype)


def _fake_frobenius(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    reduction: int,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _statistics(student_image, student_text, teacher_image, teacher_text)
    loss = student_image.new_empty((), dtype=dtype)
    return loss, _gradient(student_image, dtype, need_image), _gradient(student_text, dtype, need_text)


def _fake_kl(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _statistics(student_image, student_text, teacher_image, teacher_text)
    return (
        student_image.new_empty((), dtype=dtype),
        _gradient(student_image, dtype, need_image),
        _gradient(student_text, dtype, need_text),
        _gradient(student_scale, dtype, need_scale),
    )


def _fake_kl_statistics(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    dtype = _statistics(student_image, student_text, teacher_image, teacher_text)
    rows, columns = (side.new_empty((4, side.shape[0]), dtype=dtype) for side in (student_image, student_text))
    return rows, columns


def _fake_kl_gradients(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_weight: float,
    column_weight: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = student_image, student_text, teacher_image, teacher_text
    return _fake_kl(*features, student_scale, teacher_scale, workspace_bytes, need_image, need_text, need_scale)


# No autocast rule: the kernels take every dtype as it is and normalise in their own precision.
def _register_frobenius(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::relation_frobenius", _fake_frobenius)
    _registration.register_scalar_loss(namespace, "relation_frobenius", (0, 1))


def _register_kl(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::relation_kl", _fake_kl)
    _registration.register_scalar_loss(namespace, "relation_kl", (0, 1, 4))
    _registration.register_pass(namespace, "relation_kl_statistics", _fake_kl_statistics)
    _registration.register_pass(namespace, "relation_kl_gradients", _fake_kl_gradients)


_frobenius_operators = _registration.Operators("relation_frobenius", _register_frobenius)
_kl_operators = _registration.Operators("relation_kl", _register_kl)
