"""Training in several processes (gloo) against one process on the whole batch."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcr2s_ext.training import ConfigError, TrainConfig, prepare_data, train
from lcr2s_ext.training import distributed as ranks
from lcr2s_ext.training.prepare import evaluate_student, evaluate_teacher, make_model, make_teacher

sys.path.insert(0, str(Path(__file__).resolve().parent))
from distributed_cases import CASES, FLOAT32, LONGER, config_of, plain_sgd, run_config, trained

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds, for the workers to read."""
    folder = tmp_path_factory.mktemp("distributed")
    root = str(corpus)
    config = config_of(root)
    data = prepare_data(config)
    reference: dict[str, Any] = {"corpus": root}
    for name in CASES:
        reference[name] = trained(name, root, data)[1]
    with plain_sgd():
        reference["distilled, float32"] = trained("distilled", root, data, *FLOAT32)[1]
    reference["metrics"] = {
        "student": evaluate_student(make_model(config, data), data, "train", batch_size=7),
        "teacher": evaluate_teacher(make_teacher(config, data), data, "train", max_support=2, batch_size=7),
    }
    torch.save(reference, folder / "reference.pt")
    return folder


def processes(
    command: list[str], environment: Callable[[int, int], dict[str, str]], count: int
) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            | environment(rank, count),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [(worker.wait(timeout=400), worker.communicate()[0]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def as_torchrun(rank: int, count: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    return {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": "none"}


def as_srun(rank: int, count: int) -> dict[str, str]:
    names = {"PROCID": rank, "LOCALID": rank, "NTASKS": count, "NTASKS_PER_NODE": count, "NNODES": 1, "NODEID": 0}
    names |= {"JOB_ID": 7, "STEP_ID": 0}
    return {f"SLURM_{name}": str(value) for name, value in names.items()} | {"SLURM_NODELIST": "127.0.0.1"}


def test_four_processes_are_as_one(folder: Path) -> None:
    for code, text in processes([str(WORKER), str(folder), "steps"], as_srun, 4):
        assert code == 0, text
        assert "same as one process" in text


def test_two_processes_are_as_one_and_their_runs_resume(folder: Path, corpus: Path) -> None:
    for code, text in processes([str(WORKER), str(folder), "everything"], as_torchrun, 2):
        assert code == 0, text
        assert "same as one process" in text
    saved = json.loads((folder / "whole" / "results.json").read_text())
    assert set(saved["stages"]) == {"warm", "teacher", "student"}
    assert {path.name for path in (folder / "whole").iterdir()} == {
        *("train.yaml", "results.json", "model", "warm", "teacher", "student")
    }
    # Two processes with sharded weights began it, one ends it.
    config = run_config(str(corpus), folder / "sharded", *LONGER)
    begun = {name: (folder / "sharded" / name / "stage.json").read_text() for name in ("warm", "teacher")}
    ended = train(config, resume=True)
    alone = train(run_config(str(corpus), folder / "alone", *LONGER))
    assert begun == {name: (folder / "sharded" / name / "stage.json").read_text() for name in begun}
    assert ended.stages["student"].steps == alone.stages["student"].steps
    assert [entry["epoch"] for entry in ended.stages["student"].history] == [1, 2, 3]
    start = make_model(config, prepare_data(config)).state_dict()
    ours, theirs = ended.model.state_dict(), alone.model.state_dict()
    apart = torch.cat([(ours[key] - theirs[key]).flatten() for key in start])
    moved = torch.cat([(theirs[key] - start[key]).flatten() for key in start])
    assert float(apart.norm()) <= 0.05 * float(moved.norm())


TWO_RUNS = """
import sys
from lcr2s_ext.cli import main

words = ["train", "--out", sys.argv[1], *sys.argv[2:]]
codes = [main([*words, "data.batch_size=9"]), main(words)]
sys.exit(codes != [1, 0])
"""


def test_command_starts_its_processes_and_one_of_them_speaks(corpus: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "two_runs.py", tmp_path / "out"
    script.write_text(TWO_RUNS)
    words = ["--dataset", "cuhk-pedes", "--root", str(corpus), "--method", "plain", "--epochs", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(script), str(out), *words, "devices=2", "threads=1", "data.batch_size=8"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("data.batch_size: batches of 9 samples are the whole batch") == 1
    assert done.stderr.count("student: ") == 1
    assert done.stdout.count("test (%)") == 1
    assert json.loads((out / "results.json").read_text())["stages"]["student"]["steps"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["devices=3"], r"devices: expected auto or 4, what torchrun started, got 3"),
        (["nodes=2"], r"nodes: expected auto or 1, what torchrun started, got 2"),
        (["sync_batchnorm=true"], r"sync_batchnorm: torch has it for GPUs only"),
    ],
)
def test_what_does_not_fit_the_launcher(
    config_of: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    for name, value in as_torchrun(0, 4).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        ranks.start(config_of(*words))


def test_processes_and_strategy_are_checked(config_of: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="devices: expected auto or a positive int, got 0"):
        config_of("devices=0")
    with pytest.raises(ConfigError, match="strategy: expected one of auto, ddp, fsdp, got 'fdsp'; did you mean fsdp"):
        config_of("strategy=fdsp")
    with pytest.raises(ConfigError, match="nodes: start several nodes with torchrun or srun"):
        ranks.start(config_of("nodes=2"))
