"""Support attention beside what PyTorch offers, in one run: padded gather + SDPA, ragged eager, torch.compile, kernel.

    python benchmarks/support_attention.py --batch 128 4096 --compile --csv results.csv

Sets have a uniformly random size in 0..max-set over a pool of as many rows as queries. Every candidate's value and
gradients are checked against float64 before its time is printed. Rounds are interleaved (side_by_side.compare).
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side import Candidate, compare, parse_arguments, report, verify
from torch import Tensor

from lcr2s_ext.ops import SupportIndex, support_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
KERNEL = "lcr2s_ext cpu"


def padded(index: SupportIndex) -> Attention:
    """Rows gathered into padded slots, then scaled_dot_product_attention; the slots are prepared outside the timing."""
    lengths = index.indptr.diff()
    slots = torch.arange(max(int(lengths.max()), 1)) < lengths.unsqueeze(1)
    rows = torch.zeros(slots.shape, dtype=torch.int64).masked_scatter(slots, index.indices)
    mask = slots[:, None, None]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gathered_key, gathered_value = key[rows].transpose(1, 2), value[rows].transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), gathered_key, gathered_value, attn_mask=mask
        ).squeeze(2)

    return attention


def candidates(index: SupportIndex, with_compile: bool) -> dict[str, Attention]:
    found: dict[str, Attention] = {
        "padded SDPA": padded(index),
        "ragged eager": lambda q, k, v: support_attention(q, k, v, index, backend="reference"),
    }
    if with_compile:
        found["ragged torch.compile"] = torch.compile(found["ragged eager"], fullgraph=True, dynamic=False)
        found["padded torch.compile"] = torch.compile(found["padded SDPA"], fullgraph=True, dynamic=False)
    found[KERNEL] = lambda q, k, v: support_attention(q, k, v, index, backend="cpu")
    return found


def forward_backward(attention: Attention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def forward(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [attention(*inputs)]


def measure(batch: int, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    head_width = args.width // args.heads
    lengths = torch.randint(0, args.max_set + 1, (batch,), generator=generator)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    index = SupportIndex(indptr, torch.randint(0, batch, (int(indptr[-1]),), generator=generator), batch)
    inputs = [torch.randn(batch, args.heads, head_width, generator=generator).to(dtype) for _ in range(3)]
    upstream = torch.randn(batch, args.heads, head_width, generator=generator).to(dtype)
    exact = forward_backward(
        lambda q, k, v: support_attention(q, k, v, index, backend="reference"),
        [tensor.double() for tensor in inputs],
        upstream.double(),
    )
    only: dict[str, Candidate] = {}
    both: dict[str, Candidate] = {}
    for name, attention in candidates(index, args.compile).items():
        only[name] = lambda attention=attention: forward(attention, inputs)
        both[name] = lambda attention=attention: forward_backward(attention, inputs, upstream)
        verify(name, both[name](), exact, 1e-4 if dtype == torch.float32 else 4e-2)
    shape = {
        "batch": batch,
        "width": args.width,
        "heads": args.heads,
        "entries": int(indptr[-1]),
        "dtype": args.dtype,
    }
    title = f"B = {batch}, D = {args.width}, H = {args.heads}, {shape['entries']} entries, {args.dtype}"
    for part, found in (("forward", only), ("forward + backward", both)):
        rows = compare(found, KERNEL, args.rounds)
        named = [{"op": "support_attention", "part": part, **shape, **row} for row in rows]
        report(f"{part}: {title}", named, args.csv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 4096], help="numbers of queries and of pool rows")
    parser.add_argument("--width", type=int, default=1024, help="width of all heads together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--max-set", type=int, default=8, help="sets have a size in 0..max-set")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parse_arguments(parser)
    for batch in args.batch:
        measure(batch, args)


if __name__ == "__main__":
    main()
