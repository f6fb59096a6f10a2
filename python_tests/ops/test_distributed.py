"""Losses over a process group against one process on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcr2s_ext import ops

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_one_process(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "meeting"
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(ranks), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, text in zip(workers, said, strict=True):
        assert worker.returncode == 0, text
        assert "same as one process" in text


def test_what_is_no_group() -> None:
    features = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"`group` must be a torch\.distributed\.ProcessGroup or None, got str"):
        ops.info_nce_loss(features, features, logit_scale=1.0, group="world")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`group` must be a torch\.distributed\.ProcessGroup or None, got int"):
        ops.relation_frobenius_loss(features, features, features, features, group=2)  # type: ignore[arg-type]
