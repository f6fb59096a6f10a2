"""The arms of the demo: which stages each one needs, and how a stage is trained and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcr2s_ext.training.config import ConfigError, TrainConfig, load_config, to_dict

__all__ = ["ARMS", "DEFAULT_ARMS", "Arm", "StagePlan", "budget_epochs", "plan_stages", "train_stage"]


@dataclass(frozen=True)
class Arm:
    """One line of the comparison: a name, the stage whose model it measures, and what it is for."""

    key: str
    stage: str
    title: str
    purpose: str


ARMS: dict[str, Arm] = {
    arm.key: arm
    for arm in (
        Arm(
            "a",
            "one_to_one",
            "InfoNCE with its own caption + ID",
            "one-to-one matching, what the method argues against",
        ),
        Arm("b", "plain", "SDM + ID, many-to-many, no teacher", "the student's own losses for the student's epochs"),
        Arm("b+", "longer", "(b) for the steps of teacher + student", "the same budget of optimiser steps, no teacher"),
        Arm("c", "teacher", "teacher, oracle support sets", "oracle: reads the test identities; no retrieval system"),
        Arm("c0", "teacher", "teacher, its support removed", "what of (c) is the encoders' rather than the support's"),
        Arm("d", "student", "LCR²S student", "the method"),
        Arm(
            "d'",
            "student_frozen",
            "student, MHAF on (b) continued, frozen",
            "a teacher that differs from (e)'s by MHAF only",
        ),
        Arm("e", "control", "student of (b) continued, no support", "the same distillation without any support set"),
    )
}

DEFAULT_ARMS = ("b", "b+", "c", "c0", "d", "e")


@dataclass(frozen=True)
class StagePlan:
    """A stage of training.

    Attributes:
        name: of the stage.
        kind: ``"student"`` or ``"teacher"``.
        epochs: of this stage.
        init: stage whose encoders it starts from.
        teacher: stage that it is distilled from.
        overrides: ``key=value`` changes of the configuration.
        arms: keys of the arms that are measured on its model.
        cost: of an epoch, in epochs of a plain student; used for the estimate of the time left and to start the longest
            chain first.
    """

    name: str
    kind: str
    epochs: int
    init: str | None = None
    teacher: str | None = None
    overrides: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    cost: float = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages that must be finished before."""
        return tuple(stage for stage in (self.init, self.teacher) if stage is not None)


def budget_epochs(config: TrainConfig) -> int:
    """Epochs whose optimiser steps equal those of teacher and student together, a warm start's included."""
    warm = config.warm_epochs if config.teacher.start in ("warm", "frozen") else 0
    return warm + config.teacher_epochs + config.epochs


def plan_stages(config: TrainConfig, arms: Iterable[str], fusion_epochs: int) -> dict[str, StagePlan]:
    """The stages that the arms need, in an order in which they could be run.

    Args:
        config: of every stage, but for what a stage's ``overrides`` change.
        arms: keys of :data:`ARMS`.
        fusion_epochs: epochs of the fusion that arm (d') trains on frozen encoders.

    Raises:
        ValueError: an unknown arm, or none.
        ConfigError: a warm start of other length than the student's epochs, which (b) could not serve as.
    """
    wanted = list(dict.fromkeys(arms))
    unknown = [arm for arm in wanted if arm not in ARMS]
    if unknown or not wanted:
        raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {', '.join(unknown) or 'none'}")
    warm = config.teacher.start in ("warm", "frozen")
    if warm and config.warm_epochs != config.epochs:
        raise ConfigError(
            f"teacher.warm_epochs: expected {config.epochs}, the epochs of arm (b), which is the warm start, "
            f"got {config.warm_epochs}"
        )
    # A teacher encodes the anchors and their support sets; the factors are those of measured steps.
    pool = 1.0 + (config.data.max_support if config.data.support == "drawn" else 0)
    frozen_start = config.teacher.start == "frozen"
    stages = [
        StagePlan("one_to_one", "student", config.epochs, overrides=("loss.align=info_nce", "loss.many_to_many=false")),
        StagePlan("plain", "student", config.epochs),
        StagePlan("longer", "student", budget_epochs(config)),
        StagePlan(
            "teacher",
            "teacher",
            config.teacher_epochs,
            init="plain" if warm else None,
            cost=pool / 3 if frozen_start else 0.8 * pool,
        ),
        StagePlan("student", "student", config.epochs, teacher="teacher", cost=1 + pool / 4),
        StagePlan("continued", "student", config.teacher_epochs, init="plain"),
        StagePlan(
            "fusion",
            "teacher",
            fusion_epochs,
            init="continued",
            overrides=("teacher.start=frozen",),
            cost=pool / 3,
        ),
        StagePlan("student_frozen", "student", config.epochs, teacher="fusion", cost=1 + pool / 4),
        StagePlan("control", "student", config.epochs, teacher="continued", cost=1.25),
    ]
    known = {stage.name: stage for stage in stages}
    needed: set[str] = set()
    open_names = [ARMS[arm].stage for arm in wanted]
    while open_names:
        name = open_names.pop()
        if name not in needed:
            needed.add(name)
            open_names += known[name].needs
    return {
        stage.name: dataclasses.replace(stage, arms=tuple(arm for arm in wanted if ARMS[arm].stage == stage.name))
        for stage in stages
        if stage.name in needed
    }


@dataclass
class StageOutcome:
    """What is known of a trained stage: plain values only, so that it travels between processes.

    Attributes:
        name: of the stage.
        steps: optimiser steps of this stage.
        epochs: of this stage.
        best_epoch: epoch, from 1, whose weights were kept (best R@1 on val).
        seconds: wall time of training and of the evaluations on val.
        metrics: ``{arm or stage: {"val": ..., "test": ...}}``, each with both directions.
    """

    name: str
    steps: int
    epochs: int
    best_epoch: int
    seconds: float
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


def train_stage(
    plan: StagePlan,
    config: TrainConfig,
    data: Any,
    folder: Path,
    *,
    on_epoch: Callable[[int], None] | None = None,
) -> StageOutcome:
    """Train a stage, measure it on val and (once, at the end) on test, and keep its weights for the stages after it.

    Args:
        plan: the stage.
        config: of the run.
        data: :class:`~lcr2s_ext.training.TrainingData` of the corpus.
        folder: of the run; weights are read from and written to ``folder/<stage>``.
        on_epoch: called with the number of finished epochs after each.
    """
    from safetensors.torch import load_file, save_file

    from lcr2s_ext.models import LCR2S
    from lcr2s_ext.training.fit import fit_student, fit_teacher
    from lcr2s_ext.training.prepare import evaluate_student, evaluate_teacher, make_teacher

    settings = load_config(None, plan.overrides, base=to_dict(config)) if plan.overrides else config
    init = None if plan.init is None else LCR2S.from_pretrained(folder / plan.init).student
    if plan.kind == "teacher":
        result = fit_teacher(settings, data, init=init, epochs=plan.epochs, name=plan.name, on_epoch=on_epoch)
        support = settings.data.max_support
        measured = {
            "c" if "c" in plan.arms else plan.name: support,
            "c0" if "c0" in plan.arms else f"{plan.name}, support removed": 0,
        }
        metrics = {
            key: {
                split: evaluate_teacher(result.model, data, split, max_support=count, batch_size=settings.eval_batch)
                for split in ("val", "test")
                if data.has(split)
            }
            for key, count in measured.items()
        }
        (folder / plan.name).mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in result.model.state_dict().items()}
        save_file(state, str(folder / plan.name / "teacher.safetensors"))
    else:
        teacher: Any = None
        if plan.teacher is not None and (folder / plan.teacher / "teacher.safetensors").is_file():
            teacher = make_teacher(settings, data)
            teacher.load_state_dict(load_file(str(folder / plan.teacher / "teacher.safetensors")))
        elif plan.teacher is not None:
            teacher = LCR2S.from_pretrained(folder / plan.teacher).student
        result = fit_student(
            settings, data, teacher=teacher, init=init, epochs=plan.epochs, name=plan.name, on_epoch=on_epoch
        )
        one = {
            split: evaluate_student(result.model, data, split, batch_size=settings.eval_batch)
            for split in ("val", "test")
            if data.has(split)
        }
        metrics = dict.fromkeys(plan.arms or (plan.name,), one)
        result.model.save_pretrained(folder / plan.name)
    return StageOutcome(plan.name, result.steps, plan.epochs, result.best_epoch, result.seconds, metrics)


def total_cost(stages: Mapping[str, StagePlan]) -> float:
    """Cost of all stages, in epochs of a plain student."""
    return sum(stage.epochs * stage.cost for stage in stages.values())


def remaining_chain(stages: Mapping[str, StagePlan]) -> dict[str, float]:
    """For each stage the cost of the longest chain of stages that begins with it: the longest one is started first."""
    chain: dict[str, float] = {}
    for stage in reversed(list(stages.values())):
        after = [chain[other.name] for other in stages.values() if stage.name in other.needs]
        chain[stage.name] = stage.epochs * stage.cost + max(after, default=0.0)
    return chain
