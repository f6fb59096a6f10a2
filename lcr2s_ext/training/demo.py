"""``lcr2s demo``: generate a corpus, train every arm of the comparison, say what the numbers allow to conclude."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcr2s_ext.training.arms import (
    ARMS,
    DEFAULT_ARMS,
    StageOutcome,
    StagePlan,
    plan_stages,
    remaining_chain,
    total_cost,
    train_stage,
)
from lcr2s_ext.training.config import TrainConfig, load_config, to_dict
from lcr2s_ext.training.summary import (
    conclusions,
    difference_rows,
    format_table,
    summarize,
    table_rows,
)

__all__ = ["add_arguments", "run"]

RESULTS_FILE = "results.json"
TABLE_FILES = ("table.txt", "table.md")
REPORT_FILE = "retrievals.html"

# What docs/demo.md measured on the generated corpus; options and --set win over it.
_SETTINGS = (
    "loggers=[]",
    "progress=none",
    "eval_every=5",
    "data.max_support=3",
    "data.brightness=0.15",
    "data.contrast=0.2",
    "loss.logit_scale=8.333",
    "optim.lr=8e-3",
    "optim.weight_decay=0.1",
    "model.image_encoder={dropout: 0.3}",
    "model.text_encoder={heads: 0, dropout: 0.2}",
)
_QUICK: dict[str, Any] = {
    "identities": [12, 6, 6],
    "epochs": 1,
    "teacher_epochs": 1,
    "fusion_epochs": 1,
    "batch_size": 16,
    "jobs": 1,
}
_QUERIES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--out", metavar="DIR", default="demo_out", help="folder of everything written (default: demo_out)"
    )
    parser.add_argument(
        "--full", action="store_true", help="all eight arms; with --seeds and --corpora over several runs"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="training seeds a corpus (default: 1)")
    parser.add_argument("--corpora", type=int, default=1, metavar="M", help="generated corpora (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="first seed of both (default: 0)")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help=f"arms to train: {' '.join(ARMS)} (default: {' '.join(DEFAULT_ARMS)})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a miniature run of seconds: shows that it works, nothing else"
    )
    size = parser.add_argument_group("sizes")
    size.add_argument(
        "--identities", type=int, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="of the corpus (default: 300 100 150)"
    )
    size.add_argument("--views", type=int, default=4, help="pictures of an identity (default: 4)")
    size.add_argument("--captions", type=int, default=2, help="sentences of a picture (default: 2)")
    size.add_argument("--epochs", type=int, help="epochs of a student and of the warm start (default: 30)")
    size.add_argument("--teacher-epochs", type=int, help="epochs of the teacher stage (default: 20)")
    size.add_argument(
        "--fusion-epochs", type=int, help="epochs of the fusion on frozen encoders, arm (d') (default: 8)"
    )
    size.add_argument("--batch-size", type=int, help="captions in a random batch (default: 64)")
    choice = parser.add_argument_group("choices")
    choice.add_argument(
        "--teacher-start",
        choices=("warm", "scratch", "auxiliary", "frozen"),
        default="warm",
        help="encoders from arm (b); from scratch; from scratch with the losses on single features as well; "
        "MHAF alone on the frozen encoders of (b) (default: warm)",
    )
    choice.add_argument(
        "--sampler",
        choices=("random", "identity"),
        default="random",
        help="random batches with drawn support, or P x K batches whose support comes from the batch (default: random)",
    )
    choice.add_argument(
        "--no-fusion-norm", action="store_true", help="leave out the LayerNorm between encoders and fusion"
    )
    choice.add_argument(
        "--no-feature-norm",
        action="store_true",
        help="compare features of teacher and student without L2 normalisation",
    )
    choice.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the training configuration; may be repeated",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--jobs", type=int, help="stages trained at the same time (default: one a core, at most 8)")
    machine.add_argument("--threads", type=int, help="threads a job (default: cores divided by jobs)")
    machine.add_argument("--device", default="cpu", help="cpu, gpu or auto (default: cpu)")


@dataclass
class _Run:
    """One corpus and one seed."""

    corpus: int
    seed: int
    root: str
    folder: Path
    config: TrainConfig
    stages: dict[str, StagePlan]
    outcomes: dict[str, StageOutcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"corpus{self.corpus}-seed{self.seed}"

    @property
    def finished(self) -> bool:
        return len(self.outcomes) == len(self.stages)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when everything was trained and written."""
    started = time.perf_counter()
    _check(args)
    out = Path(args.out)
    say = _Sayer(started)
    arms = _arms(args)
    cores = _cores()
    config = _configuration(args, out)
    jobs = args.jobs or (_QUICK["jobs"] if args.quick else min(cores, 8))
    threads = args.threads or max(1, cores // jobs)
    fusion_epochs = args.fusion_epochs or (_QUICK["fusion_epochs"] if args.quick else 8)
    stages = plan_stages(config, arms, fusion_epochs)
    # The corpus is drawn while workers would still be starting: seconds.
    roots = _make_corpora(args, out, say)
    runs = [
        _Run(
            corpus,
            seed,
            root,
            out / "models" / f"corpus{corpus}-seed{seed}",
            _of_run(config, root, seed, threads),
            stages,
        )
        for corpus, root in roots.items()
        for seed in range(args.first_seed, args.first_seed + args.seeds)
    ]
    say(
        f"{len(runs)} run{'s' * (len(runs) > 1)} of {len(stages)} stages for the arms "
        f"{' '.join(f'({arm})' for arm in arms)}; {jobs} at a time, {threads} thread{'s' * (threads > 1)} each"
    )
    training = time.perf_counter()
    settings = {"jobs": jobs, "threads": threads, "machine": _machine(cores), "config": to_dict(config)}

    def write() -> None:
        now = time.perf_counter()
        seconds = {"corpus": training - started, "training": now - training, "total": now - started}
        _write(args, out, [one for one in runs if one.finished], arms, settings, seconds)

    # Written after each run: what has been measured is not lost with the runs that follow.
    _train(runs, jobs, threads, say, write)
    print(f"\n{(out / TABLE_FILES[0]).read_text(encoding='utf-8')}")
    say(f"written to {out}: {', '.join((*TABLE_FILES, RESULTS_FILE, REPORT_FILE))}, models/")
    return 0


def _write(
    args: argparse.Namespace,
    out: Path,
    runs: Sequence[_Run],
    arms: Sequence[str],
    settings: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Write tables, page and results of the finished runs."""
    finished = [_record(one, arms) for one in runs]
    summary = summarize(finished, arms)
    rows, differences = table_rows(finished, summary), difference_rows(summary)
    said = conclusions(finished, summary)
    title = _title(args, runs, runs[0].config)
    for name, markdown in zip(TABLE_FILES, (False, True), strict=True):
        (out / name).write_text(_document(title, rows, differences, said, markdown=markdown), encoding="utf-8")
    _write_page(out, runs[0], arms, title, rows, said)
    results = {
        "what": "lcr2s demo on a GENERATED corpus; fractions, test split touched once by each arm",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "options": {key: value for key, value in vars(args).items() if key not in ("function", "overrides")},
        **settings,
        "stages": {name: asdict(stage) for name, stage in runs[0].stages.items()},
        "arms": {arm: {"title": ARMS[arm].title, "purpose": ARMS[arm].purpose} for arm in arms},
        "seconds": seconds,
        "runs_planned": args.seeds * args.corpora,
        "runs": finished,
        "summary": summary,
        "conclusions": said,
    }
    (out / RESULTS_FILE).write_text(json.dumps(_finite(results), indent=1) + "\n", encoding="utf-8")


def _check(args: argparse.Namespace) -> None:
    for name in (
        "seeds",
        "corpora",
        "views",
        "captions",
        "epochs",
        "teacher_epochs",
        "fusion_epochs",
        "jobs",
        "threads",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if args.first_seed < 0:
        raise ValueError(f"--first-seed: expected at least 0, got {args.first_seed}")
    if args.identities is not None and min(args.identities) < 1:
        raise ValueError(f"--identities: expected three positive ints, got {args.identities}")


def _arms(args: argparse.Namespace) -> list[str]:
    wanted = args.arms or (list(ARMS) if args.full else list(DEFAULT_ARMS))
    unknown = [arm for arm in wanted if arm not in ARMS]
    if unknown:
        raise ValueError(f"--arms: expected some of {' '.join(ARMS)}, got {' '.join(unknown)}")
    return [arm for arm in ARMS if arm in wanted]


def _configuration(args: argparse.Namespace, out: Path) -> TrainConfig:
    quick = _QUICK if args.quick else {}

    def pick(name: str, default: int | None) -> Any:
        given = getattr(args, name)
        return quick.get(name, default) if given is None else given

    given = {
        "epochs": pick("epochs", 30),
        "teacher.epochs": pick("teacher_epochs", 20),
        "teacher.start": args.teacher_start,
        "data.sampler": args.sampler,
        "data.support": "batch" if args.sampler == "identity" else "drawn",
        "model.fusion_input_norm": not args.no_fusion_norm,
        "distill.feature_normalize": not args.no_feature_norm,
        "device": args.device,
    }
    size = pick("batch_size", None)
    if size is not None:
        given["data.batch_size"] = size
    return load_config(None, [*_SETTINGS, *(f"{key}={json.dumps(value)}" for key, value in given.items()), *args.set])


def _of_run(config: TrainConfig, root: str, seed: int, threads: int) -> TrainConfig:
    return load_config(
        None, [f"seed={seed}", f"threads={threads}", f"data.root={json.dumps(root)}"], base=to_dict(config)
    )


def _make_corpora(args: argparse.Namespace, out: Path, say: _Sayer) -> dict[int, str]:
    from lcr2s_ext.data import generate_corpus

    identities = args.identities or (_QUICK["identities"] if args.quick else [300, 100, 150])
    roots = {}
    for number in range(args.first_seed, args.first_seed + args.corpora):
        root = out / f"corpus{number}"
        folder = generate_corpus(
            root, identities=tuple(identities), views=args.views, captions_per_image=args.captions, seed=number
        )
        roots[number] = str(root)
        say(f"generated corpus {number}: {' / '.join(map(str, identities))} identities in {folder}")
    return roots


class _Sayer:
    """Prints lines with the time since the start."""

    def __init__(self, started: float) -> None:
        self.started = started

    def __call__(self, line: str) -> None:
        seconds = time.perf_counter() - self.started
        print(f"[{int(seconds) // 60:3d}:{int(seconds) % 60:02d}] {line}", flush=True)


def _left(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


class _Progress:
    """Which stages run, how far they are, and how long the rest will take at the pace so far."""

    def __init__(self, runs: Sequence[_Run], jobs: int, say: _Sayer) -> None:
        self.say, self.jobs = say, jobs
        self.plans = {(one.name, stage.name): stage for one in runs for stage in one.stages.values()}
        self.chains = {one.name: remaining_chain(one.stages) for one in runs}
        self.many = len(runs) > 1
        self.total = sum(total_cost(one.stages) for one in runs)
        self.epochs: dict[tuple[str, str], int] = {}
        self.finished: set[tuple[str, str]] = set()
        self.started = self.last = time.perf_counter()

    def epoch(self, key: tuple[str, str], epochs: int) -> None:
        self.epochs[key] = epochs
        if time.perf_counter() - self.last > 15:
            self.last = time.perf_counter()
            running = ", ".join(
                f"{self._name(other)} {done}/{self.plans[other].epochs}"
                for other, done in self.epochs.items()
                if other not in self.finished
            )
            self.say(f"epoch of {running}; {self.left()}")

    def done(self, key: tuple[str, str], outcome: StageOutcome) -> None:
        self.finished.add(key)
        self.epochs[key] = self.plans[key].epochs
        self.last = time.perf_counter()
        scores = []
        for arm, splits in outcome.metrics.items():
            split = "test" if "test" in splits else "val" if "val" in splits else None
            if split is not None:
                name = f"({arm})" if arm in ARMS else arm
                scores.append(f"{name} {split} R@1 {100 * splits[split]['text_to_image']['R@1']:.1f}")
        self.say(f"{self._name(key)}: {'; '.join(scores)} [{outcome.seconds:.0f} s]; {self.left()}")

    def left(self) -> str:
        done = sum(count * self.plans[key].cost for key, count in self.epochs.items())
        if not done or len(self.finished) == len(self.plans):
            return "done" if len(self.finished) == len(self.plans) else "time left not known yet"
        pace = done / (time.perf_counter() - self.started)
        # The last chain of stages runs alone: the others' cores do not help it.
        chain = max(
            self.chains[key[0]][key[1]] - self.epochs.get(key, 0) * plan.cost
            for key, plan in self.plans.items()
            if key not in self.finished
        )
        return f"about {_left(max((self.total - done) / pace, chain / (pace / self.jobs)))} left"

    def _name(self, key: tuple[str, str]) -> str:
        plan = self.plans[key]
        arms = "".join(f"({arm})" for arm in plan.arms)
        text = f"{arms} {plan.name}" if arms else plan.name
        return f"{key[0]} {text}" if self.many else text


def _train(runs: Sequence[_Run], jobs: int, threads: int, say: _Sayer, after_run: Callable[[], object]) -> None:
    """Train all stages of all runs, at most ``jobs`` at a time, each as soon as what it needs is there."""
    progress = _Progress(runs, jobs, say)
    if jobs == 1:
        for one in runs:
            for stage in one.stages.values():
                key = (one.name, stage.name)
                outcome = _stage(stage, one.config, one.folder, lambda epochs, key=key: progress.epoch(key, epochs))  # type: ignore[misc]
                one.outcomes[stage.name] = outcome
                progress.done(key, outcome)
            after_run()
        return
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    stop = context.Event()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(threads, messages, stop))
    pending: dict[Future[StageOutcome], tuple[_Run, str]] = {}
    try:
        while not all(one.finished for one in runs):
            for one, stage in _ready(runs, {(one.name, name) for one, name in pending.values()}, jobs - len(pending)):
                pending[pool.submit(_stage_in_worker, stage, one.config, one.folder, (one.name, stage.name))] = (
                    one,
                    stage.name,
                )
            done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for key, epochs in _drain(messages):
                progress.epoch(key, epochs)
            for future in done:
                one, name = pending.pop(future)
                one.outcomes[name] = future.result()
                progress.done((one.name, name), one.outcomes[name])
                if one.finished:
                    after_run()
    finally:
        # After a failure the other stages end with their epoch instead of running to their end unheard.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _ready(runs: Sequence[_Run], running: set[tuple[str, str]], room: int) -> list[tuple[_Run, StagePlan]]:
    """Stages that can start now: those of the first runs first, then those with the longest chain behind them."""
    ready = [
        (one, stage)
        for one in runs
        for stage in one.stages.values()
        if stage.name not in one.outcomes
        and (one.name, stage.name) not in running
        and all(need in one.outcomes for need in stage.needs)
    ]
    chains = {one.name: remaining_chain(one.stages) for one in runs}
    order = {one.name: number for number, one in enumerate(runs)}
    ready.sort(key=lambda item: (order[item[0].name], -chains[item[0].name][item[1].name]))
    return ready[: max(0, room)]


def _drain(messages: Any) -> Iterator[tuple[tuple[str, str], int]]:
    while True:
        try:
            yield messages.get_nowait()
        except queue.Empty:
            return


_worker_messages: Any = None
_worker_stop: Any = None
_corpora: dict[str, Any] = {}


def _start_worker(threads: int, messages: Any, stop: Any) -> None:
    import torch

    global _worker_messages, _worker_stop
    _worker_messages, _worker_stop = messages, stop
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent cannot stop its workers, which would train on for nobody.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _stage_in_worker(stage: StagePlan, config: TrainConfig, folder: Path, key: tuple[str, str]) -> StageOutcome:
    def on_epoch(epochs: int) -> None:
        if _worker_stop.is_set():
            raise InterruptedError("another stage failed")
        _worker_messages.put((key, epochs))

    return _stage(stage, config, folder, on_epoch)


def _stage(stage: StagePlan, config: TrainConfig, folder: Path, on_epoch: Callable[[int], None]) -> StageOutcome:
    from lcr2s_ext.training.prepare import prepare_data

    if config.data.root not in _corpora:
        # One corpus at a time: runs are ordered by corpus, and a decoded one is tens of megabytes.
        _corpora.clear()
        _corpora[config.data.root] = prepare_data(config)
    return train_stage(stage, config, _corpora[config.data.root], folder, on_epoch=on_epoch)


def _record(one: _Run, arms: Sequence[str]) -> dict[str, Any]:
    """Everything measured in a run, as it goes into the results file."""

    def steps(name: str) -> int:
        seen: set[str] = set()
        names = [name]
        while names:
            current = names.pop()
            if current not in seen:
                seen.add(current)
                names += one.stages[current].needs
        return sum(one.outcomes[stage].steps for stage in seen)

    measured = {}
    for arm in arms:
        outcome = one.outcomes[ARMS[arm].stage]
        measured[arm] = {
            **outcome.metrics[arm],
            "stage": outcome.name,
            "steps": outcome.steps,
            "total_steps": steps(outcome.name),
            "best_epoch": outcome.best_epoch,
        }
    return {
        "corpus": one.corpus,
        "seed": one.seed,
        "arms": measured,
        "stages": {name: asdict(outcome) for name, outcome in one.outcomes.items()},
    }


def _title(args: argparse.Namespace, runs: Sequence[_Run], config: TrainConfig) -> str:
    planned = args.corpora * args.seeds
    done = "" if len(runs) == planned else f"{len(runs)} finished of "
    count = f"{done}{planned} run{'s' * (planned > 1)} ({args.corpora} x {args.seeds} corpora x seeds)"
    kind = "miniature, figures mean nothing" if args.quick else "generated corpus, held-out identities"
    return (
        f"LCR²S demo, text to image on test, percent; {kind}; {count}; {config.epochs} epochs a student, "
        f"{config.teacher_epochs} the teacher ({config.teacher.start} start)"
    )


def _document(
    title: str,
    rows: Sequence[dict[str, str]],
    differences: Sequence[dict[str, str]],
    said: Sequence[str],
    *,
    markdown: bool,
) -> str:
    parts = [f"# {title}" if markdown else title, format_table(rows, markdown=markdown)]
    if differences:
        parts.append(format_table(differences, markdown=markdown))
    parts.append(
        "(c) is an oracle: it is handed support sets by identity at test. steps: optimiser steps of the arm's stages "
        "together, those of its teacher and warm start included."
    )
    parts.append("\n".join(f"- {line}" for line in said) if markdown else "\n".join(said))
    return "\n\n".join(parts) + "\n"


def _write_page(
    out: Path, first: _Run, arms: Sequence[str], title: str, rows: Sequence[dict[str, str]], said: Sequence[str]
) -> None:
    """Ranked retrievals of one student, for captions spread evenly over the test split: not chosen for their look."""
    from lcr2s_ext.data import ImageStore, load_dataset
    from lcr2s_ext.models import LCR2S
    from lcr2s_ext.retrieval import embed_split
    from lcr2s_ext.retrieval.report import rank_queries, write_report

    students = [arm for arm in ("d", "d'", "e", "b+", "b", "a") if arm in arms]
    notes = [
        "The corpus is generated: pedestrians are drawn, sentences put together. Figures measured on it say nothing "
        "about figures on a real dataset.",
        *said,
    ]
    ranked = []
    if students:
        model = LCR2S.from_pretrained(first.folder / ARMS[students[0]].stage)
        split = load_dataset("cuhk-pedes", first.root)["test"]
        store = ImageStore(split.image_paths, model.image_size)
        features = embed_split(model.encode_image, model.encode_text, split, store)
        count = len(split.captions)
        chosen = [number * count // _QUERIES for number in range(min(_QUERIES, count))]
        ranked = rank_queries(features, split, sorted(set(chosen)))
        notes.append(
            f"Below: arm ({students[0]}), {first.name}. For {len(ranked)} captions spread evenly over the test split "
            "the ten best of all test images; a green frame marks an image of the person the caption was written for."
        )
    write_report(out / REPORT_FILE, ranked, title=title, notes=notes, table=rows)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(cores: int) -> dict[str, Any]:
    found: dict[str, Any] = {"platform": platform.platform(), "cores": cores, "cpu": platform.processor()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        found["cpu"] = named[0] if named else found["cpu"]
    return found


def _versions() -> dict[str, str]:
    import importlib.metadata

    from lcr2s_ext._version import __version__

    found = {"lcr2s_ext": __version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "kornia", "tokenizers", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


def _finite(value: Any) -> Any:
    # JSON has no NaN: a metric without any query is null.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
