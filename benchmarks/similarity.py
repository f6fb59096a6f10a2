"""Similarity losses beside eager PyTorch, in one run: forward + backward time and the memory above the inputs.

    python benchmarks/similarity.py --batch 1024 4096 --loss sdm info_nce --compile --csv results.csv

Batches of pairs with about four rows of every identity. Each candidate's value and gradients are checked against
float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from side_by_side import DTYPES, Candidate, Settings, Work, checked, compare, our_backends, parse_arguments, report
from torch import Tensor

from lcr2s_ext.ops import cmpm_loss, info_nce_loss, sdm_loss, tal_loss

Loss = Callable[[Tensor, Tensor], Tensor]
SCALE = 50.0


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
    diagonal = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def eager_form(loss: str, ids: Tensor) -> Loss:
    if loss == "sdm":
        return lambda v, t: eager_sdm(v, t, ids)
    if loss == "info_nce":
        return lambda v, t: eager_info_nce(v, t, ids)
    function = cmpm_loss if loss == "cmpm" else tal_loss
    return lambda v, t: function(v, t, ids, backend="reference")


def our_form(loss: str, ids: Tensor, backend: str) -> Loss:
    if loss == "sdm":
        return lambda v, t: sdm_loss(v, t, ids, logit_scale=SCALE, backend=backend)
    if loss == "info_nce":
        return lambda v, t: info_nce_loss(v, t, logit_scale=SCALE, backend=backend)
    function = cmpm_loss if loss == "cmpm" else tal_loss
    return lambda v, t: function(v, t, ids, backend=backend)


def candidates(loss: str, ids: Tensor, settings: Settings) -> dict[str, Loss | str]:
    found: dict[str, Loss | str] = {"eager": eager_form(loss, ids)}
    if settings.compile:
        found["torch.compile"] = torch.compile(eager_form(loss, ids), fullgraph=True, dynamic=False)
    for backend, reason in our_backends(loss, settings.device).items():
        found[f"lcr2s_ext {backend}"] = reason or our_form(loss, ids, backend)
    return found


def forward_backward(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def measure(loss: str, batch: int, dtype: str, args: argparse.Namespace) -> None:
    settings: Settings = args.settings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, max(batch // 4, 1), (batch,), generator=generator)
    centres = torch.randn(int(ids.max()) + 1, args.width, generator=generator)
    # Identities overlap as they do early in training; norms near 3.
    noise = [torch.randn(batch, args.width, generator=generator) for _ in range(2)]
    inputs = [
        ((centres[ids] + 3 * sample) / args.width**0.5).to(settings.device, getattr(torch, dtype)) for sample in noise
    ]
    ids = ids.to(settings.device)
    exact = forward_backward(eager_form(loss, ids), [tensor.double() for tensor in inputs])
    found: dict[str, Candidate | str] = {
        name: function if isinstance(function, str) else (lambda function=function: forward_backward(function, inputs))
        for name, function in candidates(loss, ids, settings).items()
    }
    title = f"{loss}: B = N = {batch}, d = {args.width}, {dtype}"
    found = checked(found, exact, 1e-3 if dtype == "float32" else 4e-2, title)
    # The cosines twice (statistics, then gradients) and two gradient products.
    rows = compare(found, settings, dtype, Work(flops=4 * 2 * batch * batch * args.width))
    shape = {"op": loss, "part": "forward + backward", "rows": batch, "columns": batch, "width": args.width}
    report(title, [{**shape, "dtype": dtype, **row} for row in rows], settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    losses = ["sdm", "info_nce", "cmpm", "tal"]
    parser.add_argument("--loss", nargs="+", choices=losses, default=losses)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="rows of each side")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    args = parse_arguments(parser, arguments)
    for dtype in args.dtype:
        for batch in args.batch:
            for loss in args.loss:
                measure(loss, batch, dtype, args)


if __name__ == "__main__":
    main()
