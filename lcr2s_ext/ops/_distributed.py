"""Losses over the batch of a whole process group.

A rank has the rows of its images in the matrix of cosines and works on all their columns, the texts, in two passes:
statistics of rows and columns, then gradients. What a pass gives for the texts of another rank goes to that rank. The
texts are gathered, or travel around the ring of ranks where that would take too much memory (:func:`pass_over`). All of
it happens in the forward; the backward has no communication. Backends without these passes gather both sides and run
the fused operator on the whole batch, every rank the same. The Frobenius loss is cheaper: only d x d matrices travel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcr2s_ext.ops import _registration
from lcr2s_ext.reference.similarity import _unit


def check_group(group: object) -> dist.ProcessGroup | None:
    """The process group, which this process belongs to; None where it has no other.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not part of it.
    """
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"`group` must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}; "
            "torch.distributed.group.WORLD is the group of all processes"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("`group` must be one that this process belongs to")
    return None if dist.get_world_size(group) == 1 else group


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in order of the ranks; the gradient is this rank's part of that of all rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.first = dist.get_rank(group) * rows.shape[0]
        ctx.rows = rows.shape[0]
        return all_gather(group, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.first : ctx.first + ctx.rows], None


class _Share(torch.autograd.Function):
    """A parameter that every rank holds: each rank has the whole gradient and keeps an equal part of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; each rank adds to it what its own rows give, so the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        result = value.clone()
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def check_agreement(group: dist.ProcessGroup, tensors: Mapping[str, Tensor], **settings: int) -> None:
    """On the CPU, that the ranks agree; on a GPU it would make the host wait.

    Raises:
        ValueError: a tensor's shape or dtype, or one of the settings, is not the same on all ranks.
    """
    if next(iter(tensors.values())).device.type != "cpu":
        return
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64]
    mine = [number for t in tensors.values() for number in (t.shape[0], t.shape[-1], dtypes.index(t.dtype))]
    everyone = all_gather(group, torch.tensor([[*mine, *settings.values()]])).tolist()
    for position, (name, tensor) in enumerate(tensors.items()):
        found = [row[3 * position : 3 * position + 3] for row in everyone]
        if any(entry != found[0] for entry in found):
            sizes = [tuple(entry[: tensor.dim()]) for entry in found]
            kinds = sorted({str(dtypes[entry[2]]).removeprefix("torch.") for entry in found})
            raise ValueError(
                f"`{name}` must have one shape and dtype on all ranks of `group`, got shapes {sizes} and "
                f"{', '.join(kinds)}"
            )
    for position, name in enumerate(settings):
        values = [row[3 * len(tensors) + position] for row in everyone]
        if len(set(values)) > 1:
            raise ValueError(f"{name.replace('_', ' ')} must be the same on all ranks of `group`, got {values}")


# Since torch 2.13 under another name.
_gather_rows: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_gather(group: dist.ProcessGroup, rows: Tensor) -> Tensor:
    """The rows of all ranks, equally many on each, in order of the ranks; without gradient."""
    result = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
    _gather_rows(result, rows.contiguous(), group=group)
    return result


def total(group: dist.ProcessGroup, numbers: Tensor) -> Tensor:
    """The sum of a small vector over the ranks, in their order: the same bits on every rank."""
    first, *others = all_gather(group, numbers[None]).unbind(0)
    return sum(others, first)


def global_ids(group: dist.ProcessGroup, rows: Tensor) -> Tensor:
    """The number in the whole batch of each of this rank's rows."""
    first = dist.get_rank(group) * rows.shape[0]
    return torch.arange(first, first + rows.shape[0], device=rows.device)


def travels_in_ring(group: dist.ProcessGroup, block: Sequence[Tensor], gradient: Tensor | None, limit: int) -> bool:
    """Whether the blocks travel: where all of them, with their gradients before and after these have gone to their
    ranks, take more than `limit` bytes.

    Args:
        group: the ranks.
        block: tensors that every rank has to have, this rank's part.
        gradient: one as large as the gradient of this rank's part, if it is needed.
        limit: the workspace limit.
    """
    held = sum(tensor.nbytes for tensor in block) + (0 if gradient is None else 2 * gradient.nbytes)
    return dist.get_world_size(group) * held > limit


def _send_on(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start sending to the next rank and receiving as much from the one before; call the result to wait for it."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    transfers = []
    for there, here in zip(sent, received, strict=True):
        transfers.append(dist.P2POp(dist.isend, there, group=group, group_peer=(rank + 1) % ranks))
        transfers.append(dist.P2POp(dist.irecv, here, group=group, group_peer=(rank - 1) % ranks))
    works = dist.batch_isend_irecv(transfers)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()
        return received

    return wait


def spread(group: dist.ProcessGroup, ring: bool, block: Sequence[Tensor]) -> Sequence[Tensor]:
    """What :func:`pass_over` takes, pass after pass: this rank's tensors, or those of all ranks gathered."""
    return block if ring else [all_gather(group, tensor) for tensor in block]


def pass_over(
    group: dist.ProcessGroup,
    ring: bool,
    block: Sequence[Tensor],
    extra: Sequence[Tensor],
    work: Callable[[Sequence[Tensor]], Tensor | None],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Give `work` the blocks of all ranks, and each rank what all ranks' `work` gave for the block of its own.

    Args:
        group: the ranks, which all call this alike.
        ring: False: the blocks are gathered and `work` is called once with all rows; its result, the size of all
            blocks, is cut into those of the ranks. True: `work` is called for one rank's block after the other, while
            the next one arrives; results travel with their block and are complete when it comes home.
        block: of :func:`spread`, rows first.
        extra: this rank's tensors that this pass needs besides.
        work: from the tensors' rows to a tensor of as many rows, or on all ranks None.
        combine: of two ranks' results for the same rows.

    Returns:
        The combined result for this rank's rows, in an order that depends on the rank alone; None where there is none.
    """
    rank_count = dist.get_world_size(group)
    if not ring:
        result = work([*block, *spread(group, ring, extra)])
        if result is None:
            return None
        result = result.contiguous()
        parts = torch.empty_like(result)
        dist.all_to_all_single(parts, result, group=group)
        del result
        combined, *others = parts.chunk(rank_count)
        for other in others:
            combined = combine(combined, other)
        return combined
    block = [*block, *extra]
    coming: Callable[[], list[Tensor]] | None = None
    for step in range(rank_count):
        arriving = _send_on(group, block) if step + 1 < rank_count else None
        found = work(block)
        if found is not None:
            if coming is not None:
                found = combine(coming()[0], found)
            coming = _send_on(group, [found])
        if arriving is not None:
            block = arriving()
    return None if coming is None else coming()[0]


class _Computed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, name: str, loss: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.name = name
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            # Scaled in the statistics dtype: a half gradient would underflow before a GradScaler acts.
            None
            if gradient is None
            else _registration.refuse_differentiation(ctx.name, (gradient * grads[0]).to(dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, None, *scaled)


def computed(name: str, loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """`loss`, with its gradient with respect to each input; None where none is needed."""
    return _Computed.apply(name, loss, gradients, *inputs)


def gather(group: dist.ProcessGroup, tensors: Mapping[str, Tensor | None]) -> list[Any]:
    """Each tensor's rows of all ranks, in order of the ranks; None stays None.

    Raises:
        ValueError: the ranks' shapes or dtypes differ (found on the CPU only).
    """
    check_agreement(group, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return [None if tensor is None else _Gather.apply(tensor, group) for tensor in tensors.values()]


def share(group: dist.ProcessGroup | None, parameter: Tensor) -> Tensor:
    """The parameter, its gradient divided by the number of ranks: summed over them it is whole."""
    if group is None:
        return parameter
    return _Share.apply(parameter, dist.get_world_size(group))


def frobenius(group: dist.ProcessGroup, features: tuple[Tensor, Tensor, Tensor, Tensor], reduction: str) -> Tensor:
    """The Frobenius relation loss from Gram matrices, summed over the ranks.

    With the unit rows V, T of the student and E, F of the teacher, D = V - E and G = T - F where the widths agree:
    |R_s - R_t|^2 = tr(D'D T'T) + 2 tr(D'E G'T) + tr(E'E G'G); otherwise tr(V'V T'T) - 2 tr(V'E F'T) + tr(E'E F'F).
    """
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in features) else torch.float32
    with torch.autocast(features[0].device.type, enabled=False):
        v, t, e, f = (_unit(tensor)[0].to(dtype) for tensor in features)
        if v.shape[1] == e.shape[1]:
            d, g = v - e, t - f
            pairs = [(d, d), (t, t), (d, e), (t, g), (e, e), (g, g)]
            signs = (1.0, 2.0, 1.0)
        else:
            pairs = [(v, v), (t, t), (v, e), (t, f), (e, e), (f, f)]
            signs = (1.0, -2.0, 1.0)
        counts = torch.tensor([v.shape[0], t.shape[0]], dtype=dtype).to(v.device, non_blocking=True)
        products = [a.T @ b for a, b in pairs]
        # One message.
        packed = _Sum.apply(torch.cat([*(product.flatten() for product in products), counts]), group)
        *parts, rows, columns = packed.split([*(product.numel() for product in products), 1, 1])
        grams = [part.view(product.shape) for part, product in zip(parts, products, strict=True)]
        total = sum(sign * (grams[2 * i] * grams[2 * i + 1]).sum() for i, sign in enumerate(signs))
        if reduction == "sum":
            return total
        return total / (rows if reduction == "row" else rows * columns).reshape(())
