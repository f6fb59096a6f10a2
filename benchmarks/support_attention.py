"""Support attention beside what PyTorch offers, in one run: padded gather + SDPA, ragged eager, torch.compile, kernel.

    python benchmarks/support_attention.py --batch 128 4096 --compile --csv results.csv

Sets have a uniformly random size in 0..max-set over a pool of as many rows as queries. Every candidate's value and
gradients are checked against float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from side_by_side import DTYPES, Candidate, Settings, Work, checked, compare, our_backends, parse_arguments, report
from torch import Tensor

from lcr2s_ext.ops import SupportIndex, support_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def padded(index: SupportIndex) -> Attention:
    """Rows gathered into padded slots, then scaled_dot_product_attention; the slots are prepared outside the timing."""
    lengths = index.indptr.diff()
    slots = torch.arange(max(int(lengths.max()), 1), device=lengths.device) < lengths.unsqueeze(1)
    rows = torch.zeros(slots.shape, dtype=torch.int64, device=slots.device).masked_scatter(slots, index.indices)
    mask = slots[:, None, None]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gathered_key, gathered_value = key[rows].transpose(1, 2), value[rows].transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), gathered_key, gathered_value, attn_mask=mask
        ).squeeze(2)

    return attention


def candidates(index: SupportIndex, settings: Settings) -> dict[str, Attention | str]:
    found: dict[str, Attention | str] = {}
    eager = {
        "padded SDPA": padded(index),
        "ragged eager": lambda q, k, v: support_attention(q, k, v, index, backend="reference"),
    }
    found |= eager
    if settings.compile:
        found |= {
            f"{name}, compiled": torch.compile(form, fullgraph=True, dynamic=False) for name, form in eager.items()
        }
    for backend, reason in our_backends("support_attention", settings.device).items():
        found[f"lcr2s_ext {backend}"] = reason or (
            lambda q, k, v, backend=backend: support_attention(q, k, v, index, backend=backend)
        )
    return found


def forward_backward(attention: Attention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def forward(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [attention(*inputs)]


def measure(batch: int, dtype: str, args: argparse.Namespace) -> None:
    settings: Settings = args.settings
    generator = torch.Generator().manual_seed(0)
    head_width = args.width // args.heads
    lengths = torch.randint(0, args.max_set + 1, (batch,), generator=generator)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    entries = int(indptr[-1])
    index = SupportIndex(indptr, torch.randint(0, batch, (entries,), generator=generator), batch).to(settings.device)

    def random() -> Tensor:
        values = torch.randn(batch, args.heads, head_width, generator=generator)
        return values.to(settings.device, getattr(torch, dtype))

    inputs, upstream = [random() for _ in range(3)], random()
    exact = forward_backward(
        lambda q, k, v: support_attention(q, k, v, index, backend="reference"),
        [tensor.double() for tensor in inputs],
        upstream.double(),
    )
    only: dict[str, Candidate | str] = {}
    both: dict[str, Candidate | str] = {}
    for name, attention in candidates(index, settings).items():
        if isinstance(attention, str):
            only[name] = both[name] = attention
            continue
        only[name] = lambda attention=attention: forward(attention, inputs)
        both[name] = lambda attention=attention: forward_backward(attention, inputs, upstream)
    title = f"B = {batch}, D = {args.width}, H = {args.heads}, {entries} entries, {dtype}"
    both = checked(both, exact, 1e-4 if dtype == "float32" else 4e-2, title)
    shape = {"op": "support_attention", "rows": batch, "columns": batch, "width": args.width, "dtype": dtype}
    shape["detail"] = f"{args.heads} heads, sets 0..{args.max_set}, {entries} entries"
    # Every row of every operand moved once: query, key, value and out; backward reads them and the upstream gradient
    # (not out) and writes three gradients.
    matrix = inputs[0].nbytes
    for part, found, moved in (("forward", only, 4 * matrix), ("forward + backward", both, 11 * matrix)):
        rows = compare(found, settings, dtype, Work(bytes=moved))
        report(f"{part}: {title}", [{**shape, "part": part, **row} for row in rows], settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 4096], help="numbers of queries and of pool rows")
    parser.add_argument("--width", type=int, default=1024, help="width of all heads together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--max-set", type=int, default=8, help="sets have a size in 0..max-set")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    args = parse_arguments(parser, arguments)
    for dtype in args.dtype:
        for batch in args.batch:
            measure(batch, dtype, args)


if __name__ == "__main__":
    main()
