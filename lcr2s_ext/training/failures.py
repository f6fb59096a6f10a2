"""Losses that are not finite: the first bad step is found, no update follows it, and its batch is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcr2s_ext._files import replacing
from lcr2s_ext.data import PersonBatch
from lcr2s_ext.ops import SupportIndex
from lcr2s_ext.training import distributed

__all__ = ["FAILED_BATCH_FILE", "BadStep", "FailedBatch", "FiniteWatch", "load_failed_batch", "save_failed_batch"]

FAILED_BATCH_FILE = "nonfinite_batch.pt"
FORMAT = "lcr2s-failed-batch"


@dataclass
class BadStep:
    """A step whose loss, or gradient, is not finite.

    Attributes:
        epoch: from 0.
        step: within the epoch, from 0.
        terms: the loss and its weighted terms.
        gradient: its norm, where it was looked at.
    """

    epoch: int
    step: int
    terms: dict[str, float]
    gradient: float | None = None


@dataclass
class _Record:
    epoch: int
    step: int
    names: list[str]
    values: Tensor
    gradient: Tensor | None = None


@dataclass
class FiniteWatch:
    """Keeps losses and gradient norms on their device until somebody asks which step was the first bad one.

    From the first bad step on a fused Adam makes no update (its ``found_inf``, a number on the device), so asking
    rarely loses nothing: the weights are still those before that step.
    """

    _records: list[_Record] = field(default_factory=list)
    _bad: Tensor | None = None

    def saw(self, epoch: int, step: int, terms: Mapping[str, Tensor]) -> None:
        """The loss and its terms, scalars, of a batch."""
        self._records.append(
            _Record(epoch, step, list(terms), torch.stack([value.detach().float() for value in terms.values()]))
        )

    def before_update(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter] | None) -> None:
        """The optimiser is about to step; ``parameters`` are those whose gradient is looked at, ``None`` for none."""
        last = self._records[-1]
        finite = torch.cat([record.values for record in self._records]).isfinite().all()
        if parameters is not None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            last.gradient = distributed.full(torch.nn.utils.get_total_norm(gradients))
            finite &= last.gradient.isfinite()
        bad = (~finite).float()
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def first_bad(self) -> tuple[bool, BadStep | None]:
        """Whether any process had a bad step, and the first of this one. Reads the device."""
        if self._bad is None:
            return False, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._bad, torch.distributed.ReduceOp.MAX)
        records, self._records = self._records, []
        if not bool(self._bad):
            return False, None
        for record in records:
            values = record.values.tolist()
            gradient = None if record.gradient is None else float(record.gradient)
            shown = torch.tensor([*values, 0.0 if gradient is None else gradient])
            if not bool(shown.isfinite().all()):
                return True, BadStep(record.epoch, record.step, dict(zip(record.names, values, strict=True)), gradient)
        return True, None


@dataclass
class FailedBatch:
    """What :func:`load_failed_batch` gives.

    Attributes:
        stage: name of the stage.
        bad: the step and its terms.
        seed: of the run.
        step_seeds: of the step's ``dropout`` and ``augment``.
        batch: the batch, on the host, images as uint8.
        state: ``state_dict`` of the stage when it stopped; no update followed the last good step. The running
            statistics of batch normalisation have seen the bad batch, which counts in eval mode only.
    """

    stage: str
    bad: BadStep
    seed: int
    step_seeds: dict[str, int]
    batch: PersonBatch
    state: dict[str, Tensor]


def save_failed_batch(path: str | Path, failed: FailedBatch) -> Path:
    """Write one file of plain tensors, numbers and strings, readable with ``torch.load(..., weights_only=True)``."""
    batch: dict[str, Any] = {}
    for entry in dataclasses.fields(failed.batch):
        value = getattr(failed.batch, entry.name)
        if isinstance(value, SupportIndex):
            value = {"indptr": value.indptr.cpu(), "indices": value.indices.cpu(), "num_rows": value.num_rows}
        batch[entry.name] = value.cpu().clone() if isinstance(value, Tensor) else value
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(
            {
                "format": FORMAT,
                "stage": failed.stage,
                "bad": dataclasses.asdict(failed.bad),
                "seed": failed.seed,
                "step_seeds": failed.step_seeds,
                "batch": batch,
                "state": {name: value.detach().cpu() for name, value in failed.state.items()},
            },
            temporary,
        )
    return path


def load_failed_batch(path: str | Path) -> FailedBatch:
    """Read what a training that stopped at a loss that is not finite has written.

    :func:`~lcr2s_ext.training.replay_failed_batch` computes its terms again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"path: {path} holds no failed batch")
    batch: dict[str, Any] = {
        name: SupportIndex(value["indptr"], value["indices"], value["num_rows"]) if isinstance(value, dict) else value
        for name, value in saved["batch"].items()
    }
    return FailedBatch(
        saved["stage"],
        BadStep(**saved["bad"]),
        saved["seed"],
        saved["step_seeds"],
        PersonBatch(**batch),
        saved["state"],
    )
