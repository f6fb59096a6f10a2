"""Relation losses beside what PyTorch offers, in one run: eager, torch.compile, Gram matrices in PyTorch, kernel.

    python benchmarks/relation.py --batch 1024 4096 --compile --csv results.csv

Forward and backward to both student features. Every candidate's value and gradients are checked against float64 before
its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from side_by_side import DTYPES, Candidate, Settings, Work, checked, compare, our_backends, parse_arguments, report
from torch import Tensor

from lcr2s_ext.ops import relation_frobenius_loss, relation_kl_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SCALES = {"student_scale": 50.0, "teacher_scale": 50.0}


def gram_form(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
    """The Frobenius loss through d x d matrices and autograd, the mean over B N."""
    v, t, e, f = (torch.nn.functional.normalize(x, dim=1) for x in (image, text, soft_image, soft_text))
    own, cross, soft = (v.T @ v * (t.T @ t)).sum(), (v.T @ e * (t.T @ f)).sum(), (e.T @ e * (f.T @ f)).sum()
    return (own - 2 * cross + soft) / (v.shape[0] * t.shape[0])


def our_form(op: str, backend: str) -> Loss:
    if op == "frobenius":
        return lambda *x: relation_frobenius_loss(*x, backend=backend)
    return lambda *x: relation_kl_loss(*x, **SCALES, backend=backend)


def losses(op: str, settings: Settings) -> dict[str, Loss | str]:
    eager = {"eager": our_form(op, "reference")}
    if op == "frobenius":
        eager["eager, Gram matrices"] = gram_form
    found: dict[str, Loss | str] = dict(eager)
    if settings.compile:
        found |= {f"{name}, compiled": torch.compile(loss, fullgraph=True) for name, loss in eager.items()}
    for backend, reason in our_backends(f"relation_{op}", settings.device).items():
        found[f"lcr2s_ext {backend}"] = reason or our_form(op, backend)
    return found


def forward_backward(loss: Loss, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in student]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def measure(op: str, batch: int, dtype: str, args: argparse.Namespace) -> None:
    settings: Settings = args.settings
    generator = torch.Generator().manual_seed(0)
    widths = (args.width, args.width, args.teacher_width, args.teacher_width)
    student_image, student_text, *teacher = (
        torch.randn(batch, w, generator=generator).to(settings.device, getattr(torch, dtype)) for w in widths
    )
    student = [student_image, student_text]
    exact = forward_backward(our_form(op, "reference"), [x.double() for x in student], [x.double() for x in teacher])
    found: dict[str, Candidate | str] = {
        name: loss if isinstance(loss, str) else (lambda loss=loss: forward_backward(loss, student, teacher))
        for name, loss in losses(op, settings).items()
    }
    title = f"{op}: B = N = {batch}, d = {args.width}, teacher {args.teacher_width}, {dtype}"
    found = checked(found, exact, 1e-4 if dtype == "float32" else 3e-2, title)
    work = None
    if op == "kl":
        # Both cosines twice (statistics, then gradients), and two gradient products of the student.
        work = Work(flops=2 * batch * batch * (4 * args.width + 2 * args.teacher_width))
    shape = {"op": f"relation_{op}", "part": "forward + backward", "rows": batch, "columns": batch}
    shape |= {"width": args.width, "detail": f"teacher width {args.teacher_width}", "dtype": dtype}
    report(title, [{**shape, **row} for row in compare(found, settings, dtype, work)], settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=["frobenius", "kl"], nargs="+", default=["frobenius", "kl"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="image rows, as many text rows")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    args = parse_arguments(parser, arguments)
    for dtype in args.dtype:
        for op in args.op:
            for batch in args.batch:
                measure(op, batch, dtype, args)


if __name__ == "__main__":
    main()
