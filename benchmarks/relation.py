"""Relation losses beside other ways to compute them, in one run: eager, torch.compile, peers, our kernels.

    python benchmarks/relation.py --batch 1024 4096 --compile --csv results.csv

Gradients are those of both student features. Every candidate's value and gradients are checked against float64 before
its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from peers import RELATION_KL, forms
from problem import Form, Problem, add_arguments, chosen, differentiable, our_forms, providers, run
from side_by_side import DTYPES, Work, parse_arguments
from torch import Tensor

from lcr2s_ext.ops import relation_frobenius_loss, relation_kl_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SCALE = 50.0
"""Of student and teacher."""


def cosines(image: Tensor, text: Tensor) -> Tensor:
    return F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


def eager_frobenius(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
    """The mean squared difference of two cosine matrices."""
    return F.mse_loss(cosines(image, text), cosines(soft_image, soft_text))


def gram_form(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
    """The Frobenius loss through d x d matrices and autograd, the mean over B N."""
    v, t, e, f = (F.normalize(x, dim=1) for x in (image, text, soft_image, soft_text))
    own, cross, soft = (v.T @ v * (t.T @ t)).sum(), (v.T @ e * (t.T @ f)).sum(), (e.T @ e * (f.T @ f)).sum()
    return (own - 2 * cross + soft) / (v.shape[0] * t.shape[0])


def eager_kl(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
    """kl_div of the softmax rows of two similarity matrices, in both directions."""
    student, teacher = SCALE * cosines(image, text), SCALE * cosines(soft_image, soft_text)
    rows = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    columns = F.kl_div(student.T.log_softmax(1), teacher.T.log_softmax(1), reduction="batchmean", log_target=True)
    return rows + columns


def our_form(op: str, backend: str) -> Loss:
    if op == "frobenius":
        return lambda *x: relation_frobenius_loss(*x, backend=backend)
    return lambda *x: relation_kl_loss(*x, student_scale=SCALE, teacher_scale=SCALE, backend=backend)


def setup(
    op: str, batch: int, width: int, teacher_width: int, dtype: str, device: torch.device, wanted: set[str]
) -> Problem:
    """`batch` rows of each side."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(batch, columns, generator=generator).to(device, getattr(torch, dtype))
        for columns in (width, width, teacher_width, teacher_width)
    ]
    student, teacher = features[:2], features[2:]
    forward = forward_backward = None
    if op == "frobenius":
        found = {"eager": Form("eager", eager_frobenius), "eager, Gram matrices": Form("eager", gram_form)}
    else:
        found = {"eager": Form("eager", eager_kl)}
        # Both cosines once for the value; for gradients again, and two gradient products of the student.
        forward = Work(flops=2 * batch * batch * (width + teacher_width))
        forward_backward = Work(flops=2 * batch * batch * (4 * width + 2 * teacher_width))
    found |= our_forms(f"relation_{op}", device, lambda backend: our_form(op, backend))
    if "peers" in wanted and op == "kl":
        found |= forms(RELATION_KL, device, dtype, SCALE, SCALE, *teacher)
    parts = differentiable(
        our_form(op, "reference"), student, teacher, forward=forward, forward_backward=forward_backward
    )
    shape: dict[str, object] = {"op": f"relation_{op}", "rows": batch, "columns": batch, "width": width}
    shape |= {"detail": f"teacher width {teacher_width}", "dtype": dtype}
    title = f"{op}: B = N = {batch}, d = {width}, teacher {teacher_width}, {dtype}"
    return Problem(title, shape, 1e-4 if dtype == "float32" else 3e-2, chosen(found, wanted), parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=["frobenius", "kl"], nargs="+", default=["frobenius", "kl"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="image rows, as many text rows")
    parser.add_argument("--width", type=int, nargs="+", default=[512])
    parser.add_argument("--teacher-width", type=int, nargs="+", default=[512])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    add_arguments(parser)
    args = parse_arguments(parser, arguments)
    wanted = providers(args)
    sweep = itertools.product(args.dtype, args.width, args.teacher_width, args.op, args.batch)
    for dtype, width, teacher_width, op, batch in sweep:
        run(setup(op, batch, width, teacher_width, dtype, args.settings.device, wanted), args.settings)


if __name__ == "__main__":
    main()
