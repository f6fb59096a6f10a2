"""Similarity losses beside other ways to compute them, in one run: eager, torch.compile, peers, our kernels.

    python benchmarks/similarity.py --batch 1024 4096 --loss sdm info_nce --compile --csv results.csv

Batches of pairs with about four rows of every identity. Each candidate's value and gradients are checked against
float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from peers import INFO_NCE, SDM, forms
from problem import Form, Problem, add_arguments, chosen, differentiable, our_forms, providers, run
from side_by_side import DTYPES, Work, parse_arguments
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


def eager_info_nce(image: Tensor, text: Tensor) -> Tensor:
    """CLIP's loss."""
    logits = SCALE * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    diagonal = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def our_form(loss: str, ids: Tensor, backend: str) -> Loss:
    if loss == "sdm":
        return lambda v, t: sdm_loss(v, t, ids, logit_scale=SCALE, backend=backend)
    if loss == "info_nce":
        return lambda v, t: info_nce_loss(v, t, logit_scale=SCALE, backend=backend)
    function = cmpm_loss if loss == "cmpm" else tal_loss
    return lambda v, t: function(v, t, ids, backend=backend)


def setup(loss: str, batch: int, width: int, dtype: str, device: torch.device, wanted: set[str]) -> Problem:
    """`batch` pairs of rows of `width`, about four of every identity."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, max(batch // 4, 1), (batch,), generator=generator)
    centres = torch.randn(int(ids.max()) + 1, width, generator=generator)
    # Identities overlap as they do early in training; norms near 3.
    noise = [torch.randn(batch, width, generator=generator) for _ in range(2)]
    inputs = [((centres[ids] + 3 * sample) / width**0.5).to(device, getattr(torch, dtype)) for sample in noise]
    ids = ids.to(device)
    found: dict[str, Form] = {}
    if loss == "sdm":
        found["eager"] = Form("eager", lambda v, t: eager_sdm(v, t, ids))
    elif loss == "info_nce":
        found["eager"] = Form("eager", eager_info_nce)
    found |= our_forms(loss, device, lambda backend: our_form(loss, ids, backend))
    if "peers" in wanted:
        found |= forms({"sdm": SDM, "info_nce": INFO_NCE}.get(loss, {}), device, dtype, SCALE, batch)
    product = 2 * batch * batch * width
    parts = differentiable(
        our_form(loss, ids, "reference"),
        inputs,
        forward=Work(flops=product),
        # The cosines twice (statistics, then gradients) and two gradient products.
        forward_backward=Work(flops=4 * product),
    )
    shape: dict[str, object] = {"op": loss, "rows": batch, "columns": batch, "width": width, "dtype": dtype}
    title = f"{loss}: B = N = {batch}, d = {width}, {dtype}"
    return Problem(title, shape, 1e-3 if dtype == "float32" else 4e-2, chosen(found, wanted), parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    losses = ["sdm", "info_nce", "cmpm", "tal"]
    parser.add_argument("--loss", nargs="+", choices=losses, default=losses)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="rows of each side")
    parser.add_argument("--width", type=int, nargs="+", default=[512])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    add_arguments(parser)
    args = parse_arguments(parser, arguments)
    wanted = providers(args)
    for dtype, width, batch, loss in itertools.product(args.dtype, args.width, args.batch, args.loss):
        run(setup(loss, batch, width, dtype, args.settings.device, wanted), args.settings)


if __name__ == "__main__":
    main()
