"""Similarity losses beside eager PyTorch, in one run: forward + backward time and the memory above the inputs.

    python benchmarks/similarity.py --batch 1024 4096 --loss sdm info_nce --compile --csv results.csv

Batches of pairs with about four rows of every identity. Each candidate's value and gradients are checked against
float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import Candidate, compare, parse_arguments, report, verify
from torch import Tensor

from lcr2s_ext.ops import cmpm_loss, info_nce_loss, sdm_loss, tal_loss

Loss = Callable[[Tensor, Tensor], Tensor]
SCALE = 50.0
KERNEL = "lcr2s_ext cpu"


def eager_sdm(image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
    """As training scripts write it: normalise, one matrix product, softmax and log_softmax of both directions."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    same = (ids[:, None] == ids[None, :]).to(image.dtype)
    log_target = torch.log(same / same.sum(1, keepdim=True) + 1e-8)
    text_logits = SCALE * text @ image.T
    total = image.new_zeros(())
    for logits in (text_logits.T, text_logits):
        p = F.softmax(logits, 1)
        total = total + (p * (F.log_softmax(logits, 1) - log_target)).sum(1).mean()
    return total


def eager_info_nce(image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss."""
    logits = SCALE * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    diagonal = torch.arange(len(image))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def candidates(loss: str, ids: Tensor, with_compile: bool) -> dict[str, Loss]:
    eager: Loss
    ours: Loss
    if loss == "sdm":
        eager, ours = (lambda v, t: eager_sdm(v, t, ids)), (lambda v, t: sdm_loss(v, t, ids, logit_scale=SCALE))
    elif loss == "info_nce":
        eager, ours = (lambda v, t: eager_info_nce(v, t, ids)), (lambda v, t: info_nce_loss(v, t, logit_scale=SCALE))
    else:
        function = cmpm_loss if loss == "cmpm" else tal_loss
        eager, ours = (lambda v, t: function(v, t, ids, backend="reference")), (lambda v, t: function(v, t, ids))
    found = {"eager": eager}
    if with_compile:
        found["torch.compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    found[KERNEL] = ours
    return found


def forward_backward(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def measure(loss: str, batch: int, args: argparse.Namespace) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    ids = torch.randint(0, max(batch // 4, 1), (batch,), generator=generator)
    centres = torch.randn(int(ids.max()) + 1, args.width, generator=generator)
    # Identities overlap as they do early in training; norms near 3.
    noise = [torch.randn(batch, args.width, generator=generator) for _ in range(2)]
    inputs = [((centres[ids] + 3 * sample) / args.width**0.5).to(dtype) for sample in noise]
    found = candidates(loss, ids, args.compile)
    exact = forward_backward(found["eager"], [tensor.double() for tensor in inputs])
    checked: dict[str, Candidate] = {}
    for name, function in found.items():
        checked[name] = lambda function=function: forward_backward(function, inputs)
        verify(f"{loss}, {name}", checked[name](), exact, 1e-3 if dtype == torch.float32 else 4e-2)
    rows = compare(checked, KERNEL, args.rounds)
    return [{"op": loss, "batch": batch, "width": args.width, "dtype": args.dtype, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    losses = ["sdm", "info_nce", "cmpm", "tal"]
    parser.add_argument("--loss", nargs="+", choices=losses, default=losses)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="rows of each side")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parse_arguments(parser)
    for batch in args.batch:
        for loss in args.loss:
            rows = measure(loss, batch, args)
            report(f"{loss}: B = N = {batch}, d = {args.width}, {args.dtype}", rows, args.csv)


if __name__ == "__main__":
    main()
