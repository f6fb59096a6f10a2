"""Losses over the cosine matrix of two sets of features: InfoNCE, SDM, CMPM and TAL.

The compiled kernels stream the matrix through a bounded workspace: memory is O((B + N) d), whatever B N is.
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
from lcr2s_ext.reference import similarity as reference


def _check_features(image: object, text: object) -> tuple[Tensor, Tensor]:
    image = _checks.check_tensor("image", image, "(B, d)")
    text = _checks.check_tensor("text", text, "(N, d)")
    _checks.check_nonempty("image", image)
    _checks.check_nonempty("text", text)
    # Autocast lets encoders return different dtypes; the wider one is taken then.
    _checks.check_like("text", text, "image", image, dtype=not torch.is_autocast_enabled(image.device.type))
    _checks.check_size("text", text, 1, image.shape[1], "width of `image`")
    return image, text


def _check_ids(image: Tensor, text: Tensor, image_ids: object, text_ids: object) -> tuple[Tensor, Tensor]:
    first = _checks.check_ids("image_ids", image_ids, image.shape[0], "image", image)
    if text_ids is None:
        if text.shape[0] != image.shape[0]:
            raise ValueError(
                f"`text_ids` is needed where the {text.shape[0]} rows of `text` are not paired with the "
                f"{image.shape[0]} rows of `image`"
            )
        return first, first
    return first, _checks.check_ids("text_ids", text_ids, text.shape[0], "text", text)


def _check_finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    if not abs(value) < float("inf"):
        raise ValueError(f"`{name}` must be finite, got {value}")
    return float(value)


def _whole_batch(
    group: ProcessGroup | None, image: Tensor, text: Tensor, image_ids: Tensor | None, text_ids: Tensor | None
) -> tuple[Tensor, Tensor, Any, Any]:
    """The features and ids of all ranks of a group, for a backend without passes; without a group what came."""
    if group is None:
        return image, text, image_ids, text_ids
    named = {"image": image, "text": text, "image_ids": image_ids, "text_ids": text_ids}
    # The same ids twice travel once.
    shared = image_ids is text_ids
    if shared:
        del named["text_ids"]
    gathered = _distributed.gather(group, named)
    return gathered[0], gathered[1], gathered[2], gathered[2 if shared else 3]


class _ReferencePasses:
    """The reference's passes under the operators' signatures."""

    @staticmethod
    def similarity_statistics(*args: Any) -> tuple[Tensor, Tensor]:
        return reference.similarity_statistics(*args[:7])

    @staticmethod
    def similarity_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return reference.similarity_gradients(*args[:9])


def _passes(backend: str, dtype: torch.dtype) -> tuple[Any, float] | None:
    """The namespace with the two passes for `backend` and the unit in which they count logits; None: it has none."""
    chosen = _backend.with_passes("similarity_statistics", backend, dtype)
    if chosen is None:
        return None
    passes = _ReferencePasses if chosen == "reference" else _operators(chosen)
    return passes, math.log(2) if chosen == "triton" else 1.0


def _constant(value: float, image: Tensor, text: Tensor) -> Tensor:
    return torch.full((), value, dtype=_statistics(image, text), device=image.device)


def _group_loss(
    group: ProcessGroup,
    passes: tuple[Any, float],
    loss: int,
    image: Tensor,
    text: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    logit_scale: Tensor,
    *,
    eps: float = 1.0,
    l2_target: bool = False,
    margin: float = 0.0,
    tau: float = 1.0,
) -> Tensor:
    """A loss over the rows of all ranks, each of which works on its images' rows of the matrix alone."""
    needs = _registration.needs_grad(image, text, logit_scale)
    workspace = _workspace.workspace_bytes(image.device)
    tensors = {"image": image, "text": text, "image_ids": image_ids, "text_ids": text_ids}
    _distributed.check_agreement(
        group,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        gradients_needed=sum(need << bit for bit, need in enumerate(needs)),
        workspace_limit=workspace,
    )
    if image_ids is None or text_ids is None:
        image_ids = text_ids = _distributed.global_ids(group, image)
    ranks = group.size()
    with torch.no_grad():
        result, gradients = _group_loss_and_gradients(
            group,
            *passes,
            loss,
            (image.detach(), text.detach(), image_ids, text_ids, logit_scale.detach()),
            needs,
            workspace,
            (ranks * image.shape[0], ranks * text.shape[0]),
            {"eps": eps, "l2_target": l2_target, "margin": margin, "tau": tau},
        )
    return _distributed.computed(_NAMES[loss], result, (image, text, logit_scale), gradients)


def _group_loss_and_gradients(
    group: ProcessGroup,
    passes: Any,
    unit: float,
    loss: int,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    needs: Sequence[bool],
    workspace: int,
    sizes: tuple[int, int],
    options: dict[str, Any],
) -> tuple[Tensor, list[Tensor | None]]:
    image, text, image_ids, text_ids, scale = tensors
    dtype = _statistics(image, text)
    tau = options["tau"]
    merge = functools.partial(reference.merge_statistics, loss=loss, unit=unit)
    block: Sequence[Tensor] = (text, text_ids)
    ring = _distributed.travels_in_ring(group, block, _gradient(text, dtype, True) if needs[1] else None, workspace)
    block = _distributed.spread(group, ring, block)
    of_images: list[Tensor] = []

    def statistics(block: Sequence[Tensor]) -> Tensor:
        rows, columns = passes.similarity_statistics(image, block[0], image_ids, block[1], scale, loss, tau, workspace)
        of_images.append(rows.T)
        return columns.T

    of_texts = _distributed.pass_over(group, ring, block, (), statistics, merge)
    finished = [
        reference.finish_statistics(side, entries, loss, unit, **options)
        for side, entries in ((functools.reduce(merge, of_images), sizes[1]), (of_texts, sizes[0]))
    ]
    # Losses and numbers of rows with a positive, of images and of texts.
    totals = _distributed.total(group, torch.stack([number for side in finished for number in side[:2]])).view(2, 2)
    if loss == reference.INFO_NCE:
        weights = 0.5 / totals[:, 1].clamp(min=1)
    elif loss == reference.TAL:
        weights = torch.ones_like(totals[:, 1])
    else:
        weights = torch.stack([torch.full_like(totals[0, 1], 1 / size) for size in sizes])
    value = (weights * totals[:, 0]).sum().to(dtype)
    if not any(needs):
        return value, [None, None, None]

    coefficients = [
        reference.weigh(side[2], weight, loss).to(dtype) for side, weight in zip(finished, weights, strict=True)
    ]
    of_image: list[Tensor] = []
    of_scale: list[Tensor] = []

    def gradients(block: Sequence[Tensor]) -> Tensor | None:
        text, text_ids, of_texts = block
        found = passes.similarity_gradients(
            image,
            text,
            image_ids,
            text_ids,
            scale,
            coefficients[0].T.contiguous(),
            of_texts.T.contiguous(),
            loss,
            tau,
            workspace,
            *needs,
        )
        if needs[0]:
            of_image[:] = [of_image[0].add_(found[0]) if of_image else found[0]]
        if needs[2]:
            of_scale.append(found[2].double())
        return found[1] if needs[1] else None

    of_text = _distributed.pass_over(group, ring, block, (coefficients[1],), gradients, torch.add)
    scale_gradient = None
    if needs[2]:
        # Each rank holds the scale: it keeps an equal part of the whole gradient.
        whole = _distributed.total(group, functools.reduce(torch.add, of_scale).reshape(1))
        scale_gradient = (whole / group.size()).reshape(()).to(dtype)
    return value, [of_image[0] if needs[0] else None, of_text, scale_gradient]


_NAMES = ("info_nce", "sdm", "cmpm", "tal")


def _statistics(image: Tensor, text: Tensor) -> torch.dtype:
    return _checks.statistics_dtype(torch.promote_types(image.dtype, text.dtype))


def info_nce_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    *,
    logit_scale: Tensor | float,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Symmetric InfoNCE: softmax cross entropy of scaled cosines, mean over rows of each direction, the two averaged.

    With s_ij = logit_scale * cos(image_i, text_j) a row's loss is logsumexp_j s_ij - mean of s_ij over its positives:
    the diagonal without ids, all columns of the same identity with ids. A row without a positive is left out and each
    direction averages over its own remaining rows (0 where none remains).

    Args:
        image: (B, d) float32, float64, bfloat16 or float16 features, normalised inside; B and d at least 1.
        text: (N, d), dtype and device of `image` (under autocast the dtypes may differ: the wider one is taken).
        image_ids: (B,) int32 or int64 identities. None: B = N and the diagonal.
        text_ids: (N,) int32 or int64 identities. None: `image_ids`, with B = N.
        logit_scale: 1 / temperature, a number above 0 or a one-element tensor, which may need a gradient and is not
            read on the host.
        backend: see :func:`lcr2s_ext.ops.use_backend`.
        group: ranks of which each holds rows of one larger batch, as many on each; the loss is that of the whole
            batch, the same on all ranks, and gradients summed over the ranks are those of one process on the whole
            batch. DistributedDataParallel averages: multiply the loss by the number of ranks there.

    Returns:
        () float32, or float64 for float64 features. A zero row has cosine 0 and gradient 0; NaN in gives NaN out.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or range; the message names it.
        BackendUnavailableError: the backend cannot run here.

    References:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748, eq. 4;
        symmetric over images and texts as in Radford et al. (CLIP), arXiv 2103.00020.
    """
    image, text = _check_features(image, text)
    if image_ids is None:
        if text_ids is not None:
            raise ValueError("`image_ids` must be given where `text_ids` is")
        _checks.check_size("text", text, 0, image.shape[0], "rows of `image`: without ids, row i belongs to row i")
    else:
        image_ids, text_ids = _check_ids(image, text, image_ids, text_ids)
    scale = _checks.check_scale("logit_scale", logit_scale, image.device, _statistics(image, text))
    chosen = _backend.resolve("info_nce", backend, image.device, image.shape[0])
    _checks.check_backend_dtype(chosen, image=image, text=text)
    group = _distributed.check_group(group)
    if group is not None and (passes := _passes(chosen, _statistics(image, text))) is not None:
        return _group_loss(group, passes, reference.INFO_NCE, image, text, image_ids, text_ids, scale)
    image, text, image_ids, text_ids = _whole_batch(group, image, text, image_ids, text_ids)
    scale = _distributed.share(group, scale)
    if chosen == "reference":
        return reference.info_nce_loss(image, text, image_ids, text_ids, scale)
    needs = _registration.needs_grad(image, text, scale)
    workspace = _workspace.workspace_bytes(image.device)
    return _operators(chosen).info_nce(image, text, image_ids, text_ids, scale, workspace, *needs)[0]


def sdm_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    logit_scale: Tensor | float = 50.0,
    eps: float = 1e-8,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Similarity distribution matching: KL of the softmax over cosines from the identities' distribution.

    P_i = softmax_j(logit_scale * cos(image_i, text_j)), Q_ij = [same identity] / (number of row i's positives), row
    loss sum_j P_ij (log P_ij - log(Q_ij + eps)); mean over the rows of each direction, the two directions summed. A row
    without a positive keeps Q_i = 0.

    Args:
        image: (B, d) float32, float64, bfloat16 or float16 features, normalised inside; B and d at least 1.
        text: (N, d), dtype and device of `image` (under autocast the dtypes may differ: the wider one is taken).
        image_ids: (B,) int32 or int64 identities.
        text_ids: (N,) int32 or int64 identities. None: `image_ids`, with B = N.
        logit_scale: 1 / temperature, a number above 0 or a one-element tensor, which may need a gradient and is not
            read on the host.
        eps: added to Q inside the logarithm, above 0.
        backend: see :func:`lcr2s_ext.ops.use_backend`.
        group: ranks of which each holds rows of one larger batch, as many on each; the loss is that of the whole
            batch, the same on all ranks, and gradients summed over the ranks are those of one process on the whole
            batch. DistributedDataParallel averages: multiply the loss by the number of ranks there.

    Returns:
        () float32, or float64 for float64 features. A zero row has cosine 0 and gradient 0; NaN in gives NaN out.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or range; the message names it.
        BackendUnavailableError: the backend cannot run here.

    References:
        Jiang, Ye, "Cross-Modal Implicit Relation Reasoning and Aligning for Text-to-Image Person Retrieval" (IRRA),
        CVPR 2023, arXiv 2303.12501 (the SDM loss).
    """
    image, text = _check_features(image, text)
    image_ids, text_ids = _check_ids(image, text, image_ids, text_ids)
    scale = _checks.check_scale("logit_scale", logit_scale, image.device, _statistics(image, text))
    eps = _checks.check_positive("eps", eps)
    chosen = _backend.resolve("sdm", backend, image.device, image.shape[0])
    _checks.check_backend_dtype(chosen, image=image, text=text)
    group = _distributed.check_group(group)
    if group is not None and (passes := _passes(chosen, _statistics(image, text))) is not None:
        return _group_loss(group, passes, reference.SDM, image, text, image_ids, text_ids, scale, eps=eps)
    image, text, image_ids, text_ids = _whole_batch(group, image, text, image_ids, text_ids)
    scale = _distributed.share(group, scale)
    if chosen == "reference":
        return reference.sdm_loss(image, text, image_ids, text_ids, scale, eps)
    needs = _registration.needs_grad(image, text, scale)
    workspace = _workspace.workspace_bytes(image.device)
    return _operators(chosen).sdm(image, text, image_ids, text_ids, scale, eps, workspace, *needs)[0]


def cmpm_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    target: str = "l2",
    eps: float = 1e-8,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Cross-modal projection matching: like SDM, with the scalar projection onto the other modality as logit.

    P_i = softmax_j(image_i . text_j / |text_j|): only the other side is normalised. Row loss
    sum_j P_ij (log P_ij - log(Q_ij + eps)); mean over the rows of each direction, the two directions summed. A row
    without a positive keeps Q_i = 0.

    Args:
        image: (B, d) float32, float64, bfloat16 or float16 features; B and d at least 1.
        text: (N, d), dtype and device of `image` (under autocast the dtypes may differ: the wider one is taken).
        image_ids: (B,) int32 or int64 identities.
        text_ids: (N,) int32 or int64 identities. None: `image_ids`, with B = N.
        target: "l2", as published: Q_i = y_i / |y_i|_2 for the 0/1 row y_i of same identities; "sum": y_i / sum y_i.
        eps: added to Q inside the logarithm, above 0.
        backend: see :func:`lcr2s_ext.ops.use_backend`.
        group: ranks of which each holds rows of one larger batch, as many on each; the loss is that of the whole
            batch, the same on all ranks, and gradients summed over the ranks are those of one process on the whole
            batch. DistributedDataParallel averages: multiply the loss by the number of ranks there.

    Returns:
        () float32, or float64 for float64 features. A zero row has logits 0 and gradient 0; NaN in gives NaN out.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or range; the message names it.
        BackendUnavailableError: the backend cannot run here.

    References:
        Zhang, Lu, "Deep Cross-Modal Projection Learning for Image-Text Matching", ECCV 2018 (the CMPM loss).
    """
    image, text = _check_features(image, text)
    image_ids, text_ids = _check_ids(image, text, image_ids, text_ids)
    target = _checks.check_choice("target", target, ("l2", "sum"))
    eps = _checks.check_positive("eps", eps)
    chosen = _backend.resolve("cmpm", backend, image.device, image.shape[0])
    _checks.check_backend_dtype(chosen, image=image, text=text)
    group = _distributed.check_group(group)
    if group is not None and (passes := _passes(chosen, _statistics(image, text))) is not None:
        return _group_loss(
            group,
            passes,
            reference.CMPM,
            image,
            text,
            image_ids,
            text_ids,
            _constant(1.0, image, text),
            eps=eps,
            l2_target=target == "l2",
        )
    image, text, image_ids, text_ids = _whole_batch(group, image, text, image_ids, text_ids)
    if chosen == "reference":
        return reference.cmpm_loss(image, text, image_ids, text_ids, target, eps)
    needs = _registration.needs_grad(image, text)
    workspace = _workspace.workspace_bytes(image.device)
    return _operators(chosen).cmpm(image, text, image_ids, text_ids, target == "l2", eps, workspace, *needs)[0]


def tal_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    margin: float = 0.1,
    tau: float = 0.015,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Triplet alignment loss: a hinge between the softly averaged positives and the log-sum-exp of all negatives.

    Row loss [margin - sum_j a_ij s_ij + tau log sum_{j negative} exp(s_ij / tau)]_+ with s_ij = cos(image_i, text_j)
    and a_i = softmax(s_i / tau) over the positives, through which no gradient flows. Summed over the rows of both
    directions. A row without a positive or without a negative gives 0.

    Args:
        image: (B, d) float32, float64, bfloat16 or float16 features, normalised inside; B and d at least 1.
        text: (N, d), dtype and device of `image` (under autocast the dtypes may differ: the wider one is taken).
        image_ids: (B,) int32 or int64 identities.
        text_ids: (N,) int32 or int64 identities. None: `image_ids`, with B = N.
        margin: finite.
        tau: temperature, above 0.
        backend: see :func:`lcr2s_ext.ops.use_backend`.
        group: ranks of which each holds rows of one larger batch, as many on each; the loss is that of the whole
            batch, the same on all ranks, and gradients summed over the ranks are those of one process on the whole
            batch. DistributedDataParallel averages: multiply the loss by the number of ranks there.

    Returns:
        () float32, or float64 for float64 features. A zero row has cosine 0 and gradient 0; NaN in gives NaN out.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or range; the message names it.
        BackendUnavailableError: the backend cannot run here.

    References:
        Qin et al., "Noisy-Correspondence Learning for Text-to-Image Person Re-identification" (RDE), CVPR 2024,
        arXiv 2308.09911 (the TAL loss).
    """
    image, text = _check_features(image, text)
    image_ids, text_ids = _check_ids(image, text, image_ids, text_ids)
    margin = _check_finite("margin", margin)
    tau = _checks.check_positive("tau", tau)
    chosen = _backend.resolve("tal", backend, image.device, image.shape[0])
    _checks.check_backend_dtype(chosen, image=image, text=text)
    group = _distributed.check_group(group)
    if group is not None and (passes := _passes(chosen, _statistics(image, text))) is not None:
        return _group_loss(
            group,
            passes,
            reference.TAL,
            image,
            text,
            image_ids,
            text_ids,
            _constant(1.0, image, text),
            margin=margin,
            tau=tau,
        )
    image, text, image_ids, text_ids = _whole_batch(group, image, text, image_ids, text_ids)
    if chosen == "reference":
        return reference.tal_loss(image, text, image_ids, text_ids, margin, tau)
    needs = _registration.needs_grad(image, text)
    workspace = _workspace.workspace_bytes(image.device)
    return _operators(chosen).tal(image, text, image_ids, text_ids, margin, tau, workspace, *needs)[0]


def _gradient(like: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
    return like.new_empty(like.shape if needed else (0,), dtype=dtype)


def _fake_loss(image: Tensor, text: Tensor, need_image: bool, need_text: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _statistics(image, text)
    loss = image.new_empty((), dtype=dtype)
    return loss, _gradient(image, dtype, need_image), _gradient(text, dtype, need_text)


def _fake_info_nce(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    logit_scale: Tensor,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, of_image, of_text = _fake_loss(image, text, need_image, need_text)
    return loss, of_image, of_text, _gradient(logit_scale, loss.dtype, need_scale)


def _fake_sdm(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    eps: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, of_image, of_text = _fake_loss(image, text, need_image, need_text)
    return loss, of_image, of_text, _gradient(logit_scale, loss.dtype, need_scale)


def _fake_cmpm(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    l2_target: bool,
    eps: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_loss(image, text, need_image, need_text)


def _fake_tal(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    margin: float,
    tau: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_loss(image, text, need_image, need_text)


def _fake_statistics(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    loss: int,
    tau: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    dtype = _statistics(image, text)
    fields = reference.FIELDS[loss]
    return image.new_empty((fields, image.shape[0]), dtype=dtype), text.new_empty((fields, text.shape[0]), dtype=dtype)


def _fake_gradients(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    image_coefficients: Tensor,
    text_coefficients: Tensor,
    loss: int,
    tau: float,
    workspace_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _statistics(image, text)
    return (
        _gradient(image, dtype, need_image),
        _gradient(text, dtype, need_text),
        _gradient(logit_scale, dtype, need_scale),
    )


# No autocast rule: the kernels take every dtype as it is and keep their statistics in float32.
def _register(namespace: str) -> None:
    for op, fake, differentiable in (
        ("info_nce", _fake_info_nce, (0, 1, 4)),
        ("sdm", _fake_sdm, (0, 1, 4)),
        ("cmpm", _fake_cmpm, (0, 1)),
        ("tal", _fake_tal, (0, 1)),
    ):
        torch.library.register_fake(f"{namespace}::{op}", fake)
        _registration.register_scalar_loss(namespace, op, differentiable)
    _registration.register_pass(namespace, "similarity_statistics", _fake_statistics)
    _registration.register_pass(namespace, "similarity_gradients", _fake_gradients)


_operators = _registration.Operators("similarity", _register)
