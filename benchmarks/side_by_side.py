"""Candidates of one operation side by side: checked against float64, timed in interleaved rounds, memory measured."""

import argparse
import csv
import ctypes
import datetime
import gc
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcr2s_ext.ops import _library

Candidate = Callable[[], list[Tensor]]


def machine() -> str:
    """The processor and the software that the figures belong to."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name = f"{fields.get('model name', name)} family {fields.get('cpu family')} model {fields.get('model')}"
    isa = _library.ISA_NAMES[torch.ops.lcr2s.cpu_isa()]
    return f"{name}, {torch.get_num_threads()} threads, {isa} kernels, torch {torch.__version__}"


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments that all benchmarks share, added and parsed; the number of threads is set."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager forms")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine())
    return args


def verify(name: str, results: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    """End the run where a result is further from float64 than `tolerance`, relative, in norm."""
    for part, (ours, oracle) in enumerate(zip(results, exact, strict=True)):
        error = float((ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-300))
        if not error <= tolerance:
            raise SystemExit(f"{name}: result {part} is off by {error:.1e} relative to float64; no times are reported")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(candidate: Candidate) -> float:
    """MiB that a run holds at its peak above what is held before it, outputs included; Linux with glibc only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of earlier runs would hide this one's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    candidate()
    return max(_memory("VmHWM") - before, 0) / 2**20


def _quantiles(seconds: list[float]) -> list[float]:
    return torch.quantile(torch.tensor(seconds) * 1e3, torch.tensor([0.2, 0.5, 0.8])).tolist()


def compare(candidates: dict[str, Candidate], ours: str, rounds: int) -> list[dict[str, object]]:
    """One row for each candidate: wall time (median, 20th and 80th percentile) and processor time of all threads in ms,
    both as multiples of the kernel's, and peak MiB.

    Each candidate runs once a round, so that whatever else the machine does meets all of them; processor time is what
    other programs disturb least.
    """
    memory = {name: peak_memory(candidate) for name, candidate in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    processor: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start, start_processor = time.perf_counter(), time.process_time()
            candidate()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_processor)
    quantiles = {name: _quantiles(values) for name, values in seconds.items()}
    cpu = {name: _quantiles(values)[1] for name, values in processor.items()}
    return [
        {
            "candidate": name,
            "ms_p20": round(low, 3),
            "ms": round(middle, 3),
            "ms_p80": round(high, 3),
            "times_the_kernel": round(middle / quantiles[ours][1], 2),
            "cpu_ms": round(cpu[name], 3),
            "cpu_times_the_kernel": round(cpu[name] / cpu[ours], 2),
            "peak_mib": round(memory[name], 1),
        }
        for name, (low, middle, high) in quantiles.items()
    ]


def report(title: str, rows: list[dict[str, object]], csv_file: Path | None) -> None:
    """Print the rows of one comparison, and append them to a file where one is given."""
    print(f"\n{title}")
    print(f"{'':26}{'wall ms [p20, p80]':>34}{'ratio':>9}{'cpu ms':>11}{'ratio':>9}{'peak MiB':>11}")
    for row in rows:
        spread = f"{row['ms']:.2f} [{row['ms_p20']:.2f}, {row['ms_p80']:.2f}]"
        print(
            f"{row['candidate']:26}{spread:>34}{row['times_the_kernel']:>8}x{row['cpu_ms']:>11.2f}"
            f"{row['cpu_times_the_kernel']:>8}x{row['peak_mib']:>11}",
            flush=True,
        )
    if csv_file is None:
        return
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    fresh = not csv_file.exists()
    with csv_file.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine", "time"])
        if fresh:
            writer.writeheader()
        writer.writerows({**row, "machine": machine(), "time": when} for row in rows)
