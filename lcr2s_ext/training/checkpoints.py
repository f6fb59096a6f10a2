"""Checkpoints of a stage: after each epoch, every so many steps if asked, and never half of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lcr2s_ext._files import replacing

__all__ = ["AtomicCheckpointIO", "LastCheckpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint that it replaces, and then renames; Lightning's own goes through the system's
    folder for temporary files, from which a move may be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint, the last: of every epoch's end (evaluation included), and every ``every`` steps of the
    optimiser inside epochs; 0 leaves these out.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not between the batches of one accumulated step, nor just before the end of an epoch writes one.
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch
        if self.every and stepped and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
