"""Support attention beside other ways to compute it, in one run: padded SDPA, torch.compile, peers, our kernels.

    python benchmarks/support_attention.py --batch 128 4096 --compile --csv results.csv

Sets have a uniformly random size in 0..max-set over a pool of as many rows as queries. Every candidate's value and
gradients are checked against float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from peers import ATTENTION, forms, padded
from problem import Form, Problem, add_arguments, chosen, differentiable, our_forms, providers, run
from side_by_side import DTYPES, Work, parse_arguments
from torch import Tensor

from lcr2s_ext.ops import SupportIndex, support_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def padded_attention(index: SupportIndex) -> Attention:
    """Rows gathered into padded slots, then scaled_dot_product_attention; the slots are prepared outside the timing."""
    rows, slots = padded(index)
    mask = slots[:, None, None]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gathered_key, gathered_value = key[rows].transpose(1, 2), value[rows].transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), gathered_key, gathered_value, attn_mask=mask
        ).squeeze(2)

    return attention


def our_form(index: SupportIndex, backend: str) -> Attention:
    return lambda q, k, v: support_attention(q, k, v, index, backend=backend)


def setup(
    batch: int, width: int, heads: int, max_set: int, dtype: str, device: torch.device, wanted: set[str]
) -> Problem:
    """`batch` queries over a pool of `batch` rows, `width` of all heads together."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, max_set + 1, (batch,), generator=generator)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    entries = int(indptr[-1])
    index = SupportIndex(indptr, torch.randint(0, batch, (entries,), generator=generator), batch).to(device)

    def random() -> Tensor:
        values = torch.randn(batch, heads, width // heads, generator=generator)
        return values.to(device, getattr(torch, dtype))

    inputs, upstream = [random() for _ in range(3)], random()
    found = {"padded SDPA": Form("eager", padded_attention(index), "padded gather")}
    found |= our_forms("support_attention", device, lambda backend: our_form(index, backend))
    if "peers" in wanted:
        found |= forms(ATTENTION, device, dtype, index, inputs[0])
    # Every row of every operand moved once: query, key, value and out; backward reads them and the upstream gradient
    # (not out) and writes three gradients.
    matrix = inputs[0].nbytes
    parts = differentiable(
        our_form(index, "reference"),
        inputs,
        upstream=upstream,
        forward=Work(bytes=4 * matrix),
        backward=Work(bytes=7 * matrix),
        forward_backward=Work(bytes=11 * matrix),
        backward_alone=True,
    )
    shape: dict[str, object] = {"op": "support_attention", "rows": batch, "columns": batch, "width": width}
    shape |= {"dtype": dtype, "detail": f"{heads} heads, sets 0..{max_set}, {entries} entries"}
    title = f"B = {batch}, D = {width}, H = {heads}, sets 0..{max_set}, {entries} entries, {dtype}"
    return Problem(title, shape, 1e-4 if dtype == "float32" else 4e-2, chosen(found, wanted), parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 4096], help="numbers of queries and of pool rows")
    parser.add_argument("--width", type=int, nargs="+", default=[1024], help="width of all heads together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--max-set", type=int, nargs="+", default=[8], help="sets have a size in 0..max-set")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    add_arguments(parser)
    args = parse_arguments(parser, arguments)
    wanted = providers(args)
    for dtype, width, max_set, batch in itertools.product(args.dtype, args.width, args.max_set, args.batch):
        if width % args.heads:
            parser.error(f"--width: expected multiples of --heads {args.heads}, got {width}")
        run(setup(batch, width, args.heads, max_set, dtype, args.settings.device, wanted), args.settings)


if __name__ == "__main__":
    main()
