"""Whole runs: the stages of a method one after another, resumed where they stopped, and what they leave on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcr2s_ext._files import replacing, write_text
from lcr2s_ext.models import LCR2S, Teacher
from lcr2s_ext.retrieval import Retrieval
from lcr2s_ext.training import distributed
from lcr2s_ext.training.config import ConfigError, TrainConfig, dump_config, load_config, to_dict
from lcr2s_ext.training.fit import (
    CHECKPOINT_FILE,
    StageResult,
    check_support,
    check_text_cache,
    fit_one_stage,
    fit_student,
    fit_teacher,
)
from lcr2s_ext.training.mlm import check_mlm
from lcr2s_ext.training.prepare import (
    TrainingData,
    evaluate_student,
    evaluate_teacher,
    make_loader,
    make_model,
    make_teacher,
    prepare_data,
    steps_per_epoch,
)
from lcr2s_ext.training.stage import TrainingError

__all__ = ["TrainResult", "finished", "train"]

CONFIG_FILE = "train.yaml"
RESULTS_FILE = "results.json"
MODEL_FOLDER = "model"
STAGE_FILE = "stage.json"
STAGE_WEIGHTS = "best.safetensors"
TEACHER_WEIGHTS = "teacher.safetensors"


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


def _stage_done(folder: Path | None) -> Path | None:
    done = None if folder is None else folder / STAGE_FILE
    return done if done is not None and done.is_file() else None


def _plain(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def _save_weights(module: torch.nn.Module, path: Path) -> None:
    with replacing(path) as temporary:
        save_file(_plain(module), str(temporary))


def _saved_stage(
    folder: Path | None, resume: bool, weights: Callable[[], torch.nn.Module], fit: Callable[[], StageResult]
) -> StageResult:
    """The result of a stage: read where a run to be resumed has finished it, else trained and written."""
    done = distributed.from_first(_stage_done(folder) if resume else None)
    if folder is not None and done is not None:
        saved = json.loads(done.read_text(encoding="utf-8"))
        model = weights()
        target = model.student if isinstance(model, LCR2S) else model
        target.load_state_dict(load_file(str(folder / STAGE_WEIGHTS)))
        return StageResult(model=model.eval(), **saved)
    result = fit()
    if folder is not None and distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        target = result.model.student if isinstance(result.model, LCR2S) else result.model
        _save_weights(target, folder / STAGE_WEIGHTS)
        record = {
            "name": result.name,
            "val": result.val,
            "best_epoch": result.best_epoch,
            "history": result.history,
            "steps": result.steps,
            "seconds": result.seconds,
        }
        # Last, for it says that the stage is done.
        write_text(folder / STAGE_FILE, json.dumps(record, indent=2) + "\n")
    distributed.wait()
    return result


def _unheard(line: str) -> None:
    pass


def _fingerprint(data: TrainingData) -> str:
    """Of the captions, their images and identities, as every process of a run must have them."""
    digest = hashlib.sha256()
    for name, split in data.splits.items():
        rows = [data.tokens[name]] if name in data.tokens else []
        for values in (*rows, split.labels, split.caption_image):
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(
    config: TrainConfig,
    data: TrainingData | None = None,
    *,
    resume: bool = False,
    test: bool = True,
    say: Callable[[str], None] | None = None,
    share: Path | None = None,
) -> TrainResult:
    """A whole run: the stages of ``config.method``, selection on val, test touched once at the end.

    Where ``config`` asks for several processes, or torchrun or srun started them, they share the batches and the
    evaluation; every one of them returns the same result, the first one writes and speaks.

    With ``config.out`` the folder gets ``train.yaml`` (the whole configuration), a folder a stage (checkpoint,
    logs, best weights), ``model/`` (:meth:`LCR2S.save_pretrained` of the student) and ``results.json``.

    Args:
        config: of the run.
        data: prepared corpus; ``None`` reads it.
        resume: go on in ``config.out``: finished stages are read, the interrupted one continues from its last
            checkpoint, with the numbers an uninterrupted run would have had.
        test: evaluate the test split at the end.
        say: called with one line of text at each milestone.
        share: folder of stages that several runs share, in place of the stages' folders in ``config.out``: what another
            run trained under the same configuration, as far as it concerns the stage, is read or continued.

    Raises:
        ConfigError, TrainingError, DatasetError, OSError: with a message that says what to change.
    """
    config.validate()
    distributed.start(config)
    if say is None or not distributed.first():
        say = _unheard
    out = Path(config.out) if config.out else None
    # What cannot work is said before anything is written.
    with distributed.together():
        if out is not None:
            _open_run(config, out, resume)
        elif resume:
            raise ConfigError("out: resuming needs the folder of the run")
        if data is None:
            data = prepare_data(config)
        steps_per_epoch(config, make_loader(config, data, "none"))
        if config.method != "plain":
            check_support(config)
        teacher_shell = make_teacher(config, data)
        check_text_cache(config, teacher_shell)
        if config.loss.mlm_weight:
            check_mlm(config.loss, teacher_shell.encoders, data.tokenizer)
    distributed.check_same("data.root", _fingerprint(data))
    if out is not None and distributed.first():
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
    resume_stages = resume or share is not None

    def folder_of(name: str) -> Path | None:
        if share is not None:
            kind = "plain" if name == "warm" or config.method == "plain" else name
            return share / f"{kind}-{_stage_key(config, name)}"
        return None if out is None else out / name

    def run_stage(name: str, weights: Callable[[], torch.nn.Module], fit: Callable[[Path | None], StageResult]) -> Any:
        folder = folder_of(name)
        result = _saved_stage(folder, resume_stages, weights, lambda: fit(folder))
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
        one_stage = folder_of("one_stage")
        kept = None if one_stage is None else one_stage / TEACHER_WEIGHTS

        def fit_both(folder: Path | None) -> StageResult:
            result, trained = fit_one_stage(config, data, out=folder, resume=resume_stages)
            joint.update(trained.state_dict())
            if kept is not None and distributed.first():
                _save_weights(trained, kept)
            return result

        model = run_stage("one_stage", student, fit_both)
        if resume_stages and kept is not None:
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
                        config,
                        data,
                        epochs=config.warm_epochs,
                        name="warm" if share is None else "plain",
                        out=folder,
                        resume=resume_stages,
                    ),
                ).student
            teacher = run_stage(
                "teacher",
                lambda: make_teacher(config, data),
                lambda folder: fit_teacher(config, data, init=init, out=folder, resume=resume_stages),
            )
        model = run_stage(
            "student",
            student,
            lambda folder: fit_student(
                config,
                data,
                teacher=teacher,
                name="student" if share is None or teacher is not None else "plain",
                out=folder,
                resume=resume_stages,
            ),
        )
    last = stages["one_stage" if config.method == "one_stage" else "student"]
    result = TrainResult(model, teacher, stages, last.val, None, out=out)
    if test and data.has("test"):
        group = distributed.group()
        result.test = evaluate_student(model, data, "test", batch_size=config.eval_batch, group=group)
        if teacher is not None:
            for key, support in (("oracle", config.data.max_support), ("no_support", 0)):
                result.teacher_test[key] = evaluate_teacher(
                    teacher, data, "test", max_support=support, batch_size=config.eval_batch, group=group
                )
    if out is not None and distributed.first():
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
        write_text(out / RESULTS_FILE, json.dumps(record, indent=2) + "\n")
    return result


# What may differ between a run and its continuation without changing a number, or (processes) none but by rounding.
_FREE_KEYS = (
    "out",
    "devices",
    "nodes",
    "strategy",
    "progress",
    "loggers",
    "log_every",
    "checkpoint_every",
    "data.workers",
    "data.cache",
    "data.root",
)


def _open_run(config: TrainConfig, out: Path, resume: bool) -> None:
    saved = out / CONFIG_FILE
    if not resume:
        if saved.is_file() and any(list(out.glob(f"*/{name}")) for name in (CHECKPOINT_FILE, STAGE_FILE)):
            raise TrainingError(f"out: {out} already holds a run; give another folder, or resume it")
        return
    if not saved.is_file():
        raise TrainingError(f"out: {out} holds no run to resume (no {CONFIG_FILE})")
    old, new = _flat(to_dict(load_config(saved))), _flat(to_dict(config))
    changed = [key for key in new if key not in _FREE_KEYS and old.get(key) != new[key]]
    if changed:
        words = ", ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in changed[:3])
        raise TrainingError(f"out: the run in {out} cannot be resumed with another configuration ({words})")


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """``results.json`` of the run in ``config.out``, None where there is none.

    Raises:
        TrainingError: a run of another configuration is there.
    """
    file = Path(config.out, RESULTS_FILE)
    if not file.is_file():
        return None
    _open_run(config, file.parent, resume=True)
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


# What a plain student does not depend on.
_OF_TEACHERS = (
    *("teacher.", "distill.", "data.support", "data.max_support", "data.bank_size"),
    *("model.heads", "model.feed_forward", "model.fusion_"),
)


def _stage_key(config: TrainConfig, name: str) -> str:
    """Digest of what a stage depends on; an earlier stage's keys are among them."""
    values = _flat(to_dict(config))
    start = config.teacher.start
    # Of a stage that begins with another's weights, what made those counts as well.
    without = [*_FREE_KEYS, "method"]
    if name == "warm" or config.method == "plain":
        values["epochs"] = config.warm_epochs if name == "warm" else config.epochs
        without += _OF_TEACHERS
    else:
        if name == "teacher":
            values["epochs"] = config.teacher_epochs
            without += ["distill."]
        if config.data.support != "bank":
            without += ["data.bank_size"]
        if start not in ("warm", "frozen") or name == "one_stage":
            without += ["teacher.warm_epochs"]
        if name == "one_stage":
            without += ["teacher.epochs"]
        if start != "auxiliary":
            without += ["teacher.auxiliary_weight"]
    kept = {
        key: value
        for key, value in values.items()
        if not any(key == part or (part[-1] in "._" and key.startswith(part)) for part in without)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


# Mappings that are compared as one value: their keys may differ.
_WHOLE = ("image_encoder", "text_encoder", "align", "logit_scales", "lr_multipliers")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in _WHOLE:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
