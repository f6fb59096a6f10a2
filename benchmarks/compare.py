"""Two revisions of this project against each other in one go.

    python benchmarks/compare.py HEAD~10 --family similarity --rounds 15 -- --batch 1024 --loss sdm
    python benchmarks/run.py --compare HEAD~10 --quick

The other revision is built in a git worktree of its own, with CUDA kernels where the present library has them. Each
revision runs in its own process, on the present benchmarks' inputs; both are checked against float64, then they take
turns, run by run, so that never more than one of them works and whatever else the machine does meets both. Printed is
the other revision's time over the present one's: the median over pairs of runs, with 20th and 80th percentile.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import side_by_side
import torch

ROOT = Path(__file__).resolve().parents[1]
Case = dict[str, Any]
"""What a worker reports of one comparison: title, seconds of every run, the row."""


def build(tree: Path, folder: Path) -> None:
    """Compile the library of the source tree into it; other build products go to `folder`.

    With CUDA kernels where the present library has them; LCR2S_CUDA=0 saves their minutes where a CPU is measured.
    """
    cuda = os.environ.get("LCR2S_CUDA", "1" if torch.ops.lcr2s.compiled_with_cuda() else "0")
    environment = {**os.environ, "LCR2S_BUILD_DIR": str(folder), "LCR2S_CUDA": cuda}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if built.returncode:
        raise SystemExit(f"{tree} does not build:\n{(built.stdout + built.stderr)[-4000:]}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def checked_out(revision: str, make: Callable[[Path, Path], None]) -> Iterator[Path]:
    """The source tree of a revision, built by `make`; gone afterwards, whatever happened."""
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = Path(tempfile.mkdtemp(prefix="lcr2s-compare-"))
    tree = folder / "tree"
    try:
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        make(tree, folder / "build")
        yield tree
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _git("worktree", "prune")


class Worker:
    """A process that measures one revision, a run at a time."""

    def __init__(self, tree: Path, family: str, arguments: Sequence[str]) -> None:
        self.tree = tree
        self.cases: list[Case] = []
        self.running = True
        self._log: TextIO = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        if tree != ROOT:
            environment.pop("LCR2S_LIBRARY", None)
        command = [sys.executable, __file__, "--worker", str(tree), family, *arguments]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._read()

    def turn(self) -> None:
        """Let it do one timed run and whatever lies between that and the next."""
        if self.running and self._process.stdin is not None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            self._read()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            message = json.loads(line)
            if message.get("ready"):
                return
            self.cases.append(message)
        self.running = False
        if self._process.wait():
            self._log.seek(0)
            raise SystemExit(f"{self.tree}: no comparison, its process failed:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class _TakesTurns:
    """The other end of a `Worker`'s pipes."""

    def __init__(self, to_parent: TextIO) -> None:
        self.to_parent = to_parent
        self.seconds: list[float] = []

    def _send(self, message: Case) -> None:
        print(json.dumps(message), file=self.to_parent, flush=True)

    def wait(self) -> None:
        self._send({"ready": True})
        if not sys.stdin.readline():
            raise SystemExit("the comparison was given up")

    def ran(self, name: str, seconds: float) -> None:
        self.seconds.append(seconds)

    def report(self, title: str, rows: list[dict[str, object]]) -> None:
        for row in rows:
            self._send({"title": title, "seconds": self.seconds, "row": row})
        self.seconds = []


def work(tree: str, family: str, arguments: Sequence[str]) -> None:
    """Measure the package of `tree` as the parent says; what it prints itself goes to the error stream."""
    import lcr2s_ext

    if not Path(lcr2s_ext.__file__).is_relative_to(tree):
        raise SystemExit(f"lcr2s_ext comes from {lcr2s_ext.__file__}, not from {tree}")
    with os.fdopen(os.dup(1), "w") as to_parent, contextlib.redirect_stdout(sys.stderr):
        side_by_side.take_turns(_TakesTurns(to_parent))
        importlib.import_module(family).main(arguments)


def measure(trees: Sequence[Path], family: str, arguments: Sequence[str]) -> list[list[Case]]:
    """The cases of each tree, measured in turns."""
    with contextlib.ExitStack() as stack:
        workers = []
        for tree in trees:
            workers.append(Worker(tree, family, arguments))
            stack.callback(workers[-1].close)
        while any(worker.running for worker in workers):
            for worker in workers:
                worker.turn()
    return [worker.cases for worker in workers]


def quantiles(values: Sequence[float]) -> list[float]:
    """20th percentile, median, 80th percentile."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()


def pair(others: list[Case], ours: list[Case]) -> list[tuple[Case, Case, list[float] | None]]:
    """The cases of both with the quantiles of other over present; None where one of them could not run."""
    if [case["title"] for case in others] != [case["title"] for case in ours]:
        raise SystemExit("the two revisions measured different cases")
    return [
        (
            other,
            own,
            quantiles([a / b for a, b in zip(other["seconds"], own["seconds"], strict=True)])
            if other["seconds"] and own["seconds"]
            else None,
        )
        for other, own in zip(others, ours, strict=True)
    ]


def compare_revisions(
    revision: str,
    runs: Sequence[tuple[str, Sequence[str]]],
    *,
    device: str,
    rounds: int,
    csv: Path | None = None,
    make: Callable[[Path, Path], None] = build,
) -> list[tuple[Case, Case, list[float] | None]]:
    """Measure, print and return every case of the runs (family, its arguments), the other revision's first."""
    shared = ["--device", device, "--rounds", str(rounds)]
    shared += ["--provider", device, "--only", f"lcr2s_ext {device}"]
    name = _git("rev-parse", "--short", f"{revision}^{{commit}}")
    result = []
    with checked_out(revision, make) as tree:
        for family, arguments in runs:
            print(f"\n== {family} {' '.join(arguments)}")
            print(f"{name} ms, {side_by_side.commit()} ms, the first over the second [p20, p80]")
            for other, own, ratio in pair(*measure([tree, ROOT], family, [*arguments, *shared])):
                if ratio is None:
                    print(f"{own['title']}: {other['row']['note'] or own['row']['note']}", flush=True)
                else:
                    low, middle, high = ratio
                    print(
                        f"{own['title']}: {other['row']['ms']:.3f}, {own['row']['ms']:.3f}, "
                        f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                        flush=True,
                    )
                    other["row"]["ratio"], own["row"]["ratio"] = round(middle, 4), 1.0
                other["row"]["commit"] = name
                result.append((other, own, ratio))
    if csv is not None:
        settings = side_by_side.Settings(torch.device(device), rounds, False, csv, None)
        side_by_side.write([case["row"] for other, own, _ in result for case in (other, own)], settings)
    return result


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what git calls a commit")
    parser.add_argument("--family", required=True, help="a file of this folder: similarity, relation, ...")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of runs")
    parser.add_argument("--csv", type=Path, help="append both revisions' rows to this file")
    parser.usage = "%(prog)s REVISION --family FAMILY [options] [-- arguments of the family]"
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    runs = [(args.family, sys.argv[end + 1 :])]
    compare_revisions(args.revision, runs, device=args.device, rounds=args.rounds, csv=args.csv)


if __name__ == "__main__":
    main()
