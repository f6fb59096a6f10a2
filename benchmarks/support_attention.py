"""Support attention beside what PyTorch offers, in one run: padded gather + SDPA, ragged eager, torch.compile, kernel.

    python benchmarks/support_attention.py --batch 128 4096 --compile --csv results.csv

Sets have a uniformly random size in 0..max-set over a pool of as many rows as queries. Every candidate's value and
gradients are checked against float64 before its time is printed. Rounds are interleaved: each candidate runs once a
round, so that whatever else the machine does meets all of them. Times are the 20th, 50th and 80th percentile in ms.
"""

import argparse
import csv
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lcr2s_ext.ops import SupportIndex, support_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def machine() -> str:
    """The processor and the software that the figures belong to."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name = f"{fields.get('model name', name)} family {fields.get('cpu family')} model {fields.get('model')}"
    isa = ("portable", "avx2", "avx512")[torch.ops.lcr2s.cpu_isa()]
    return f"{name}, {torch.get_num_threads()} threads, {isa} kernels, torch {torch.__version__}"


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
    found["lcr2s_ext cpu"] = lambda q, k, v: support_attention(q, k, v, index, backend="cpu")
    return found


def forward_backward(attention: Attention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def verify(name: str, attention: Attention, inputs: list[Tensor], upstream: Tensor, exact: list[Tensor]) -> None:
    tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 4e-2
    results = forward_backward(attention, inputs, upstream)
    for part, ours, oracle in zip(("value", "d query", "d key", "d value"), results, exact, strict=True):
        error = float((ours.double() - oracle).abs().max() / oracle.abs().max())
        if not error <= tolerance:
            raise SystemExit(f"{name}: {part} is off by {error:.1e} relative to float64; no times are reported")


def quantiles(seconds: list[float]) -> list[float]:
    return torch.quantile(torch.tensor(seconds) * 1e3, torch.tensor([0.2, 0.5, 0.8])).tolist()


def measure(batch: int, args: argparse.Namespace) -> list[dict[str, object]]:
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
    found = candidates(index, args.compile)
    forward: dict[str, list[float]] = {name: [] for name in found}
    both: dict[str, list[float]] = {name: [] for name in found}
    for name, attention in found.items():
        verify(name, attention, inputs, upstream, exact)
    for _ in range(args.rounds):
        for name, attention in found.items():
            with torch.no_grad():
                start = time.perf_counter()
                attention(*inputs)
                forward[name].append(time.perf_counter() - start)
            start = time.perf_counter()
            forward_backward(attention, inputs, upstream)
            both[name].append(time.perf_counter() - start)
    ours = quantiles(both["lcr2s_ext cpu"])[1]
    rows = []
    for name in found:
        low, middle, high = quantiles(both[name])
        rows.append(
            {
                "op": "support_attention",
                "batch": batch,
                "width": args.width,
                "heads": args.heads,
                "entries": int(indptr[-1]),
                "dtype": args.dtype,
                "candidate": name,
                "forward_ms": round(quantiles(forward[name])[1], 4),
                "both_ms_p20": round(low, 4),
                "both_ms": round(middle, 4),
                "both_ms_p80": round(high, 4),
                "times_the_kernel": round(middle / ours, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 4096], help="numbers of queries and of pool rows")
    parser.add_argument("--width", type=int, default=1024, help="width of all heads together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--max-set", type=int, default=8, help="sets have a size in 0..max-set")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager forms")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    where, when = machine(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    print(where)
    for batch in args.batch:
        rows = measure(batch, args)
        print(f"\nB = {batch}, D = {args.width}, H = {args.heads}, {rows[0]['entries']} entries, {args.dtype}")
        print(f"{'':22}{'forward':>10}{'forward + backward [p20, p80]':>34}{'ratio':>9}")
        for row in rows:
            spread = f"{row['both_ms']:.3f} [{row['both_ms_p20']:.3f}, {row['both_ms_p80']:.3f}]"
            print(f"{row['candidate']:22}{row['forward_ms']:>10.3f}{spread:>34}{row['times_the_kernel']:>8}x")
        if args.csv:
            fresh = not args.csv.exists()
            with args.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0], "machine", "time"])
                if fresh:
                    writer.writeheader()
                writer.writerows({**row, "machine": where, "time": when} for row in rows)


if __name__ == "__main__":
    main()
