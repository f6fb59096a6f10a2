"""Similarity losses beside eager PyTorch, in one run: forward + backward time and the memory above the inputs.

    python benchmarks/similarity.py --batch 1024 4096 --loss sdm info_nce --compile --csv results.csv

Batches of pairs with about four rows of every identity. Each candidate's value and gradients are checked against
float64 before its time is printed. Rounds are interleaved: each candidate runs once a round, so that whatever else the
machine does meets all of them. Times are the 20th, 50th and 80th percentile in ms; cpu is the median processor time of
all threads, which other programs disturb less. Memory is the growth of the resident size, sampled while one forward and
backward runs (Linux), the gradients included.
"""

import argparse
import csv
import ctypes
import datetime
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lcr2s_ext.ops import cmpm_loss, info_nce_loss, sdm_loss, tal_loss

Loss = Callable[[Tensor, Tensor], Tensor]
SCALE = 50.0


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
    found["lcr2s_ext cpu"] = ours
    return found


def forward_backward(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def verify(name: str, loss: Loss, inputs: list[Tensor], exact: list[Tensor]) -> None:
    tolerance = 1e-3 if inputs[0].dtype == torch.float32 else 4e-2
    for part, ours, oracle in zip(("loss", "d image", "d text"), forward_backward(loss, inputs), exact, strict=True):
        error = float((ours.double() - oracle).abs().max() / oracle.abs().max())
        if not error <= tolerance:
            raise SystemExit(f"{name}: {part} is off by {error:.1e} relative to float64; no times are reported")


def peak_memory(loss: Loss, inputs: list[Tensor]) -> float:
    """Largest growth of the resident size seen during one forward and backward, in MiB; NaN where /proc is missing."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return float("nan")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    forward_backward(loss, inputs)
    # Freed blocks that the C library keeps would hide what the next call takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.0005)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        forward_backward(loss, inputs)
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 2**20


def quantiles(seconds: list[float]) -> list[float]:
    return torch.quantile(torch.tensor(seconds) * 1e3, torch.tensor([0.2, 0.5, 0.8])).tolist()


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
    for name, function in found.items():
        verify(name, function, inputs, exact)
    memory = {name: peak_memory(function, inputs) for name, function in found.items()}
    wall: dict[str, list[float]] = {name: [] for name in found}
    cpu: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, function in found.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            forward_backward(function, inputs)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    ours, ours_cpu = quantiles(wall["lcr2s_ext cpu"])[1], quantiles(cpu["lcr2s_ext cpu"])[1]
    rows = []
    for name in found:
        low, middle, high = quantiles(wall[name])
        processor = quantiles(cpu[name])[1]
        rows.append(
            {
                "op": loss,
                "batch": batch,
                "width": args.width,
                "dtype": args.dtype,
                "candidate": name,
                "both_ms_p20": round(low, 3),
                "both_ms": round(middle, 3),
                "both_ms_p80": round(high, 3),
                "times_the_kernel": round(middle / ours, 2),
                "cpu_ms": round(processor, 3),
                "cpu_times_the_kernel": round(processor / ours_cpu, 2),
                "memory_mib": round(memory[name], 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    losses = ["sdm", "info_nce", "cmpm", "tal"]
    parser.add_argument("--loss", nargs="+", choices=losses, default=losses)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096], help="rows of each side")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager forms")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    where, when = machine(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    print(where)
    for batch in args.batch:
        print(f"\nB = N = {batch}, d = {args.width}, {args.dtype}")
        print(f"{'':26}{'forward + backward [p20, p80]':>34}{'ratio':>9}{'cpu':>11}{'ratio':>9}{'memory':>13}")
        for loss in args.loss:
            rows = measure(loss, batch, args)
            for row in rows:
                spread = f"{row['both_ms']:.1f} [{row['both_ms_p20']:.1f}, {row['both_ms_p80']:.1f}] ms"
                print(
                    f"{loss:10}{row['candidate']:16}{spread:>34}{row['times_the_kernel']:>8}x{row['cpu_ms']:>8.0f} ms"
                    f"{row['cpu_times_the_kernel']:>8}x{row['memory_mib']:>9.0f} MiB"
                )
            if args.csv:
                fresh = not args.csv.exists()
                with args.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, [*rows[0], "machine", "time"])
                    if fresh:
                        writer.writeheader()
                    writer.writerows({**row, "machine": where, "time": when} for row in rows)


if __name__ == "__main__":
    main()
