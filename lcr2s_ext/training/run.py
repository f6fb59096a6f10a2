"""Training in plain Python: data, the stages one by one, and whole runs."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcr2s_ext.data import (
    BatchAugment,
    CaptionTokenizer,
    IdentityBatchSampler,
    ImageStore,
    PersonBatch,
    PersonSplit,
    RandomBatchSampler,
    TrainingDataset,
    load_dataset,
)
from lcr2s_ext.models import (
    IMAGE_MEAN,
    IMAGE_STD,
    LCR2S,
    PRESETS,
    DualEncoder,
    SavedTokenizer,
    Teacher,
    normalize_images,
)
from lcr2s_ext.retrieval import Retrieval, RetrievalFeatures, embed_split, evaluate_model, evaluate_oracle
from lcr2s_ext.training.config import ConfigError, TrainConfig, dump_config, load_config, to_dict
from lcr2s_ext.training.stages import OneStage, Stage, StudentStage, TeacherStage, TrainingError, step_seed

__all__ = [
    "BatchLoader",
    "StageResult",
    "TrainResult",
    "TrainingData",
    "evaluate_student",
    "evaluate_teacher",
    "fit_one_stage",
    "fit_student",
    "fit_teacher",
    "make_loader",
    "prepare_data",
    "train",
]

CONFIG_FILE = "train.yaml"
RESULTS_FILE = "results.json"
MODEL_FOLDER = "model"
STAGE_FILE = "stage.json"
CHECKPOINT_FILE = "last.ckpt"
STAGE_WEIGHTS = "best.safetensors"
TEACHER_WEIGHTS = "teacher.safetensors"
DEFAULT_BATCH = 64


@dataclass
class TrainingData:
    """A corpus in memory: splits, decoded images, tokenizer, tokens. One instance serves any number of runs."""

    splits: dict[str, PersonSplit]
    stores: dict[str, ImageStore]
    tokenizer: CaptionTokenizer | SavedTokenizer
    tokens: dict[str, Tensor]
    image_size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    """Statistics that the encoders' images are normalised with."""

    def has(self, split: str) -> bool:
        """Whether the corpus has captions in this split."""
        return split in self.splits and len(self.splits[split].captions) > 0


@dataclass
class StageResult:
    """What a stage leaves behind.

    Attributes:
        name: of the stage.
        model: :class:`LCR2S` of a student stage, :class:`Teacher` of a teacher stage; best weights on val, eval mode.
        val: metrics of these weights on val (a teacher's with oracle support), ``None`` without a val split.
        best_epoch: epoch (from 1) of these weights.
        history: val metrics of every evaluation.
        steps: optimiser steps taken.
        seconds: wall time of this process, evaluations included.
    """

    name: str
    model: Any
    val: Retrieval | None
    best_epoch: int
    history: list[dict[str, Any]]
    steps: int
    seconds: float


@dataclass
class TrainResult:
    """A finished run: the student, its teacher if it had one, the stages and the metrics of val and test."""

    model: LCR2S
    teacher: Teacher | None
    stages: dict[str, StageResult]
    val: Retrieval | None
    test: Retrieval | None
    teacher_test: dict[str, Retrieval] = field(default_factory=dict)
    """``oracle`` (support sets drawn by identity) and ``no_support``."""
    out: Path | None = None


class BatchLoader:
    """Epochs of :class:`PersonBatch`; Lightning tells the sampler which epoch it is.

    Batches carry their epoch and step, so they are the same whether this process makes them or workers do.
    """

    def __init__(
        self, dataset: TrainingDataset, batches: RandomBatchSampler | IdentityBatchSampler, workers: int = 0
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.workers = workers

    @property
    def sampler(self) -> BatchLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PersonBatch]:
        # A generator: nothing is drawn before the first batch is asked for, which is after `set_epoch`.
        if self.workers:
            yield from self.dataset.loader(self.batches, num_workers=self.workers)
        else:
            for samples in self.batches:
                yield self.dataset.make_batch(samples)


def prepare_data(config: TrainConfig, *, tokenizer: CaptionTokenizer | SavedTokenizer | None = None) -> TrainingData:
    """Read the dataset of a configuration. Its tokenizer is the given one, that of ``model.text_weights``, or trained
    on the train captions.
    """
    if not config.data.root:
        raise ConfigError("data.root: expected the folder that holds the dataset, got none")
    splits = load_dataset(config.data.dataset, config.data.root)
    if "train" not in splits or not len(splits["train"].captions):
        raise TrainingError(f"data.root: {config.data.root} has no captions in split train")
    size = model_size(config)
    if tokenizer is None and config.model.text_weights:
        tokenizer = SavedTokenizer.from_pretrained(config.model.text_weights, config.data.max_length)
    if tokenizer is None:
        tokenizer = CaptionTokenizer.train(
            splits["train"].captions, vocab_size=config.data.vocab_size, max_length=config.data.max_length
        )
    stores = {
        name: ImageStore(split.image_paths, size, cache=config.data.cache, cache_dir=config.data.cache_dir or None)
        for name, split in splits.items()
    }
    tokens = {name: tokenizer.encode(split.captions) for name, split in splits.items() if len(split.captions)}
    preset = PRESETS[config.model.preset]
    mean, std = preset.get("mean", IMAGE_MEAN), preset.get("std", IMAGE_STD)
    return TrainingData(splits, stores, tokenizer, tokens, size, mean, std)


def model_size(config: TrainConfig) -> tuple[int, int]:
    """``(H, W)`` of the images of a configuration."""
    if config.model.preset not in PRESETS:
        raise ConfigError(f"model.preset: expected one of {', '.join(PRESETS)}, got {config.model.preset!r}")
    size = config.model.image_size or PRESETS[config.model.preset]["image_size"]
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"model.image_size: expected two positive ints [H, W], got {size}")
    return int(size[0]), int(size[1])


def make_model(config: TrainConfig, data: TrainingData) -> LCR2S:
    """Fresh student of a configuration; its weights depend on the seed alone."""
    model = config.model
    return LCR2S.from_preset(
        model.preset,
        vocab_size=data.tokenizer.vocab_size,
        tokenizer=data.tokenizer,
        seed=step_seed(config.seed, 0, 0, 10),
        width=model.width,
        image_size=data.image_size,
        max_length=data.tokenizer.max_length,
        image_encoder=model.image_encoder,
        text_encoder=model.text_encoder,
        image_weights=model.image_weights or None,
        text_weights=model.text_weights or None,
    )


@contextmanager
def _weights_seed(config: TrainConfig, purpose: int) -> Iterator[None]:
    """Fresh weights drawn inside depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(step_seed(config.seed, 0, 0, purpose))
        yield


def make_teacher(config: TrainConfig, data: TrainingData, encoders: DualEncoder | None = None) -> Teacher:
    """Fresh teacher of a configuration; ``encoders`` gives the encoders' weights, copied."""
    shell = make_model(config, data)
    with _weights_seed(config, 11):
        teacher = shell.make_teacher(
            num_heads=config.model.heads,
            feed_forward=config.model.feed_forward,
            dropout=config.model.fusion_dropout,
            input_norm=config.model.fusion_input_norm,
        )
    if encoders is not None:
        teacher.encoders.load_state_dict(encoders.state_dict())
    return teacher


def make_loader(config: TrainConfig, data: TrainingData, support: str) -> BatchLoader:
    """Batches of the train split.

    Args:
        config: of the run.
        data: prepared corpus.
        support: ``"none"``, ``"drawn"`` or ``"batch"``.

    Raises:
        TrainingError: where the batch does not fit the split.
    """
    split, settings = data.splits["train"], config.data
    captions, identities = len(split.captions), split.num_identities
    if settings.sampler == "identity":
        if settings.identities > identities:
            raise TrainingError(
                f"data.identities: batches of {settings.identities} identities x {settings.instances} instances are "
                f"impossible, the train split has {identities} identities"
            )
        batches: Any = IdentityBatchSampler(
            split.labels, settings.identities, settings.instances, items=split.caption_image, seed=config.seed
        )
    else:
        size = _default_batch(captions) if settings.batch_size is None else settings.batch_size
        if size > captions:
            raise TrainingError(
                f"data.batch_size: a batch of {size} is larger than the train split of {captions} captions"
            )
        batches = RandomBatchSampler(captions, size, seed=config.seed)
    dataset = TrainingDataset(
        split,
        data.stores["train"],
        data.tokenizer,
        support=support,
        max_support=settings.max_support,
        seed=config.seed,
    )
    return BatchLoader(dataset, batches, settings.workers)


def _default_batch(captions: int) -> int:
    """64; on a corpus that would give fewer than eight batches an epoch, what gives eight, but not less than 8."""
    return min(captions, max(8, min(DEFAULT_BATCH, captions // 8)))


def evaluate_student(model: LCR2S, data: TrainingData, split: str, *, batch_size: int = 256) -> Retrieval:
    """Metrics of a student on a split of prepared data, both directions."""
    return evaluate_model(
        model, data.splits[split], data.stores[split], tokens=data.tokens[split], batch_size=batch_size
    )


def teacher_features(teacher: Teacher, data: TrainingData, split: str, *, batch_size: int = 256) -> RetrievalFeatures:
    """What a teacher's encoders make of a split, before the fusion, in eval mode."""
    device = next(teacher.parameters()).device
    training = teacher.training
    teacher.eval()
    try:
        return embed_split(
            lambda images: teacher.encoders.image_features(normalize_images(images.to(device), data.mean, data.std)),
            lambda tokens: teacher.encoders.text_features(tokens.to(device)),
            data.splits[split],
            data.stores[split],
            tokens=data.tokens[split],
            batch_size=batch_size,
        )
    finally:
        teacher.train(training)


def evaluate_teacher(
    teacher: Teacher, data: TrainingData, split: str, *, max_support: int, seed: int = 0, batch_size: int = 256
) -> Retrieval:
    """Metrics of a teacher on a split, support sets drawn by identity: an oracle. ``max_support=0`` removes the
    support.
    """
    features = teacher_features(teacher, data, split, batch_size=batch_size)
    training = teacher.training
    teacher.eval()
    try:
        return evaluate_oracle(
            (teacher.image_fusion, teacher.text_fusion), features, max_support=max_support, seed=seed
        )
    finally:
        teacher.train(training)


class _Progress:
    """Mixin of Lightning's bars: shows the last loss and the best val R@1 without Lightning's per-step logging."""

    def get_metrics(self, trainer: pl.Trainer, stage: Any) -> dict[str, int | str | float | dict[str, float]]:
        shown: dict[str, int | str | float | dict[str, float]] = {}
        if stage.latest:
            shown["loss"] = f"{float(stage.latest['loss']):.3f}"
        if stage.best is not None:
            shown["val R@1"] = f"{100 * stage.best['R@1']:.1f}"
        return shown


def _progress_bar(kind: str) -> pl.Callback | None:
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() else "none"
    if kind == "none":
        return None
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    base = RichProgressBar if kind == "rich" else TQDMProgressBar
    return type("StageProgress", (_Progress, base), {})(refresh_rate=10)


def _fit(
    stage: Stage,
    loader: Any,
    config: TrainConfig,
    folder: Path | None,
    *,
    resume: bool,
    on_epoch: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Run a stage to its end and put its best weights back."""
    started = time.perf_counter()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    callbacks: list[pl.Callback] = []
    loggers: list[Any] = []
    if folder is not None:
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

        callbacks.append(
            ModelCheckpoint(
                dirpath=folder,
                filename=Path(CHECKPOINT_FILE).stem,
                save_top_k=1,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        )
        if "csv" in config.loggers:
            loggers.append(CSVLogger(folder, name="csv", flush_logs_every_n_steps=50))
        if "tensorboard" in config.loggers:
            loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    bar = _progress_bar(config.progress)
    if bar is not None:
        callbacks.append(bar)
    if on_epoch is not None:
        from lightning.pytorch.callbacks import LambdaCallback

        callbacks.append(LambdaCallback(on_train_epoch_end=lambda trainer, _: on_epoch(trainer.current_epoch + 1)))
    checkpoint = None if folder is None else folder / CHECKPOINT_FILE
    with warnings.catch_warnings():
        # Advice on workers, log intervals and folders that exist: each is a choice made here.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer = pl.Trainer(
            max_epochs=stage.epochs,
            accelerator=config.device,
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]
            logger=loggers or False,
            callbacks=callbacks,
            enable_checkpointing=folder is not None,
            enable_model_summary=False,
            enable_progress_bar=bar is not None,
            gradient_clip_val=config.optim.grad_clip or None,
            accumulate_grad_batches=config.optim.accumulate,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=config.log_every,
            use_distributed_sampler=False,
        )
        stage.train()
        for logger in loggers:
            logger.log_hyperparams({"stage": stage.stage_name, "seed": config.seed})
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(
                stage,
                loader,
                ckpt_path=str(checkpoint) if resume and checkpoint is not None and checkpoint.is_file() else None,
            )
        except SystemExit as leaving:
            # Lightning turns an interrupt into an exit of the process and ignores further ones; callers decide here.
            signal.signal(signal.SIGINT, interrupt)
            raise KeyboardInterrupt from leaving
    if stage.best_state is not None:
        stage.model.load_state_dict(stage.best_state)
    stage.model.eval()
    return time.perf_counter() - started, trainer.global_step


def _steps(config: TrainConfig, loader: BatchLoader) -> int:
    if not len(loader):
        raise TrainingError("data.batch_size: the train split gives no full batch")
    return len(loader)


def _augment(config: TrainConfig, data: TrainingData) -> BatchAugment:
    settings = config.data
    return BatchAugment(
        data.image_size,
        pad=settings.pad,
        flip=settings.flip,
        erasing=settings.erasing,
        brightness=settings.brightness,
        contrast=settings.contrast,
        mean=data.mean,
        std=data.std,
    ).train()


def _finish(
    stage: Stage,
    model: Any,
    loader: BatchLoader,
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    on_epoch: Callable[[int], None] | None = None,
) -> StageResult:
    if config.threads:
        torch.set_num_threads(config.threads)
    seconds, steps = _fit(stage, loader, config, folder, resume=resume, on_epoch=on_epoch)
    if stage.best is not None:
        val, epoch = stage.best["val"], stage.best["epoch"]
    else:
        val, epoch = None, stage.epochs
    return StageResult(stage.stage_name, model, val, epoch, stage.history, steps, seconds)


def fit_student(
    config: TrainConfig,
    data: TrainingData,
    *,
    teacher: Teacher | DualEncoder | None = None,
    init: DualEncoder | None = None,
    epochs: int | None = None,
    name: str = "student",
    out: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[int], None] | None = None,
) -> StageResult:
    """Train a plain dual encoder, distilled from a teacher where one is given.

    Args:
        config: of the run; its ``teacher`` section is not used here.
        data: prepared corpus.
        teacher: frozen here (eval mode, no gradient); a :class:`Teacher` gets support sets as ``data.support``
            says, a plain :class:`DualEncoder` (a control) gets none. ``None`` trains without distillation.
        init: weights to start from; ``None`` starts from the seed's.
        epochs: ``None`` means ``config.epochs``.
        name: of the stage, in logs and messages.
        out: folder for checkpoint and logs; ``None`` keeps everything in memory.
        resume: go on from the checkpoint in ``out`` where there is one.
        on_epoch: called with the number of finished epochs after each.

    Returns:
        A result whose ``model`` is an :class:`LCR2S`.
    """
    model = make_model(config, data)
    if init is not None:
        model.student.load_state_dict(init.state_dict())
    loader = make_loader(config, data, config.data.support if isinstance(teacher, Teacher) else "none")
    with _weights_seed(config, 12):
        stage = StudentStage(
            config,
            name,
            model.student,
            _augment(config, data),
            num_identities=data.splits["train"].num_identities,
            teacher=teacher,
            epochs=config.epochs if epochs is None else epochs,
            steps_per_epoch=_steps(config, loader),
            evaluate=_evaluation(data, lambda: evaluate_student(model, data, "val", batch_size=config.eval_batch)),
        )
    result = _finish(stage, model, loader, config, None if out is None else Path(out), resume, on_epoch)
    model.eval()
    return result


def fit_teacher(
    config: TrainConfig,
    data: TrainingData,
    *,
    init: DualEncoder | None = None,
    epochs: int | None = None,
    name: str = "teacher",
    out: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[int], None] | None = None,
) -> StageResult:
    """Train a teacher from the start that ``config.teacher.start`` names; ``warm`` and ``frozen`` need ``init``.

    Its val metrics, by which the best epoch is chosen, are those with oracle support sets. Other arguments are those of
    :func:`fit_student`; the result's ``model`` is a :class:`Teacher`.
    """
    start = config.teacher.start
    if start in ("warm", "frozen") and init is None:
        raise ValueError(f"init: teacher.start={start} needs a trained dual encoder to start from, got None")
    _check_support(config)
    teacher = make_teacher(config, data, init)
    loader = make_loader(config, data, config.data.support)
    with _weights_seed(config, 12):
        stage = TeacherStage(
            config,
            name,
            teacher,
            _augment(config, data),
            num_identities=data.splits["train"].num_identities,
            auxiliary_weight=config.teacher.auxiliary_weight if start == "auxiliary" else 0.0,
            train_encoders=start != "frozen",
            epochs=config.teacher_epochs if epochs is None else epochs,
            steps_per_epoch=_steps(config, loader),
            evaluate=_evaluation(
                data,
                lambda: evaluate_teacher(
                    teacher, data, "val", max_support=config.data.max_support, batch_size=config.eval_batch
                ),
            ),
        )
    return _finish(stage, teacher, loader, config, None if out is None else Path(out), resume, on_epoch)


def fit_one_stage(
    config: TrainConfig,
    data: TrainingData,
    *,
    name: str = "one_stage",
    out: str | Path | None = None,
    resume: bool = False,
) -> tuple[StageResult, Teacher]:
    """Train teacher and student together; returns the student's result and the teacher as it is at the end.

    The distillation weights should rise over ``distill.ramp_epochs``: with full weights from the first step both
    collapse.
    """
    _check_support(config)
    model = make_model(config, data)
    teacher = make_teacher(config, data)
    loader = make_loader(config, data, config.data.support)
    with _weights_seed(config, 12):
        stage = OneStage(
            config,
            name,
            model.student,
            _augment(config, data),
            num_identities=data.splits["train"].num_identities,
            teacher=teacher,
            auxiliary_weight=config.teacher.auxiliary_weight if config.teacher.start == "auxiliary" else 0.0,
            epochs=config.epochs,
            steps_per_epoch=_steps(config, loader),
            evaluate=_evaluation(data, lambda: evaluate_student(model, data, "val", batch_size=config.eval_batch)),
        )
    result = _finish(stage, model, loader, config, None if out is None else Path(out), resume)
    model.eval()
    return result, teacher.eval()


def _evaluation(data: TrainingData, evaluate: Callable[[], Retrieval]) -> Callable[[], Retrieval] | None:
    return evaluate if data.has("val") else None


def _check_support(config: TrainConfig) -> None:
    if config.data.support == "none":
        raise ConfigError("data.support: a teacher needs drawn or batch support, got none")


def _stage_done(folder: Path | None) -> Path | None:
    done = None if folder is None else folder / STAGE_FILE
    return done if done is not None and done.is_file() else None


def _plain(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def _saved_stage(
    folder: Path | None, resume: bool, weights: Callable[[], torch.nn.Module], fit: Callable[[], StageResult]
) -> StageResult:
    """The result of a stage: read where a run to be resumed has finished it, else trained and written."""
    done = _stage_done(folder) if resume else None
    if folder is not None and done is not None:
        saved = json.loads(done.read_text(encoding="utf-8"))
        model = weights()
        target = model.student if isinstance(model, LCR2S) else model
        target.load_state_dict(load_file(str(folder / STAGE_WEIGHTS)))
        return StageResult(model=model.eval(), **saved)
    result = fit()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        target = result.model.student if isinstance(result.model, LCR2S) else result.model
        save_file(_plain(target), str(folder / STAGE_WEIGHTS))
        record = {
            "name": result.name,
            "val": result.val,
            "best_epoch": result.best_epoch,
            "history": result.history,
            "steps": result.steps,
            "seconds": result.seconds,
        }
        (folder / STAGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return result


def train(
    config: TrainConfig,
    data: TrainingData | None = None,
    *,
    resume: bool = False,
    test: bool = True,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """A whole run: the stages of ``config.method``, selection on val, test touched once at the end.

    With ``config.out`` the folder gets ``train.yaml`` (the whole configuration), a folder a stage (checkpoint,
    logs, best weights), ``model/`` (:meth:`LCR2S.save_pretrained` of the student) and ``results.json``.

    Args:
        config: of the run.
        data: prepared corpus; ``None`` reads it.
        resume: go on in ``config.out``: finished stages are read, the interrupted one continues from its last
            epoch, with the numbers an uninterrupted run would have had.
        test: evaluate the test split at the end.
        say: called with one line of text at each milestone.

    Raises:
        ConfigError, TrainingError, DatasetError, OSError: with a message that says what to change.
    """
    say = say or (lambda line: None)
    config.validate()
    out = Path(config.out) if config.out else None
    if out is not None:
        _open_run(config, out, resume)
    elif resume:
        raise ConfigError("out: resuming needs the folder of the run")
    if data is None:
        data = prepare_data(config)
    # What cannot work is said before anything is written.
    _steps(config, make_loader(config, data, "none"))
    if config.method != "plain":
        _check_support(config)
    make_teacher(config, data)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        dump_config(config, out / CONFIG_FILE)
    train_split = data.splits["train"]
    say(
        f"train: {train_split.num_identities} identities, {len(train_split.image_paths)} images, "
        f"{len(train_split.captions)} captions; vocabulary {data.tokenizer.vocab_size}"
    )
    if not data.has("val"):
        say("no val split: the last epoch is kept")
    stages: dict[str, StageResult] = {}

    def run_stage(name: str, weights: Callable[[], torch.nn.Module], fit: Callable[[Path | None], StageResult]) -> Any:
        folder = None if out is None else out / name
        result = _saved_stage(folder, resume, weights, lambda: fit(folder))
        stages[name] = result
        score = (
            f", val R@1 {100 * result.val['text_to_image']['R@1']:.1f} (epoch {result.best_epoch})"
            if result.val
            else ""
        )
        oracle = " with oracle support" if isinstance(result.model, Teacher) else ""
        say(f"{name}: {result.steps} steps, {result.seconds:.0f} s{score}{oracle if score else ''}")
        return result.model

    def student() -> torch.nn.Module:
        return make_model(config, data)

    teacher: Teacher | None = None
    if config.method == "one_stage":
        teacher = make_teacher(config, data)
        joint = teacher.state_dict()
        kept = None if out is None else out / "one_stage" / TEACHER_WEIGHTS

        def fit_both(folder: Path | None) -> StageResult:
            result, trained = fit_one_stage(config, data, out=folder, resume=resume)
            joint.update(trained.state_dict())
            if kept is not None:
                save_file(_plain(trained), str(kept))
            return result

        model = run_stage("one_stage", student, fit_both)
        if resume and kept is not None:
            joint = load_file(str(kept))
        teacher.load_state_dict(joint)
        teacher.eval()
    else:
        if config.method == "lcr2s":
            init = None
            if config.teacher.start in ("warm", "frozen"):
                init = run_stage(
                    "warm",
                    student,
                    lambda folder: fit_student(
                        config, data, epochs=config.warm_epochs, name="warm", out=folder, resume=resume
                    ),
                ).student
            teacher = run_stage(
                "teacher",
                lambda: make_teacher(config, data),
                lambda folder: fit_teacher(config, data, init=init, out=folder, resume=resume),
            )
        model = run_stage(
            "student",
            student,
            lambda folder: fit_student(config, data, teacher=teacher, out=folder, resume=resume),
        )
    last = stages["one_stage" if config.method == "one_stage" else "student"]
    result = TrainResult(model, teacher, stages, last.val, None, out=out)
    if test and data.has("test"):
        result.test = evaluate_student(model, data, "test", batch_size=config.eval_batch)
        if teacher is not None:
            for key, support in (("oracle", config.data.max_support), ("no_support", 0)):
                result.teacher_test[key] = evaluate_teacher(
                    teacher, data, "test", max_support=support, batch_size=config.eval_batch
                )
    if out is not None:
        model.save_pretrained(out / MODEL_FOLDER)
        record = {
            "method": config.method,
            "seed": config.seed,
            "val": result.val,
            "test": result.test,
            "teacher_test": result.teacher_test,
            "stages": {
                name: {"steps": stage.steps, "seconds": stage.seconds, "best_epoch": stage.best_epoch}
                for name, stage in stages.items()
            },
        }
        (out / RESULTS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return result


# What may differ between a run and its continuation without changing a number.
_FREE_KEYS = ("out", "progress", "loggers", "log_every", "data.workers", "data.cache", "data.root")


def _open_run(config: TrainConfig, out: Path, resume: bool) -> None:
    saved = out / CONFIG_FILE
    if not resume:
        if saved.is_file() and any(list(out.glob(f"*/{name}")) for name in (CHECKPOINT_FILE, STAGE_FILE)):
            raise TrainingError(f"out: {out} already holds a run; give another folder, or resume it")
        return
    if not saved.is_file():
        raise TrainingError(f"out: {out} holds no run to resume (no {CONFIG_FILE})")
    old, new = _flat(to_dict(load_config(saved))), _flat(to_dict(config))
    changed = [key for key in new if key not in _FREE_KEYS and old[key] != new[key]]
    if changed:
        words = ", ".join(f"{key} was {old[key]!r}, is {new[key]!r}" for key in changed[:3])
        raise TrainingError(f"out: the run in {out} cannot be resumed with another configuration ({words})")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("image_encoder", "text_encoder"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
