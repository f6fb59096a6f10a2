"""Runs `lcr2s train` in forked processes that SIGKILL themselves, and resumes it; prints what it found as JSON.

One interpreter imports everything once; each run is a fork of it.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcr2s_ext import cli
from lcr2s_ext.data import TrainingDataset
from lcr2s_ext.training import checkpoints, fit, prepare, run  # noqa: F401, imported before the forks


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_batch(epoch: int, step: int, stage: str) -> Callable[[], None]:
    """While the batch of a step is made."""

    def arm() -> None:
        make_batch = TrainingDataset.make_batch

        def dying(self: TrainingDataset, samples: Any, *rest: Any) -> Any:
            drawn = self.support != "none"
            if (getattr(samples, "epoch", -1), getattr(samples, "step", -1)) == (epoch, step) and (
                drawn == (stage != "warm")
            ):
                die()
            return make_batch(self, samples, *rest)

        TrainingDataset.make_batch = dying  # type: ignore[method-assign]

    return arm


def at_checkpoint(number: int) -> Callable[[], None]:
    """With half of a checkpoint written."""

    def arm() -> None:
        save, seen = torch.save, [0]

        def dying(state: Any, path: Any, *rest: Any) -> None:
            save(state, path, *rest)
            seen[0] += 1
            if seen[0] == number:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        torch.save = dying

    return arm


def at_file(name: str, *, after: bool = False) -> Callable[[], None]:
    """When a file is about to take its place, or has just taken it."""

    def arm() -> None:
        replace = os.replace

        def dying(source: Any, target: Any) -> None:
            if Path(target).name == name and not after:
                die()
            replace(source, target)
            if Path(target).name == name:
                die()

        os.replace = dying  # type: ignore[assignment]

    return arm


MOMENTS: dict[str, Callable[[], None]] = {
    "the first epoch of the first stage": at_batch(0, 1, "warm"),
    "a checkpoint inside an epoch": at_checkpoint(1),
    "an epoch, after a checkpoint inside it": at_batch(1, 3, "warm"),
    "the checkpoint of an epoch": at_checkpoint(3),
    "between a stage's weights and its record": at_file("stage.json"),
    "between two stages": at_file("stage.json", after=True),
    "the second stage": at_batch(1, 2, "teacher"),
    "the model's weights": at_file("model.safetensors"),
    "the results": at_file("results.json"),
}


def command(arguments: list[str], arm: Callable[[], None] | None = None) -> int:
    """Exit status of `lcr2s` in a fork; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if arm is not None:
                arm()
            status = cli.main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    whole, parts, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    report = sys.stdout
    sys.stdout = sys.stderr
    found: dict[str, int] = {"whole": command(["train", "--out", whole, *overrides])}
    resume: list[str] = []
    for moment, arm in MOMENTS.items():
        found[moment] = command(["train", "--out", parts, *resume, *overrides], arm)
        resume = ["--resume"]
    found["resumed"] = command(["train", "--out", parts, *resume, *overrides])
    print(json.dumps(found), file=report)


if __name__ == "__main__":
    main()
