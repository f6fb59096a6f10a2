"""One stage after another: a model trained by Lightning, with checkpoint, logs and its best weights put back."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lcr2s_ext.models import LCR2S, DualEncoder, Teacher
from lcr2s_ext.retrieval import Retrieval
from lcr2s_ext.training import distributed
from lcr2s_ext.training.acceleration import accelerated
from lcr2s_ext.training.checkpoints import AtomicCheckpointIO, LastCheckpoint
from lcr2s_ext.training.config import ConfigError, TrainConfig
from lcr2s_ext.training.prepare import (
    BatchLoader,
    TrainingData,
    evaluate_student,
    evaluate_teacher,
    make_augment,
    make_loader,
    make_model,
    make_teacher,
    steps_per_epoch,
    weights_seed,
)
from lcr2s_ext.training.stage import Stage
from lcr2s_ext.training.stages import OneStage, StudentStage, TeacherStage
from lcr2s_ext.training.text_cache import check_frozen

__all__ = [
    "StageResult",
    "check_support",
    "check_text_cache",
    "fit_one_stage",
    "fit_student",
    "fit_teacher",
    "joint_stage",
    "student_stage",
    "teacher_stage",
]

CHECKPOINT_FILE = "last.ckpt"
REFRESH_STEPS = 10  # of the progress bar


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


class _Progress:
    """Mixin of Lightning's bars: shows the last loss, the best val R@1, throughput and memory without Lightning's
    per-step logging.
    """

    shown: dict[str, int | str | float | dict[str, float]]

    def get_metrics(self, trainer: pl.Trainer, stage: Any) -> dict[str, int | str | float | dict[str, float]]:
        # Rich asks after every batch, and reading the loss waits for the GPU.
        if hasattr(self, "shown") and trainer.global_step % REFRESH_STEPS:
            return self.shown
        shown: dict[str, int | str | float | dict[str, float]] = {}
        self.shown = shown
        if stage.latest:
            shown["loss"] = f"{float(stage.latest['loss']):.3f}"
            usage = stage.usage()
            shown["samples/s"] = f"{usage['samples_per_second']:.0f}"
            shown["GiB"] = f"{usage['memory_gib']:.2f}"
        if stage.best is not None:
            shown["val R@1"] = f"{100 * stage.best['R@1']:.1f}"
        return shown


def _progress_bar(kind: str) -> pl.Callback | None:
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() else "none"
    if kind == "none" or not distributed.first():
        return None
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    base = RichProgressBar if kind == "rich" else TQDMProgressBar
    return type("StageProgress", (_Progress, base), {})(refresh_rate=REFRESH_STEPS)


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
        from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

        callbacks.append(LastCheckpoint(folder / CHECKPOINT_FILE, config.checkpoint_every))
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
    stage.folder = folder
    stage.captions, stage.kept_text_caches = loader.dataset.tokens, loader.text_caches
    stage.freeze_text_backbones()
    options = distributed.trainer_options(config)
    with warnings.catch_warnings(), accelerated(stage.encoders().values(), config):
        # Advice on workers, log intervals and folders that exist: each is a choice made here.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer = pl.Trainer(
            max_epochs=stage.epochs,
            **options | {"plugins": [*options.get("plugins", ()), AtomicCheckpointIO()]},
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
    stage.keep_averages()
    distributed.sync_buffers(stage)
    if stage.best_state is not None:
        distributed.load_state(stage.model, stage.best_state)
    stage.model.eval()
    return time.perf_counter() - started, trainer.global_step


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
    # A sharded model stays sharded: what leaves the stage is a copy from before, with the new weights.
    spare = copy.deepcopy(model) if config.strategy == "fsdp" else None
    seconds, steps = _fit(stage, loader, config, folder, resume=resume, on_epoch=on_epoch)
    if spare is not None:
        state = distributed.full_state(stage.model)
        (spare.student if isinstance(spare, LCR2S) else spare).load_state_dict(state)
        model = spare.eval()
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
    distributed.start(config)
    stage, model, loader = student_stage(config, data, teacher=teacher, init=init, epochs=epochs, name=name)
    result = _finish(stage, model, loader, config, None if out is None else Path(out), resume, on_epoch)
    model.eval()
    return result


def student_stage(
    config: TrainConfig,
    data: TrainingData,
    *,
    teacher: Teacher | DualEncoder | None = None,
    init: DualEncoder | None = None,
    epochs: int | None = None,
    name: str = "student",
) -> tuple[StudentStage, LCR2S, BatchLoader]:
    """The stage that :func:`fit_student` trains, its model and its batches."""
    model = make_model(config, data)
    if init is not None:
        model.student.load_state_dict(init.state_dict())
    loader = make_loader(config, data, config.data.support if isinstance(teacher, Teacher) else "none")
    with weights_seed(config, 12):
        stage = StudentStage(
            config,
            name,
            model.student,
            make_augment(config, data),
            num_identities=data.splits["train"].num_identities,
            tokenizer=data.tokenizer,
            teacher=teacher,
            epochs=config.epochs if epochs is None else epochs,
            steps_per_epoch=steps_per_epoch(config, loader),
            evaluate=_evaluation(data, lambda: _student_metrics(config, model, data)),
        )
    return stage, model, loader


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
    check_support(config)
    distributed.start(config)
    stage, teacher, loader = teacher_stage(config, data, init=init, epochs=epochs, name=name)
    return _finish(stage, teacher, loader, config, None if out is None else Path(out), resume, on_epoch)


def teacher_stage(
    config: TrainConfig,
    data: TrainingData,
    *,
    init: DualEncoder | None = None,
    epochs: int | None = None,
    name: str = "teacher",
) -> tuple[TeacherStage, Teacher, BatchLoader]:
    """The stage that :func:`fit_teacher` trains, its model and its batches."""
    start = config.teacher.start
    teacher = make_teacher(config, data, init)
    loader = make_loader(config, data, config.data.support)
    with weights_seed(config, 12):
        stage = TeacherStage(
            config,
            name,
            teacher,
            make_augment(config, data),
            num_identities=data.splits["train"].num_identities,
            tokenizer=data.tokenizer,
            auxiliary_weight=config.teacher.auxiliary_weight if start == "auxiliary" else 0.0,
            train_encoders=start != "frozen",
            epochs=config.teacher_epochs if epochs is None else epochs,
            steps_per_epoch=steps_per_epoch(config, loader),
            evaluate=_evaluation(
                data,
                lambda: evaluate_teacher(
                    teacher,
                    data,
                    "val",
                    max_support=config.data.max_support,
                    batch_size=config.eval_batch,
                    group=distributed.group(),
                ),
            ),
        )
    return stage, teacher, loader


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
    check_support(config)
    distributed.start(config)
    stage, model, loader = joint_stage(config, data, name=name)
    teacher = stage.joint_teacher
    spare = copy.deepcopy(teacher) if config.strategy == "fsdp" else None
    result = _finish(stage, model, loader, config, None if out is None else Path(out), resume)
    model.eval()
    if spare is not None:
        spare.load_state_dict(distributed.full_state(teacher))
    return result, (spare or teacher).eval()


def joint_stage(
    config: TrainConfig, data: TrainingData, *, name: str = "one_stage"
) -> tuple[OneStage, LCR2S, BatchLoader]:
    """The stage that :func:`fit_one_stage` trains, its student and its batches."""
    model = make_model(config, data)
    teacher = make_teacher(config, data)
    loader = make_loader(config, data, config.data.support)
    with weights_seed(config, 12):
        stage = OneStage(
            config,
            name,
            model.student,
            make_augment(config, data),
            num_identities=data.splits["train"].num_identities,
            tokenizer=data.tokenizer,
            teacher=teacher,
            auxiliary_weight=config.teacher.auxiliary_weight if config.teacher.start == "auxiliary" else 0.0,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch(config, loader),
            evaluate=_evaluation(data, lambda: _student_metrics(config, model, data)),
        )
    return stage, model, loader


def _student_metrics(config: TrainConfig, model: LCR2S, data: TrainingData) -> Retrieval:
    return evaluate_student(model, data, "val", batch_size=config.eval_batch, group=distributed.group())


def _evaluation(data: TrainingData, evaluate: Callable[[], Retrieval]) -> Callable[[], Retrieval] | None:
    return evaluate if data.has("val") else None


def check_text_cache(config: TrainConfig, teacher: Teacher) -> None:
    """ConfigError where ``data.text_cache`` is asked for and a stage of the method trains the text backbone."""
    if config.data.text_cache:
        names = ["model"]
        if config.method == "lcr2s":
            names.append("model.encoders")
        elif config.method == "one_stage":
            names.append("joint_teacher.encoders")
        check_frozen(
            teacher.encoders.text_encoder, [f"{name}.text_encoder" for name in names], config.optim.lr_multipliers
        )


def check_support(config: TrainConfig) -> None:
    if config.data.support == "none":
        raise ConfigError("data.support: a teacher needs drawn, batch or bank support, got none")
