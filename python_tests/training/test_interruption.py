"""A run that is killed again and again ends with the numbers of one that never was."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcr2s_ext._files import replacing
from lcr2s_ext.training import TrainConfig, TrainingData, dump_config, fit_student

Configure = Callable[..., TrainConfig]

DRIVER = Path(__file__).with_name("interruption_driver.py")


def results(out: Path) -> dict[str, Any]:
    """Everything but the times."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for stage in found["stages"].values():
        del stage["seconds"]
    return found


def test_killed_run_goes_on_to_the_same_numbers(config_of: Configure, tmp_path: Path) -> None:
    config = config_of("checkpoint_every=2", "optim.ema_decay=0.9", "data.batch_size=12", "loggers=[csv]")
    dump_config(config, tmp_path / "run.yaml")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ran = subprocess.run(
        [sys.executable, str(DRIVER), str(whole), str(parts), "--config", str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    statuses = json.loads(ran.stdout)
    assert statuses.pop("whole") == statuses.pop("resumed") == 0, ran.stderr
    assert set(statuses.values()) == {-signal.SIGKILL}, statuses
    assert results(parts) == results(whole)
    names = ["warm/best", "teacher/best", "student/best", "model/model"]
    for name in names:
        ours, theirs = (load_file(out / f"{name}.safetensors") for out in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for stage in ("warm", "teacher", "student"):
        ours, theirs = (torch.load(out / stage / "last.ckpt", weights_only=True) for out in (parts, whole))
        assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
        assert ours["global_step"] == theirs["global_step"]
    assert not list(parts.rglob("*.part"))


def test_file_keeps_its_old_content_where_writing_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as temporary:
            temporary.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_checkpoints_inside_an_epoch_fall_on_steps_of_the_optimiser(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    from lightning.pytorch import Trainer

    saved: list[tuple[int, int]] = []
    save = Trainer.save_checkpoint

    def noting(self: Any, *arguments: Any, **named: Any) -> None:
        saved.append((self.global_step, self.fit_loop.epoch_loop.batch_progress.current.ready))
        save(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "save_checkpoint", noting)
    config = config_of("checkpoint_every=1", f"optim.accumulate={accumulate}", "data.batch_size=16")
    result = fit_student(config, data, epochs=1, out=tmp_path)
    assert [step for step, _ in saved] == list(range(1, result.steps + 1))
    assert all(batches == step * accumulate for step, batches in saved[:-1])
