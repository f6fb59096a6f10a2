"""Candidates of one operation side by side: checked against float64, timed in interleaved rounds, memory measured."""

import argparse
import csv
import ctypes
import datetime
import gc
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lcr2s_ext.ops import _backend, _library

Candidate = Callable[[], list[Tensor]]
DTYPES = ["float32", "bfloat16", "float16"]
FIELDS = [
    *("op", "part", "rows", "columns", "width", "detail", "dtype", "candidate"),
    *("ms_p20", "ms", "ms_p80", "times_the_kernel", "cpu_ms", "device_ms", "peak_mib", "limit_ms", "share_of_limit"),
    *("note", "machine", "commit", "time"),
]
"""Columns of the results file, the same for every family. `ms` is wall time as a caller sees it, `device_ms` a replayed
CUDA graph's, with a cold L2."""


class Work(NamedTuple):
    """What an operation must do at least: arithmetic in the inputs' dtype, and bytes moved once."""

    flops: float = 0.0
    bytes: float = 0.0


class Limits(NamedTuple):
    """What torch reaches on this machine: matrix products in FLOP/s for each dtype, a copy in bytes/s."""

    flops: dict[str, float]
    bandwidth: float

    def milliseconds(self, work: Work, dtype: str) -> float:
        return 1e3 * max(work.flops / self.flops[dtype], work.bytes / self.bandwidth)


class Settings(NamedTuple):
    device: torch.device
    rounds: int
    compile: bool
    csv: Path | None
    limits: Limits

    @property
    def ours(self) -> str:
        """The candidate that ratios refer to."""
        return f"lcr2s_ext {self.device.type}"


def machine(device: torch.device) -> str:
    """The processor and the software that the figures belong to."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = torch._C._cuda_getDriverVersion()
        return (
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, CUDA driver {driver}, "
            f"torch {torch.__version__}"
        )
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name = f"{fields.get('model name', name)} family {fields.get('cpu family')} model {fields.get('model')}"
    isa = _library.ISA_NAMES[torch.ops.lcr2s.cpu_isa()]
    return f"{name}, {torch.get_num_threads()} threads, {isa} kernels, torch {torch.__version__}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calibrate(device: torch.device) -> Limits:
    """Best of three for a large copy (bytes read and written) and a large matrix product in each dtype."""

    def best(run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(3):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    gpu = device.type == "cuda"
    source = torch.randn((1 << 28) if gpu else (1 << 25), device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    size = 8192 if gpu else 1024
    flops = {}
    for dtype in DTYPES:
        # Half products on a CPU without half instructions are a hundred times slower: a smaller one tells as much.
        rows = size if gpu or dtype == "float32" else size // 4
        matrix = torch.randn(rows, size, device=device).to(getattr(torch, dtype))
        flops[dtype] = 2 * rows * rows * size / best(lambda matrix=matrix: matrix @ matrix.T)
    return Limits(flops, bandwidth)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that all benchmarks share, added and parsed; `settings` holds what `compare` needs."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager forms")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    limits = calibrate(device)
    rates = ", ".join(f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in limits.flops.items())
    print(f"{machine(device)}\ntorch reaches: {rates}, copy {limits.bandwidth / 1e9:.0f} GB/s")
    args.settings = Settings(device, args.rounds, args.compile, args.csv, limits)
    return args


def our_backends(op: str, device: torch.device) -> dict[str, str | None]:
    """Our backends for `device`: name -> None, or why it cannot run here."""
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return {name: _backend.unavailable_reason(op, name, device) for name in names}


def verify(name: str, results: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    """End the run where a result is further from float64 than `tolerance`, relative, in norm."""
    for part, (ours, oracle) in enumerate(zip(results, exact, strict=True)):
        error = float((ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-300))
        if not error <= tolerance:
            raise SystemExit(f"{name}: result {part} is off by {error:.1e} relative to float64; no times are reported")


def checked(
    found: dict[str, Candidate | str], exact: Sequence[Tensor], tolerance: float, title: str
) -> dict[str, Candidate | str]:
    """The candidates, each verified; one that runs out of memory becomes the row that says so."""
    result: dict[str, Candidate | str] = {}
    for name, candidate in found.items():
        result[name] = candidate
        if isinstance(candidate, str):
            continue
        try:
            verify(f"{title}, {name}", candidate(), exact, tolerance)
        except torch.OutOfMemoryError:
            result[name] = "out of memory"
            torch.cuda.empty_cache()
    return result


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(candidate: Candidate, device: torch.device) -> float:
    """MiB that a run holds at its peak above what is held before it, outputs included; on the CPU Linux with glibc."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        candidate()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of earlier runs would hide this one's
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    candidate()
    return max(_resident("VmHWM") - before, 0) / 2**20


def _quantiles(seconds: list[float]) -> list[float]:
    return torch.quantile(
        torch.tensor(seconds, dtype=torch.float64) * 1e3, torch.tensor([0.2, 0.5, 0.8]).double()
    ).tolist()


def _capture(candidate: Candidate) -> torch.cuda.CUDAGraph | str:
    """The candidate as a CUDA graph, or why it has none."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            candidate()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            candidate()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return f"no CUDA graph: {str(error).splitlines()[0]}"
    return graph


def _device_seconds(graph: torch.cuda.CUDAGraph, flush: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()  # what the last run left in the L2 cache is gone
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def compare(
    candidates: dict[str, Candidate | str], settings: Settings, dtype: str, work: Work | None = None
) -> list[dict[str, object]]:
    """One row for each candidate: wall time (median, 20th and 80th percentile) also as a multiple of the kernel's,
    processor time of all threads (CPU) or the time of a replayed CUDA graph (GPU), peak MiB, and the share of the limit
    that `work` sets on this machine.

    Each candidate runs once a round, so that whatever else the machine does meets all of them; processor time is what
    other programs disturb least.

    Args:
        candidates: name -> what to run, or why it cannot.
        settings: of this run.
        dtype: of the inputs, whose rate `work` is held against.
        work: what must be done at least.
    """
    device = settings.device
    running = {name: candidate for name, candidate in candidates.items() if not isinstance(candidate, str)}
    notes = {name: candidate for name, candidate in candidates.items() if isinstance(candidate, str)}
    memory = {name: peak_memory(candidate, device) for name, candidate in running.items()}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    if device.type == "cuda":
        flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        for name, candidate in running.items():
            graph = _capture(candidate)
            if isinstance(graph, str):
                notes[name] = graph
            else:
                graphs[name] = graph
    wall: dict[str, list[float]] = {name: [] for name in running}
    processor: dict[str, list[float]] = {name: [] for name in running}
    on_device: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(settings.rounds):
        for name, candidate in running.items():
            _synchronize(device)
            start, start_processor = time.perf_counter(), time.process_time()
            candidate()
            _synchronize(device)
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_processor)
            if name in graphs:
                on_device[name].append(_device_seconds(graphs[name], flush))
    limit = settings.limits.milliseconds(work, dtype) if work else None
    kernel = _quantiles(wall[settings.ours])[1] if settings.ours in running else None
    rows: list[dict[str, object]] = []
    for name in candidates:
        row: dict[str, object] = {"candidate": name, "note": notes.get(name, "")}
        if name in running:
            low, middle, high = _quantiles(wall[name])
            row |= {"ms_p20": round(low, 4), "ms": round(middle, 4), "ms_p80": round(high, 4)}
            row["peak_mib"] = round(memory[name], 1)
            best = middle
            if device.type == "cpu":
                row["cpu_ms"] = round(_quantiles(processor[name])[1], 4)
            elif on_device[name]:
                best = _quantiles(on_device[name])[1]
                row["device_ms"] = round(best, 4)
            if kernel:
                row["times_the_kernel"] = round(middle / kernel, 2)
            if limit:
                row |= {"limit_ms": round(limit, 4), "share_of_limit": round(limit / best, 3)}
        rows.append(row)
    return rows


def report(title: str, rows: list[dict[str, object]], settings: Settings) -> None:
    """Print the rows of one comparison, and append them to the results file where one is given."""
    on_device = "device ms" if settings.device.type == "cuda" else "cpu ms"
    print(f"\n{title}")
    print(f"{'':26}{'wall ms [p20, p80]':>34}{'ratio':>9}{on_device:>11}{'of limit':>10}{'peak MiB':>11}")
    for row in rows:
        if "ms" not in row:
            print(f"{row['candidate']:26}  {row['note']}")
            continue
        spread = f"{row['ms']:.3f} [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]"
        second = row.get("device_ms", row.get("cpu_ms", ""))
        print(
            f"{row['candidate']:26}{spread:>34}{row.get('times_the_kernel', ''):>8}x{second:>11}"
            f"{row.get('share_of_limit', ''):>10}{row['peak_mib']:>11}  {row['note']}",
            flush=True,
        )
    if settings.csv is None:
        return
    shared = {
        "machine": machine(settings.device),
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    fresh = not settings.csv.exists()
    with settings.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
