"""Stages and whole runs on a very small corpus."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lcr2s_ext.data import BatchAugment, TrainingDataset
from lcr2s_ext.models import LCR2S, Teacher
from lcr2s_ext.training import (
    ConfigError,
    TrainConfig,
    TrainingData,
    TrainingError,
    evaluate_student,
    evaluate_teacher,
    fit_one_stage,
    fit_student,
    fit_teacher,
    make_loader,
    prepare_data,
    train,
)
from lcr2s_ext.training.prepare import make_model, make_teacher
from lcr2s_ext.training.stage import step_seed
from lcr2s_ext.training.stages import StudentStage, TeacherStage

Configure = Callable[..., TrainConfig]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class CrashError(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int) -> None:
    make_batch = TrainingDataset.make_batch

    def crashing(self: TrainingDataset, samples: Any, *rest: Any) -> Any:
        if (samples.epoch, samples.step) == (epoch, step):
            raise CrashError
        return make_batch(self, samples, *rest)

    monkeypatch.setattr(TrainingDataset, "make_batch", crashing)


def stage_of(config: TrainConfig, data: TrainingData, teacher: nn.Module | None) -> tuple[StudentStage, Any]:
    model = make_model(config, data)
    loader = make_loader(config, data, config.data.support if isinstance(teacher, Teacher) else "none")
    stage = StudentStage(
        config,
        "student",
        model.student,
        BatchAugment(data.image_size).train(),
        num_identities=data.splits["train"].num_identities,
        teacher=teacher,  # type: ignore[arg-type]
        epochs=2,
        steps_per_epoch=len(loader),
        evaluate=None,
    )
    return stage, loader


def test_teacher_is_frozen_and_absent(config_of: Configure, data: TrainingData) -> None:
    config = config_of()
    teacher = make_teacher(config, data)
    before = weights(teacher)
    stage, loader = stage_of(config, data, teacher)
    stage.train()
    assert not any(part.training for part in teacher.modules())
    assert not any(weight.requires_grad for weight in teacher.parameters())
    frozen = {id(weight) for weight in teacher.parameters()}
    assert not frozen & {id(weight) for weight in stage.parameters()}
    optimizer = stage.configure_optimizers()["optimizer"]
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert not frozen & {id(weight) for weight in trained}
    assert {id(weight) for weight in trained} == {id(weight) for weight in stage.parameters()}
    assert not any("teacher" in name or "fusion" in name for name in stage.state_dict())
    result = fit_student(config, data, teacher=teacher, epochs=1)
    assert same(before, weights(teacher))  # batch statistics included
    assert not any(part.training for part in teacher.modules())
    assert result.steps == len(loader)


def test_checkpoint_holds_no_teacher(config_of: Configure, data: TrainingData, tmp_path: Path) -> None:
    fit_student(config_of(), data, teacher=make_teacher(config_of(), data), epochs=1, out=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert any(name.startswith("model.") for name in saved["state_dict"])
    assert not any("teacher" in name or "fusion" in name for name in saved["state_dict"])


def count_rows(encoder: nn.Module) -> list[int]:
    rows: list[int] = []
    encoder.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    return rows


@pytest.mark.parametrize(("support", "extra"), [("batch", False), ("drawn", True)])
def test_support_from_the_batch_costs_no_encoder_rows(
    config_of: Configure, data: TrainingData, support: str, extra: bool
) -> None:
    config = config_of("data.sampler=identity", "data.identities=4", "data.instances=3", f"data.support={support}")
    teacher = make_teacher(config, data)
    stage = TeacherStage(
        config,
        "teacher",
        teacher,
        BatchAugment(data.image_size).train(),
        num_identities=data.splits["train"].num_identities,
        epochs=1,
        steps_per_epoch=1,
        evaluate=None,
    )
    image_rows, text_rows = count_rows(teacher.encoders.image_encoder), count_rows(teacher.encoders.text_encoder)
    batch = next(iter(make_loader(config, data, support)))
    stage.losses(BatchAugment(data.image_size)(batch.images, 1), batch)
    assert len(batch) == 12
    assert len(batch.image_support.indices) > 12
    assert len(image_rows) == len(text_rows) == 1  # each pool is encoded once
    assert (image_rows[0] + text_rows[0] > 24) == extra


def test_teacher_and_student_see_the_same_augmented_anchors(config_of: Configure, data: TrainingData) -> None:
    config = config_of()
    teacher = make_teacher(config, data)
    stage, loader = stage_of(config, data, teacher)
    seen: list[torch.Tensor] = []
    for encoder in (stage.model.image_encoder, teacher.encoders.image_encoder):
        encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    batch = next(iter(loader))
    stage.losses(BatchAugment(data.image_size).train()(batch.images, 5), batch)
    student_images, teacher_images = seen
    assert len(teacher_images) > len(student_images) == len(batch)
    assert torch.equal(teacher_images[: len(batch)], student_images)


def test_frozen_start_trains_the_fusion_alone(config_of: Configure, data: TrainingData) -> None:
    config = config_of("teacher.start=frozen")
    plain = make_model(config, data).student
    fresh = make_teacher(config, data, plain)
    teacher = fit_teacher(config, data, init=plain, epochs=1).model
    assert same(weights(teacher.encoders), weights(plain))
    assert not same(weights(teacher.image_fusion), weights(fresh.image_fusion))


@pytest.mark.parametrize("start", ["scratch", "auxiliary", "warm"])
def test_other_starts_train_everything(config_of: Configure, data: TrainingData, start: str) -> None:
    config = config_of(f"teacher.start={start}")
    plain = make_model(config_of("seed=9"), data).student
    result = fit_teacher(config, data, init=plain if start == "warm" else None, epochs=1)
    origin = plain if start == "warm" else make_teacher(config, data).encoders
    trained = weights(result.model.encoders)
    assert all(not torch.equal(trained[name], value) for name, value in origin.named_parameters())
    assert set(result.val) == {"text_to_image", "image_to_text"}


def test_warm_start_needs_weights_and_a_teacher_needs_support(config_of: Configure, data: TrainingData) -> None:
    with pytest.raises(ValueError, match=r"init: teacher\.start=warm"):
        fit_teacher(config_of("teacher.start=warm"), data)
    with pytest.raises(ConfigError, match=r"data\.support"):
        fit_teacher(config_of("teacher.start=scratch", "data.support=none"), data)


def test_oracle_without_support_is_the_row_alone(config_of: Configure, data: TrainingData) -> None:
    teacher = make_teacher(config_of(), data).eval()
    with_support = evaluate_teacher(teacher, data, "test", max_support=2)
    alone = evaluate_teacher(teacher, data, "test", max_support=0)
    assert with_support != alone
    assert alone == evaluate_teacher(teacher, data, "test", max_support=0, batch_size=3)


@pytest.mark.parametrize("teacher", [False, True])
def test_resumed_run_is_the_same_run_to_the_bit(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: bool
) -> None:
    config = config_of()
    options = {"teacher": make_teacher(config, data)} if teacher else {}
    whole = fit_student(config, data, out=tmp_path / "whole", **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        crash_at(patch, epoch=1, step=1)
        with pytest.raises(CrashError):
            fit_student(config, data, out=tmp_path / "parts", **options)  # type: ignore[arg-type]
    parts = fit_student(config, data, out=tmp_path / "parts", resume=True, **options)  # type: ignore[arg-type]
    assert same(weights(whole.model), weights(parts.model))
    assert whole.history == parts.history
    assert whole.steps == parts.steps
    last = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts")]
    assert same(last[0]["state_dict"], last[1]["state_dict"])
    moments = [state["optimizer_states"][0]["state"] for state in last]
    assert all(torch.equal(moments[0][key]["exp_avg_sq"], moments[1][key]["exp_avg_sq"]) for key in moments[0])


def test_whole_run_resumes_where_it_was_cut(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ["teacher.epochs=1", "teacher.warm_epochs=1"]
    whole = train(config_of(*plan, f"out={tmp_path}/whole"), data)
    parts = config_of(*plan, f"out={tmp_path}/parts")
    with monkeypatch.context() as patch:
        crash_at(patch, epoch=1, step=0)  # only the student has a second epoch
        with pytest.raises(CrashError):
            train(parts, data)
    assert {folder.name for folder in (tmp_path / "parts").iterdir()} == {"train.yaml", "warm", "teacher", "student"}
    with pytest.raises(TrainingError, match="already holds a run"):
        train(parts, data)
    with pytest.raises(TrainingError, match=r"another configuration \(seed was 0, is 1"):
        train(config_of(*plan, "seed=1", f"out={tmp_path}/parts"), data, resume=True)
    resumed = train(parts, data, resume=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert whole.test == resumed.test
    assert whole.teacher_test == resumed.teacher_test
    assert set(whole.teacher_test) == {"oracle", "no_support"}
    saved = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert saved["test"] == whole.test
    loaded = LCR2S.from_pretrained(tmp_path / "parts" / "model")
    assert same(weights(loaded.student), weights(whole.model.student))
    assert list((tmp_path / "whole").glob("student/tensorboard/events*"))
    assert "train/loss" in next((tmp_path / "whole").glob("student/csv/*/metrics.csv")).read_text()


def test_resume_needs_a_run(config_of: Configure, data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no run to resume"):
        train(config_of(f"out={tmp_path}"), data, resume=True)
    with pytest.raises(ConfigError, match="out: resuming"):
        train(config_of(), data, resume=True)


def test_interrupt_reaches_the_caller_and_leaves_its_handler(
    config_of: Configure, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TrainingDataset, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_student(config_of(), data)
    assert signal.getsignal(signal.SIGINT) is handler


def test_workers_do_not_change_a_run(config_of: Configure, data: TrainingData) -> None:
    alone = fit_student(config_of(), data, epochs=1)
    workers = fit_student(config_of("data.workers=1"), data, epochs=1)
    assert same(weights(alone.model), weights(workers.model))


def test_one_stage(config_of: Configure, data: TrainingData) -> None:
    config = config_of("method=one_stage", "distill.ramp_epochs=1", "distill.relation=kl", "distill.intra_weight=0.1")
    start = make_teacher(config, data)
    result, teacher = fit_one_stage(config, data)
    assert not same(weights(teacher), weights(start))
    assert not any("fusion" in name for name in result.model.state_dict())
    assert result.val is not None


def test_one_stage_run_resumes_with_its_teacher(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config_of("method=one_stage"), data)
    parts = config_of("method=one_stage", f"out={tmp_path}")
    with monkeypatch.context() as patch:
        crash_at(patch, epoch=1, step=1)
        with pytest.raises(CrashError):
            train(parts, data)
    for _ in range(2):  # the second time nothing is left to train
        resumed = train(parts, data, resume=True)
        assert same(weights(whole.model), weights(resumed.model))
        assert whole.teacher is not None
        assert resumed.teacher is not None
        assert same(weights(whole.teacher), weights(resumed.teacher))
        assert whole.teacher_test == resumed.teacher_test


@pytest.mark.parametrize("align", ["info_nce", "cmpm", "tal"])
def test_other_losses(config_of: Configure, data: TrainingData, align: str) -> None:
    extra = ["loss.learn_logit_scale=true"] if align == "info_nce" else []
    assert fit_student(config_of(f"loss.align={align}", *extra), data, epochs=1).steps > 0


def test_training_learns(config_of: Configure, data: TrainingData) -> None:
    fresh = evaluate_student(make_model(config_of(), data), data, "train")["text_to_image"]["R@1"]
    result = fit_student(config_of("epochs=15", "eval_every=15"), data)
    trained = evaluate_student(result.model, data, "train")["text_to_image"]["R@1"]
    assert trained > max(0.3, 2 * fresh)


def test_early_messages(config_of: Configure, data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"data\.batch_size: a batch of 5000 is larger than the train split of \d+"):
        fit_student(config_of("data.batch_size=5000"), data)
    with pytest.raises(TrainingError, match=r"batches of 16 identities x 4 instances are impossible.* 10 identities"):
        fit_student(config_of("data.sampler=identity"), data)
    with pytest.raises(ConfigError, match=r"data\.root"):
        prepare_data(TrainConfig())
    with pytest.raises(FileNotFoundError, match="CUHK-PEDES"):
        prepare_data(config_of(f"data.root={tmp_path}"))
    with pytest.raises(ConfigError, match=r"model\.preset: expected one of tiny, small, .*got 'tony'"):
        prepare_data(config_of("model.preset=tony"))
    with pytest.raises(ConfigError, match=r"model\.image_size"):
        prepare_data(config_of("model.image_size=[64]"))


def test_nan_is_reported_with_its_step(config_of: Configure, data: TrainingData) -> None:
    plain = make_model(config_of(), data).student
    with torch.no_grad():
        plain.text_encoder.projection.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite in stage student, epoch 0, step 0 .*align nan"):
        fit_student(config_of(), data, init=plain)


def test_default_batch_fits_small_corpora(config_of: Configure, data: TrainingData) -> None:
    captions = len(data.splits["train"].captions)
    loader = make_loader(config_of("data.batch_size=null"), data, "none")
    assert len(next(iter(loader))) == max(8, captions // 8) <= captions


def test_step_seeds_differ_and_stay() -> None:
    seeds = {step_seed(s, e, t, p) for s in range(3) for e in range(4) for t in range(5) for p in range(2)}
    assert len(seeds) == 3 * 4 * 5 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 0, 0) == step_seed(0, 0, 0)
