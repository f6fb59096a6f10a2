"""One rank of test_distributed.py, started with torchrun's variables: python distributed_worker.py FOLDER CHECKS."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import CASES, FLOAT32, LONGER, CutError, config_of, cut, plain_sgd, run_config, trained
from torch import Tensor

from lcr2s_ext.training import TrainingData, TrainingError, prepare_data, train
from lcr2s_ext.training import distributed as ranks
from lcr2s_ext.training.prepare import evaluate_student, evaluate_teacher, make_loader, make_model, make_teacher


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"rank {ranks.rank()}: {what}")


def close(
    name: str, ours: dict[str, Tensor], start: dict[str, Tensor], theirs: dict[str, Tensor], limit: float
) -> None:
    """Steps away from the start agree, relative to the largest step within a tensor."""
    expect(ours.keys() == theirs.keys(), f"{name}: other weights")
    for key, value in theirs.items():
        step = (value - start[key]).abs().max()
        error = float((ours[key] - value).abs().max() / step.clamp(min=1e-30))
        expect(error <= limit, f"{name}, {key}: off by {error:.1e}")


def steps(corpus: str, data: TrainingData, reference: dict[str, Any]) -> None:
    for name in CASES:
        start, end = trained(name, corpus, data)
        close(name, end, start, reference[name], 1e-6)


def evaluation(corpus: str, data: TrainingData, reference: dict[str, Any]) -> None:
    """Batches of 7 rows come out even neither by rows nor by ranks."""
    config = config_of(corpus)
    found = {
        "student": evaluate_student(make_model(config, data), data, "train", batch_size=7, group=ranks.group()),
        "teacher": evaluate_teacher(
            make_teacher(config, data), data, "train", max_support=2, batch_size=7, group=ranks.group()
        ),
    }
    expect(found == reference["metrics"], f"other metrics: {found}")


def refusals(corpus: str, data: TrainingData) -> None:
    for words, expected in (
        (["data.batch_size=13"], "data.batch_size: batches of 13 samples"),
        (["data.sampler=identity", "data.identities=3"], "data.identities: batches of 3 identities"),
    ):
        try:
            make_loader(config_of(corpus, *words), data, "none")
        except TrainingError as error:
            expect(expected in str(error), f"another message: {error}")
        else:
            expect(False, f"{words} were not refused")
    try:
        with ranks.together():
            if ranks.rank() == 1:
                raise OSError("no space left")
    except OSError as error:
        expect(ranks.rank() == 1 and ranks.speaks(error), "the failing rank does not say why")
    except ranks.OtherRankError as error:
        expect(ranks.rank() != 1 and not ranks.speaks(error) and "no space left" in str(error), "said twice")
    else:
        expect(False, "a rank went on without the other")


def sharded(corpus: str, data: TrainingData, reference: dict[str, Any]) -> None:
    with plain_sgd():
        start, end = trained("distilled", corpus, data, *FLOAT32, "strategy=fsdp")
    close("sharded", end, start, reference["distilled, float32"], 1e-3)


def runs(corpus: str, data: TrainingData, folder: Path) -> None:
    whole = train(run_config(corpus, folder / "whole"), data)
    with contextlib.suppress(CutError), cut(epoch=1, step=1):
        train(run_config(corpus, folder / "parts"), data)
    resumed = train(run_config(corpus, folder / "parts"), data, resume=True)
    expect(whole.test == resumed.test and whole.teacher_test == resumed.teacher_test, "resumed: other metrics")
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    expect(all(torch.equal(ours[key], value) for key, value in theirs.items()), "resumed: other weights")
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (whole.val, whole.test, whole.stages["student"].best_epoch))
    expect(all(one == everyone[0] for one in everyone), "ranks disagree on metrics or the best epoch")
    # For one process to end.
    config = run_config(corpus, folder / "sharded", "strategy=fsdp", *LONGER)
    for epoch in (1, 2):
        with contextlib.suppress(CutError), cut(epoch=epoch, step=1):
            train(config, data, resume=epoch == 2)


def main() -> None:
    folder, checks = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    reference = torch.load(folder / "reference.pt", weights_only=True)
    corpus = reference["corpus"]
    config = config_of(corpus)
    ranks.start(config)
    data = prepare_data(config)
    steps(corpus, data, reference)
    evaluation(corpus, data, reference)
    if checks == "everything":
        refusals(corpus, data)
        sharded(corpus, data, reference)
        runs(corpus, data, folder)
    print("same as one process")


if __name__ == "__main__":
    main()
