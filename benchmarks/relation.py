"""Relation losses beside what PyTorch offers, in one run: eager, torch.compile, Gram matrices in PyTorch, kernel.

    python benchmarks/relation.py --batch 1024 4096 --compile --csv results.csv

Forward and backward to both student features. Every candidate's value and gradients are checked against float64 before
its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side import Candidate, compare, parse_arguments, report, verify
from torch import Tensor

from lcr2s_ext.ops import relation_frobenius_loss, relation_kl_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
KERNEL = "lcr2s_ext cpu"


def gram_form(image: Tensor, text: Tensor, soft_image: Tensor, soft_text: Tensor) -> Tensor:
    """The Frobenius loss through d x d matrices and autograd, the mean over B N."""
    v, t, e, f = (torch.nn.functional.normalize(x, dim=1) for x in (image, text, soft_image, soft_text))
    own, cross, soft = (v.T @ v * (t.T @ t)).sum(), (v.T @ e * (t.T @ f)).sum(), (e.T @ e * (f.T @ f)).sum()
    return (own - 2 * cross + soft) / (v.shape[0] * t.shape[0])


def losses(op: str, with_compile: bool) -> dict[str, Loss]:
    if op == "frobenius":
        found: dict[str, Loss] = {
            "eager": lambda *x: relation_frobenius_loss(*x, backend="reference"),
            "eager, Gram matrices": gram_form,
        }
        kernel: Loss = lambda *x: relation_frobenius_loss(*x, backend="cpu")  # noqa: E731
    else:
        scales = {"student_scale": 50.0, "teacher_scale": 50.0}
        found = {"eager": lambda *x: relation_kl_loss(*x, **scales, backend="reference")}
        kernel = lambda *x: relation_kl_loss(*x, **scales, backend="cpu")  # noqa: E731
    if with_compile:
        found |= {f"{name}, compiled": torch.compile(loss, fullgraph=True) for name, loss in found.items()}
    return {**found, KERNEL: kernel}


def forward_backward(loss: Loss, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in student]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def measure(op: str, batch: int, args: argparse.Namespace) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    widths = (args.width, args.width, args.teacher_width, args.teacher_width)
    student_image, student_text, *teacher = (torch.randn(batch, w, generator=generator).to(dtype) for w in widths)
    student = [student_image, student_text]
    found = losses(op, args.compile)
    exact = forward_backward(losses(op, False)["eager"], [x.double() for x in student], [x.double() for x in teacher])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    candidates: dict[str, Candidate] = {}
    for name, loss in found.items():
        candidates[name] = lambda loss=loss: forward_backward(loss, student, teacher)
        verify(f"{op}, {name}", candidates[name](), exact, tolerance)
    del exact
    shape = {
        "op": f"relation_{op}",
        "batch": batch,
        "width": args.width,
        "teacher_width": args.teacher_width,
        "dtype": args.dtype,
    }
    return [{**shape, **row} for row in compare(candidates, KERNEL, args.rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=["frobenius", "kl"], nargs="+", default=["frobenius", "kl"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="image rows, as many text rows")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parse_arguments(parser)
    for op in args.op:
        for batch in args.batch:
            rows = measure(op, batch, args)
            title = f"{op}: B = N = {batch}, d = {args.width}, teacher {args.teacher_width}, {args.dtype}"
            report(title, rows, args.csv)


if __name__ == "__main__":
    main()
