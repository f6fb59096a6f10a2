"""One rank of test_distributed.py: python distributed_worker.py RANK RANKS FILE."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lcr2s_ext import ops
from lcr2s_ext.ops import _workspace

ROWS, COLUMNS, WIDTH, TEACHER = 24, 24, 10, 13


def cases() -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """name -> (loss(image, text, scale, ids, teacher_image, teacher_text, **group), whether it has a scale)."""

    # More texts than images, and identities without a positive on one side or the other.
    def more(text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([text, text.flip(1)]), torch.cat([ids, ids + 4])

    found: dict[str, tuple[Callable[..., Tensor], bool]] = {
        "info_nce diagonal": (lambda v, t, s, i, e, f, **o: ops.info_nce_loss(v, t, logit_scale=s, **o), True),
        "info_nce": (lambda v, t, s, i, e, f, **o: ops.info_nce_loss(v, t, i, logit_scale=s, **o), True),
        "sdm": (lambda v, t, s, i, e, f, **o: ops.sdm_loss(v, t, i, i + 0, logit_scale=s, **o), True),
        "cmpm": (lambda v, t, s, i, e, f, **o: ops.cmpm_loss(v, t, i, **o), False),
        "tal": (lambda v, t, s, i, e, f, **o: ops.tal_loss(v, t, i, **o), False),
        "kl": (
            lambda v, t, s, i, e, f, **o: ops.relation_kl_loss(v, t, e, f, student_scale=s, teacher_scale=20.0, **o),
            True,
        ),
        "frobenius, other width": (lambda v, t, s, i, e, f, **o: ops.relation_frobenius_loss(v, t, e, f, **o), False),
    }
    for name, loss in (("cmpm", ops.cmpm_loss), ("tal", ops.tal_loss)):
        found[f"{name}, other texts"] = (
            lambda v, t, s, i, e, f, loss=loss, **o: loss(v, more(t, i)[0], i, more(t, i)[1], **o),
            False,
        )
    for name, scaled_loss in (("info_nce", ops.info_nce_loss), ("sdm", ops.sdm_loss)):
        found[f"{name}, other texts"] = (
            lambda v, t, s, i, e, f, loss=scaled_loss, **o: loss(
                v, more(t, i)[0], i + 2, more(t, i)[1], logit_scale=s, **o
            ),
            True,
        )
    for reduction in ("sum", "row", "mean"):
        found[f"frobenius {reduction}"] = (
            lambda v, t, s, i, e, f, reduction=reduction, **o: ops.relation_frobenius_loss(
                v, t, e[:, :WIDTH], f[:, :WIDTH], reduction=reduction, **o
            ),
            False,
        )
    return found


def problem(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (ROWS, COLUMNS))
    teacher = [torch.randn(n, TEACHER, generator=generator, dtype=torch.float64) for n in (ROWS, COLUMNS)]
    ids = torch.randint(0, 7, (ROWS,), generator=generator)
    return [image.to(dtype), text.to(dtype), torch.tensor(12.0, dtype=dtype), ids, *(x.to(dtype) for x in teacher)]


def value_and_gradients(loss: Callable[..., Tensor], tensors: list[Any], scaled: bool, **options: Any) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    value = loss(*leaves, *tensors[3:], **options)
    wanted = leaves if scaled else leaves[:2]
    return [value.detach(), *torch.autograd.grad(value, wanted)]


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not error <= tolerance:
        raise SystemExit(f"{what}: off by {error:.1e}")


def compare_losses(rank: int, ranks: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        whole = problem(dtype)
        size = ROWS // ranks
        own = [x[rank * size : (rank + 1) * size] if x.dim() else x for x in whole]
        for name, (loss, scaled) in cases().items():
            # In float32 both are compared with the whole batch in float64: each has rounding of its own.
            exact = value_and_gradients(loss, [x.double() if x.is_floating_point() else x for x in whole], scaled)
            found = value_and_gradients(loss, own, scaled, group=dist.group.WORLD)
            for part, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
                expected = theirs[rank * size : (rank + 1) * size] if theirs.dim() else theirs
                if part == 3:  # each rank keeps an equal part of the scale's gradient
                    dist.all_reduce(ours)
                close(ours.double(), expected, f"{name} {dtype} result {part}", tolerance)


def compare_forms(rank: int, ranks: int) -> None:
    """Texts gathered and around the ring, on the kernels and, of two ranks, in plain PyTorch."""
    for backend in ("auto", "reference") if ranks == 2 else ("auto",):
        for mebibytes in (64, 0):
            # Below what can be set: nothing fits, and so the texts travel.
            _workspace._State.mebibytes["cpu"] = mebibytes
            with ops.use_backend(backend):
                compare_losses(rank, ranks)
                compare_edges(rank)
    ops.set_workspace_limit(None)


def compare_edges(rank: int) -> None:
    """One NaN anywhere is NaN everywhere; nothing is needed; half features; gradients of one side only."""
    generator = torch.Generator().manual_seed(3 + rank)
    image, text = torch.randn(2, 6, WIDTH, generator=generator)
    ids = torch.arange(6) % 4 + rank
    options: dict[str, Any] = {"group": dist.group.WORLD}
    losses: dict[str, Callable[..., Tensor]] = {
        "info_nce": lambda v, t: ops.info_nce_loss(v, t, ids, logit_scale=9.0, **options),
        "sdm": lambda v, t: ops.sdm_loss(v, t, ids, **options),
        "cmpm": lambda v, t: ops.cmpm_loss(v, t, ids, **options),
        "tal": lambda v, t: ops.tal_loss(v, t, ids, **options),
        "kl": lambda v, t: ops.relation_kl_loss(v, t, t, v, student_scale=5.0, teacher_scale=4.0, **options),
    }
    for name, loss in losses.items():
        both = value_and_gradients(lambda v, t, _, loss=loss: loss(v, t), [image, text, torch.ones(())], False)
        leaf = text.clone().requires_grad_()
        (of_text,) = torch.autograd.grad(loss(image, leaf), [leaf])
        if not torch.equal(of_text, both[2]):
            raise SystemExit(f"{name}: another gradient where only that of the texts is needed")
        with torch.no_grad():
            close(loss(image, text), both[0], f"{name} without gradients", 1e-6)
        broken = image.clone()
        if rank == 0:
            broken[2, 1] = float("nan")
        if not bool(loss(broken, text).isnan()):
            raise SystemExit(f"{name}: a NaN of rank 0 is lost on rank {rank}")
        half = image.bfloat16().requires_grad_()
        value = loss(half, text.bfloat16())
        (of_half,) = torch.autograd.grad(value, [half])
        exact = image.bfloat16().float().requires_grad_()
        (of_exact,) = torch.autograd.grad(loss(exact, text.bfloat16().float()), [exact])
        close(of_half.float(), of_exact, f"{name} of bfloat16 features", 0.01)


def compare_alone(rank: int, ranks: int) -> None:
    """A group of one process is the plain call."""
    alone = [dist.new_group([member]) for member in range(ranks)][rank]
    whole = problem(torch.float32)
    for name, (loss, scaled) in cases().items():
        if "frobenius" in name:
            continue
        found = value_and_gradients(loss, whole, scaled, group=alone)
        for ours, theirs in zip(found, value_and_gradients(loss, whole, scaled), strict=True):
            if not torch.equal(ours, theirs):
                raise SystemExit(f"{name}: a group of one process changes the result")


def compare_parallel(rank: int, ranks: int) -> None:
    """A model under DistributedDataParallel, its loss times the number of ranks: the whole batch's gradients."""
    whole = problem(torch.float64)
    size = ROWS // ranks
    rows = slice(rank * size, (rank + 1) * size)
    torch.manual_seed(1)
    model = nn.Linear(WIDTH, 6, dtype=torch.float64)
    plain = nn.Linear(WIDTH, 6, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    ops.sdm_loss(plain(whole[0]), plain(whole[1]), whole[3]).backward()
    parallel = DistributedDataParallel(model)
    image, text = parallel(torch.cat([whole[0][rows], whole[1][rows]])).chunk(2)
    (ranks * ops.sdm_loss(image, text, whole[3][rows], group=dist.group.WORLD)).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad, "DistributedDataParallel", 1e-12)  # type: ignore[arg-type]


def compare_refusals(rank: int) -> None:
    rows = 3 if rank == 0 else 4
    features = torch.randn(rows, WIDTH)
    try:
        ops.info_nce_loss(features, features, logit_scale=1.0, group=dist.group.WORLD)
    except ValueError as error:
        if "`image` must have one shape and dtype on all ranks of `group`, got shapes [(3, 10), (4, 10)" not in str(
            error
        ):
            raise SystemExit(f"another message: {error}") from error
    else:
        raise SystemExit("ranks with different numbers of rows were not refused")
    features = torch.randn(3, WIDTH, requires_grad=rank == 0)
    try:
        ops.sdm_loss(features, features, torch.arange(3), group=dist.group.WORLD)
    except ValueError as error:
        if "gradients needed must be the same on all ranks of `group`, got [3, 0" not in str(error):
            raise SystemExit(f"another message: {error}") from error
    else:
        raise SystemExit("ranks that need different gradients were not refused")
    alone = dist.new_group([0])
    if rank != 0:
        try:
            ops.info_nce_loss(features, features, logit_scale=1.0, group=alone)
        except (ValueError, TypeError) as error:
            if "`group` must be" not in str(error):
                raise SystemExit(f"another message: {error}") from error
        else:
            raise SystemExit("a group of others was not refused")


def main() -> None:
    rank, ranks, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    compare_forms(rank, ranks)
    compare_alone(rank, ranks)
    compare_parallel(rank, ranks)
    compare_refusals(rank)
    dist.destroy_process_group()
    print("same as one process")


if __name__ == "__main__":
    main()
