"""Candidates of one operation side by side: checked against float64, timed in interleaved rounds, memory measured."""

import argparse
import csv
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcr2s_ext import __version__
from lcr2s_ext.ops import _backend, _library

Candidate = Callable[[], list[Tensor]]
DTYPES = ["float32", "bfloat16", "float16"]
RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = [
    *("op", "part", "rows", "columns", "width", "detail", "dtype", "candidate"),
    *("ms_p20", "ms", "ms_p80", "ratio", "cpu_ms", "device_ms", "peak_mib", "limit_ms", "share_of_limit"),
    *("axis", "value", "exponent", "note"),
    *("machine", "driver", "threads", "python", "torch", "triton", "lcr2s_ext", "peers"),
    *("peak_tflops", "copy_gb_per_s", "commit", "time"),
]
"""Columns of the results file, the same for every family.

`ms` is wall time as a caller sees it, with its 20th and 80th percentile, `ratio` the same over the time of our kernel
(of the plain dual encoder for training); `device_ms` a replayed CUDA graph's, with a cold L2; `cpu_ms` processor time
of all threads. `limit_ms` follows from what `calibrate` found, `peak_tflops` (of the row's dtype) and
`copy_gb_per_s`. A row of a scaling curve names the quantity that grows in `axis` and its size in `value`; a row with an
`exponent` is that of a fit and has no times. `note` says why there is no figure, or what is special about it.
"""
PEERS = (
    *("liger-kernel", "inf-cl", "cut-cross-entropy", "quack-kernels", "flash-attn", "torchmetrics"),
    *("pytorch-metric-learning", "faiss-cpu", "faiss-gpu-cu12", "open-clip-torch"),
)
"""Packages whose versions are written beside every figure, where they are installed."""


LONGEST = 20.0
"""Seconds after which a candidate runs in no further round."""


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


class Turns(Protocol):
    """How two processes that measure the same cases take turns (compare.py)."""

    def wait(self) -> None:
        """Return when it is this process's turn."""

    def ran(self, name: str, seconds: float) -> None:
        """Take the time of one run."""

    def report(self, title: str, rows: list[dict[str, object]]) -> None:
        """Take the rows of one comparison."""


class Settings(NamedTuple):
    device: torch.device
    rounds: int
    compile: bool
    csv: Path | None
    limits: Limits | None
    turns: Turns | None = None

    @property
    def ours(self) -> str:
        """The candidate that ratios refer to."""
        return f"lcr2s_ext {self.device.type}"


def machine(device: torch.device) -> str:
    """The processor that the figures belong to."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name = f"{fields.get('model name', name)} family {fields.get('cpu family')} model {fields.get('model')}"
    return f"{name}, {os.cpu_count()} cores"


def results_file(device: torch.device) -> Path:
    """Where this machine's results belong: results/<machine>.csv."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', machine(device).lower()).strip('-')}.csv"


@functools.lru_cache
def _driver(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        version = "unknown"
    return f"{version}, CUDA {torch._C._cuda_getDriverVersion()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def software(device: torch.device) -> dict[str, object]:
    """Machine, driver and versions, as the results file holds them."""
    ours = __version__
    if device.type == "cpu" and _library.compiled():
        ours += f" {_library.ISA_NAMES[torch.ops.lcr2s.cpu_isa()]}"
    return {
        "machine": machine(device),
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "lcr2s_ext": ours,
        "peers": ", ".join(f"{package} {_version(package)}" for package in PEERS if _version(package)),
    }


@functools.lru_cache
def commit() -> str:
    """What git calls the measured tree; "-dirty" where files other than results and pages differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("describe", "--always")
        kept = (":(exclude,top)benchmarks/results", ":(exclude,top)docs")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *kept)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calibrate(device: torch.device) -> Limits:
    """What torch reaches with this number of threads: a copy of 128 MiB (1 GiB on a GPU; bytes read and written) and
    its library's product of two matrices in each dtype. The best of at least five runs and half a second each: what a
    busy machine takes away shows as a slower run, never as a faster one. Measured once in a process.
    """
    return _calibrate(device, torch.get_num_threads())


# The number of threads is an argument so that what was measured with another one is not taken.
@functools.lru_cache
def _calibrate(device: torch.device, threads: int) -> Limits:
    def best(run: Callable[[], object]) -> float:
        run()
        times: list[float] = []
        end = time.perf_counter() + 0.5
        while len(times) < 5 or time.perf_counter() < end:
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


_only: set[str] | None = None
"""Names of the candidates to measure, set by `make_settings`; None for all."""
_parts: set[str] | None = None
"""The same for the parts of a problem."""
_turns: Turns | None = None


def take_turns(turns: Turns) -> None:
    """Make every comparison of this process wait for its turns and report to them."""
    global _turns
    _turns = turns


def selected(candidates: Mapping[str, Candidate | str]) -> dict[str, Candidate | str]:
    """Those of the candidates that --only names."""
    return {name: candidate for name, candidate in candidates.items() if _only is None or name in _only}


def part_selected(name: str) -> bool:
    """Whether --part asks for this part of a problem."""
    return _parts is None or name in _parts


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks have."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager forms")
    parser.add_argument("--only", nargs="+", metavar="CANDIDATE", help="measure these alone, named as in the tables")
    parser.add_argument("--part", nargs="+", help="'forward', 'backward', 'forward + backward'; default: all there are")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that all benchmarks share, added and parsed; `settings` holds what `compare` needs."""
    shared_arguments(parser)
    args = parser.parse_args(arguments)
    args.settings = make_settings(args)
    return args


def make_settings(args: argparse.Namespace) -> Settings:
    """What `compare` needs, of the shared arguments; prints the machine and its limits."""
    global _only, _parts
    _only = set(args.only) if args.only else None
    _parts = set(args.part) if args.part else None
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no usable GPU here")
    if _turns is not None:
        return Settings(device, args.rounds, args.compile, None, None, _turns)
    limits = calibrate(device)
    rates = ", ".join(f"{dtype} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in limits.flops.items())
    versions = software(device)
    print(f"{versions.pop('machine')}: {', '.join(f'{key} {value}' for key, value in versions.items() if value)}")
    print(f"torch reaches: matrix products {rates}; copy {limits.bandwidth / 1e9:.0f} GB/s", flush=True)
    return Settings(device, args.rounds, args.compile, args.csv, limits)


def our_backends(op: str, device: torch.device) -> dict[str, str | None]:
    """Our backends for `device`: name -> None, or why it cannot run here."""
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return {name: _backend.unavailable_reason(op, name, device) for name in names}


def relative_error(result: Tensor, exact: Tensor) -> float:
    """How far a result is from float64, relative, in norm."""
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def verify(name: str, results: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    """End the run where a result is further from float64 than `tolerance`, relative, in norm."""
    for part, (ours, oracle) in enumerate(zip(results, exact, strict=True)):
        error = relative_error(ours, oracle)
        if not error <= tolerance:
            raise SystemExit(f"{name}: result {part} is off by {error:.1e} relative to float64; no times are reported")


def checked(
    found: dict[str, Candidate | str], exact: Sequence[Tensor], tolerance: float, title: str
) -> dict[str, Candidate | str]:
    """The candidates, each verified; one that runs out of memory becomes the row that says so."""
    result = selected(found)
    for name, candidate in result.items():
        if isinstance(candidate, str):
            continue
        try:
            verify(f"{title}, {name}", candidate(), exact, tolerance)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            result[name] = "out of memory"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return result


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation was refused; torch's CPU allocator has no exception of its own for it."""
    words = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


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
    candidates: dict[str, Candidate | str],
    settings: Settings,
    dtype: str,
    work: Work | None = None,
    baseline: str | None = None,
) -> list[dict[str, object]]:
    """One row for each candidate: wall time (median, 20th and 80th percentile) also as a multiple of the baseline's,
    processor time of all threads (CPU) or the time of a replayed CUDA graph (GPU), peak MiB, and the share of the limit
    that `work` sets on this machine.

    Each candidate runs once a round, so that whatever else the machine does meets all of them; processor time is what
    other programs disturb least.

    Args:
        candidates: name -> what to run, or why it cannot.
        settings: of this run.
        dtype: of the inputs, whose rate `work` is held against.
        work: what must be done at least.
        baseline: the candidate that ratios refer to; None for our kernel.
    """
    device = settings.device
    candidates = selected(candidates)
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
            if settings.turns is None and sum(wall[name]) > LONGEST:
                continue
            if settings.turns is not None:
                settings.turns.wait()
            _synchronize(device)
            start, start_processor = time.perf_counter(), time.process_time()
            candidate()
            _synchronize(device)
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_processor)
            if name in graphs:
                on_device[name].append(_device_seconds(graphs[name], flush))
            if settings.turns is not None:
                settings.turns.ran(name, (on_device[name] or wall[name])[-1])
    limit = settings.limits.milliseconds(work, dtype) if work and settings.limits else None
    baseline = settings.ours if baseline is None else baseline
    reference = _quantiles(wall[baseline])[1] if baseline in running else None
    rows: list[dict[str, object]] = []
    for name in candidates:
        row: dict[str, object] = {"candidate": name, "note": notes.get(name, "")}
        if name in running:
            if len(wall[name]) < settings.rounds:
                row["note"] = "; ".join(filter(None, (notes.get(name, ""), f"{len(wall[name])} of the rounds")))
            low, middle, high = _quantiles(wall[name])
            row |= {"ms_p20": round(low, 4), "ms": round(middle, 4), "ms_p80": round(high, 4)}
            row["peak_mib"] = round(memory[name], 1)
            best = middle
            if device.type == "cpu":
                row["cpu_ms"] = round(_quantiles(processor[name])[1], 4)
            elif on_device[name]:
                best = _quantiles(on_device[name])[1]
                row["device_ms"] = round(best, 4)
            if reference:
                row["ratio"] = round(middle / reference, 3)
            if limit:
                row |= {"limit_ms": round(limit, 4), "share_of_limit": round(limit / best, 3)}
        rows.append(row)
    return rows


def report(title: str, rows: list[dict[str, object]], settings: Settings) -> None:
    """Print the rows of one comparison, and append them to the results file where one is given."""
    on_device = "device ms" if settings.device.type == "cuda" else "cpu ms"
    if settings.turns is not None:
        settings.turns.report(title, rows)
        return
    print(f"\n{title}")
    names = max([26, *(len(str(row["candidate"])) + 2 for row in rows)])
    print(f"{'':{names}}{'wall ms [p20, p80]':>34}{'ratio':>9}{on_device:>11}{'of limit':>10}{'peak MiB':>11}")
    for row in rows:
        if "ms" not in row:
            print(f"{row['candidate']:{names}}  {row['note']}")
            continue
        spread = f"{row['ms']:.3f} [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]"
        second = row.get("device_ms", row.get("cpu_ms", ""))
        print(
            f"{row['candidate']:{names}}{spread:>34}{row.get('ratio', ''):>8}x{second:>11}"
            f"{row.get('share_of_limit', ''):>10}{row['peak_mib']:>11}  {row['note']}",
            flush=True,
        )
    if settings.csv is not None:
        write(rows, settings)


def write(rows: list[dict[str, object]], settings: Settings) -> None:
    """Append rows to the results file, each with the machine, the versions, the limits, commit and time."""
    if settings.csv is None:
        raise ValueError("settings.csv: expected a file to write to, got None")
    shared = {
        **software(settings.device),
        "commit": commit(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    settings.csv.parent.mkdir(parents=True, exist_ok=True)
    fresh = not settings.csv.exists()
    if not fresh:
        with settings.csv.open(newline="") as file:
            if next(csv.reader(file), FIELDS) != FIELDS:
                raise SystemExit(f"--csv: {settings.csv} has other columns than this version writes; name another file")
    with settings.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({**shared, **_reached(settings.limits, row), **row})


def _reached(limits: Limits | None, row: Mapping[str, object]) -> dict[str, object]:
    if limits is None:
        return {}
    rate = limits.flops.get(str(row.get("dtype")))
    peak: dict[str, object] = {} if rate is None else {"peak_tflops": round(rate / 1e12, 4)}
    return {**peak, "copy_gb_per_s": round(limits.bandwidth / 1e9, 1)}
