"""Losses over the batch of a whole process group.

Every rank gathers the group's features (O(B d) memory and communication, never B x B) and runs the fused operator on
the whole batch; a rank's gradient is that of one process on the whole batch, cut to its own rows, and needs no
communication. The arithmetic is done on every rank again. The Frobenius loss is cheaper: only d x d matrices travel.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcr2s_ext.reference.similarity import _unit


def check_group(group: object) -> dist.ProcessGroup:
    """The process group, which this process belongs to.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not part of it.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"`group` must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}; "
            "torch.distributed.group.WORLD is the group of all processes"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("`group` must be one that this process belongs to")
    return group


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in order of the ranks; the gradient is this rank's part of that of all rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.first = dist.get_rank(group) * rows.shape[0]
        ctx.rows = rows.shape[0]
        result = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(result, rows.contiguous(), group=group)
        return result

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


def _check_sizes(group: dist.ProcessGroup, tensors: list[tuple[str, Tensor]]) -> None:
    """On the CPU, that the ranks agree; on a GPU it would make the host wait."""
    device = tensors[0][1].device
    if device.type != "cpu":
        return
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64]
    mine = torch.tensor([[t.shape[0], t.shape[-1], dtypes.index(t.dtype)] for _, t in tensors])
    everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())
    dist.all_gather_into_tensor(everyone, mine.flatten(), group=group)
    everyone = everyone.view(-1, *mine.shape)
    for position, (name, tensor) in enumerate(tensors):
        if not bool((everyone[:, position] == mine[position]).all()):
            sizes = [tuple(row[: tensor.dim()]) for row in everyone[:, position].tolist()]
            kinds = sorted({str(dtypes[row[2]]).removeprefix("torch.") for row in everyone[:, position].tolist()})
            raise ValueError(
                f"`{name}` must have one shape and dtype on all ranks of `group`, got shapes {sizes} and "
                f"{', '.join(kinds)}"
            )


def gather(group: dist.ProcessGroup, tensors: Mapping[str, Tensor | None]) -> list[Any]:
    """Each tensor's rows of all ranks, in order of the ranks; None stays None.

    Raises:
        ValueError: the ranks' shapes or dtypes differ (found on the CPU only).
    """
    _check_sizes(group, [(name, tensor) for name, tensor in tensors.items() if tensor is not None])
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
