"""Scaling curves: time and memory against the batch, the size of the sets, the width and the number of threads.

    python benchmarks/scaling.py --limit-gib 2 --csv results.csv
    python benchmarks/scaling.py --sweep sdm/rows --values 512 1024 2048

Each curve runs in a process of its own, with the inputs and the checks against float64 of the families. A candidate
whose address space would grow by more than --limit-gib while it is computed is out of memory: its row says so, and the
curve goes on with the others. On a GPU the memory of the device is the limit. The exponent of a curve is the slope of a
line through the logarithms of its upper half.
"""

import argparse
import contextlib
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import relation
import similarity
import support_attention
import torch
from problem import Problem
from side_by_side import (
    Candidate,
    Settings,
    calibrate,
    compare,
    make_settings,
    out_of_memory,
    report,
    shared_arguments,
    verify,
    write,
)

PART = "forward + backward"


class Sweep(NamedTuple):
    """One curve: the problem at a size, and the sizes."""

    setup: Callable[[int, torch.device, set[str]], Problem]
    values: list[int]
    wanted: frozenset[str] = frozenset({"eager", "cpu", "cuda", "triton"})


def _sdm(rows: int, width: int, device: torch.device, wanted: set[str]) -> Problem:
    return similarity.setup("sdm", rows, width, "float32", device, wanted)


def _attention(rows: int, largest: int, device: torch.device, wanted: set[str]) -> Problem:
    return support_attention.setup(rows, 1024, 8, largest, "float32", device, wanted)


def _threads(setup: Callable[[torch.device, set[str]], Problem]) -> Callable[[int, torch.device, set[str]], Problem]:
    def with_threads(threads: int, device: torch.device, wanted: set[str]) -> Problem:
        torch.set_num_threads(threads)
        return setup(device, wanted)

    return with_threads


THREADS = [2**i for i in range(7) if 2**i <= torch.get_num_threads()]
SWEEPS = {
    "sdm/rows": Sweep(lambda n, *x: _sdm(n, 512, *x), [256, 512, 1024, 2048, 4096, 8192]),
    "sdm/width": Sweep(lambda n, *x: _sdm(2048, n, *x), [128, 256, 512, 1024]),
    "sdm/threads": Sweep(_threads(lambda *x: _sdm(2048, 512, *x)), THREADS),
    "relation_frobenius/rows": Sweep(
        lambda n, *x: relation.setup("frobenius", n, 512, 512, "float32", *x), [256, 512, 1024, 2048, 4096, 8192]
    ),
    "support_attention/rows": Sweep(lambda n, *x: _attention(n, 8, *x), [128, 512, 2048, 8192, 32768]),
    "support_attention/set size": Sweep(lambda n, *x: _attention(2048, n, *x), [2, 4, 8, 16, 32, 64]),
    "support_attention/threads": Sweep(_threads(lambda *x: _attention(4096, 8, *x)), THREADS),
}
"""Operator and what grows."""


@contextlib.contextmanager
def address_space(gib: float, device: torch.device) -> Iterator[None]:
    """Refuse this process more than so much beyond what it holds."""
    if device.type == "cuda":
        yield
        return
    held = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + int(gib * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def within(
    candidate: Candidate, exact: Sequence[torch.Tensor], tolerance: float, title: str, gib: float, device: torch.device
) -> Candidate | str:
    """The candidate, checked; or that it does not fit."""
    try:
        with address_space(gib, device):
            verify(title, candidate(), exact, tolerance)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return "out of memory"
    return candidate


def curve(name: str, values: Sequence[int], args: argparse.Namespace) -> list[dict[str, object]]:
    """Every row of a curve, reported as it grows; a candidate that was out of memory is not tried again."""
    settings: Settings = args.settings
    op, axis = name.split("/")
    threads = torch.get_num_threads()
    full: set[str] = set()
    rows: list[dict[str, object]] = []
    for value in values:
        torch.compiler.reset()
        problem = SWEEPS[name].setup(value, settings.device, set(SWEEPS[name].wanted))
        part = problem.parts[PART]
        found: dict[str, Candidate | str] = {}
        for form_name, form in problem.forms.items():
            if isinstance(form.call, str) or form_name in full:
                found[form_name] = form.call if isinstance(form.call, str) else "out of memory at a smaller size"
                continue
            title = f"{problem.title}, {form_name}"
            candidate = part.candidate(form.call)
            found[form_name] = within(candidate, part.exact, problem.tolerance, title, args.limit_gib, settings.device)
            if found[form_name] == "out of memory":
                full.add(form_name)
        # The limit of the machine with this number of threads.
        here = settings._replace(limits=calibrate(settings.device) if axis == "threads" else settings.limits)
        shape = {**problem.shape, "part": PART, "axis": axis, "value": value}
        if axis == "set size":
            shape["detail"] = str(shape["detail"]).split(", sets")[0]
        made = [{**shape, **row} for row in compare(found, here, "float32", part.work)]
        report(f"{op}, {axis} = {value}: {problem.title}", made, here)
        rows += made
    torch.set_num_threads(threads)
    return rows


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of a least-squares line through the logarithms of the upper half of (size, time) points, at least two."""
    upper = sorted(points)[-max(2, math.ceil(len(points) / 2)) :]
    if len(upper) < 2:
        return None
    x, y = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*upper, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def fits(name: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """A row for each candidate with the exponent of its curve."""
    op, axis = name.split("/")
    result = []
    for candidate in dict.fromkeys(str(row["candidate"]) for row in rows):
        points = [
            (float(str(row["value"])), float(str(row["ms"])))
            for row in rows
            if row["candidate"] == candidate and row.get("ms")
        ]
        slope = exponent(points)
        if slope is None:
            continue
        upper = sorted(points)[-max(2, math.ceil(len(points) / 2)) :]
        result.append(
            {
                "op": op,
                "part": PART,
                "dtype": "float32",
                "axis": axis,
                "candidate": candidate,
                "exponent": round(slope, 3),
                "note": f"{upper[0][0]:.0f} to {upper[-1][0]:.0f}",
            }
        )
        print(f"{name}: {candidate} grows as {axis}^{slope:.2f} between {upper[0][0]:.0f} and {upper[-1][0]:.0f}")
    return result


def apart(name: str, args: argparse.Namespace) -> str:
    """One curve in a process of its own; why it did not come to its end, or nothing."""
    command = [sys.executable, __file__, "--alone", "--sweep", name, "--limit-gib", str(args.limit_gib)]
    command += ["--device", args.device, "--rounds", str(args.rounds)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--values", *map(str, args.values)] if args.values else []
    command += ["--only", *args.only] if args.only else []
    command += ["--csv", str(args.csv)] if args.csv else []
    status = subprocess.run(command, check=False).returncode
    if not status:
        return ""
    return f"the curve's process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--values", type=int, nargs="+", help="sizes instead of a curve's own")
    parser.add_argument("--limit-gib", type=float, default=2.0, help="what a candidate may take on a CPU")
    parser.add_argument("--alone", action="store_true", help="in this process")
    shared_arguments(parser)
    args = parser.parse_args(arguments)
    if args.alone:
        args.settings = make_settings(args)
        for name in args.sweep:
            fitted = fits(name, curve(name, args.values or SWEEPS[name].values, args))
            if args.csv and fitted:
                write(fitted, args.settings)
        return
    print(f"limit of a candidate: {f'{args.limit_gib:g} GiB' if args.device == 'cpu' else 'memory of the device'}")
    failures = [f"{name}: {why}" for name in args.sweep if (why := apart(name, args))]
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
