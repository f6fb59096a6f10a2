"""Cached gradients against the plain step, and what they must leave alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext.data import BatchAugment
from lcr2s_ext.training import TrainConfig, TrainingData, fit_student, fit_teacher, make_loader
from lcr2s_ext.training.cached_gradients import encode_in_parts
from lcr2s_ext.training.prepare import make_model, make_teacher
from lcr2s_ext.training.stage import Stage
from lcr2s_ext.training.stages import OneStage, StudentStage, TeacherStage

Configure = Callable[..., TrainConfig]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def make_stage(config: TrainConfig, data: TrainingData, kind: str) -> Stage:
    options: dict[str, Any] = {
        "num_identities": data.splits["train"].num_identities,
        "epochs": 1,
        "steps_per_epoch": 1,
        "evaluate": None,
    }
    augment = BatchAugment(data.image_size).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "teacher":
            return TeacherStage(config, kind, make_teacher(config, data), augment, auxiliary_weight=0.5, **options)
        model, teacher = make_model(config, data).student, make_teacher(config, data)
        if kind == "one_stage":
            return OneStage(config, kind, model, augment, teacher=teacher, auxiliary_weight=0.5, **options)
        return StudentStage(config, kind, model, augment, teacher=teacher, **options)


@pytest.mark.parametrize("kind", ["student", "teacher", "one_stage"])
def test_gradients_are_those_of_the_plain_step(config_of: Configure, data: TrainingData, kind: str) -> None:
    # Dropout inside the encoders off and their batch normalisation in eval mode: drawn and computed by parts, both
    # give other numbers than on the whole batch. The fusion, which sees the whole pool, keeps its dropout.
    overrides = ["model.image_encoder={dropout: 0.0}", "model.text_encoder={dropout: 0.0}", "model.fusion_dropout=0.2"]
    overrides += ["distill.intra_weight=0.3", "loss.align={sdm: 1, tal: 0.5}"]
    found = []
    for micro_batch in (0, 5):
        stage = make_stage(config_of(*overrides, f"optim.micro_batch={micro_batch}"), data, kind).double().train()
        if stage.teacher is not None:
            stage.teacher.double()
        for dual in stage.encoders().values():
            dual.eval()
        batch = next(iter(make_loader(stage.config, data, "drawn")))
        assert len(batch.tokens) > len(batch) > 5
        images = BatchAugment(data.image_size).train()(batch.images, 1).double()
        torch.manual_seed(0)
        loss = torch.stack(list(stage.losses(images, batch).values())).sum()
        loss.backward()
        found.append((loss.detach(), gradients(stage)))
    (loss, plain), (cached_loss, cached) = found
    torch.testing.assert_close(loss, cached_loss, rtol=1e-12, atol=1e-12)
    assert largest_difference(plain, cached) < 1e-11


def encoder() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 4))


def contrast(features: Tensor) -> Tensor:
    return torch.logsumexp(features @ features.T, 1).sum()


@pytest.mark.parametrize("precision", ["double", "bfloat16"])
def test_dropout_is_drawn_again_and_running_statistics_once(precision: str) -> None:
    """Against the method's own words: features without a graph, their gradient, then each part again with one."""
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(2))
    cached, by_hand = encoder(), encoder()
    if precision == "double":
        x, cached, by_hand = x.double(), cached.double(), by_hand.double()

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")

    torch.manual_seed(7)
    with autocast():
        features = encode_in_parts(cached, (x,), 4, cached)
    contrast(features.to(x.dtype)).backward()
    after = torch.get_rng_state()

    torch.manual_seed(7)
    states, parts = [], []
    with torch.no_grad(), autocast():
        for part in x.split(4):
            states.append(torch.get_rng_state())
            parts.append(by_hand(part))
    assert torch.equal(torch.get_rng_state(), after)
    statistics = {name: value.clone() for name, value in by_hand.named_buffers()}
    whole = torch.cat(parts).requires_grad_()
    contrast(whole.to(x.dtype)).backward()
    assert whole.grad is not None
    for part, state, gradient in zip(x.split(4), states, whole.grad.split(4), strict=True):
        torch.set_rng_state(state)
        with autocast():
            again = by_hand(part)
        again.backward(gradient)
    # Parts are added in another order; in bfloat16 the sums are in float32 all the same.
    tolerance = 1e-12 if precision == "double" else 1e-4
    scale = max(float(value.abs().max()) for value in gradients(by_hand).values())
    assert largest_difference(gradients(cached), gradients(by_hand)) < tolerance * scale
    assert all(torch.equal(value, statistics[name]) for name, value in cached.named_buffers())
    assert int(cached[1].num_batches_tracked) == 3  # type: ignore[arg-type]
    assert cached[1].momentum == 0.1


def test_parts_are_encoded_twice_only_where_there_is_a_gradient() -> None:
    layer = nn.Linear(3, 3)
    seen: list[int] = []

    def encode(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return layer(rows)

    contrast(encode_in_parts(encode, (torch.randn(10, 3),), 4, layer)).backward()
    assert seen == [4, 4, 2, 2, 4, 4]  # the graph is walked from the last part to the first
    seen.clear()
    with torch.no_grad():
        encode_in_parts(encode, (torch.randn(10, 3),), 4, layer)
    layer.requires_grad_(False)
    encode_in_parts(encode, (torch.randn(10, 3),), 4, layer)
    assert seen == [4, 4, 2, 4, 4, 2]


def test_gradients_are_reduced_once_under_ddp(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = encoder().double().eval()
        wrapped = nn.parallel.DistributedDataParallel(_InParts(copy.deepcopy(plain)))
        reduced: list[int] = []

        def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            reduced.append(bucket.index())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        wrapped.register_comm_hook(None, hook)
        x = torch.randn(11, 6, dtype=torch.float64)
        contrast(wrapped(x)).backward()
        contrast(plain(x)).backward()
        assert reduced == [0]
        assert largest_difference(gradients(wrapped.module.inner), gradients(plain)) < 1e-11
    finally:
        dist.destroy_process_group()


class _InParts(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return encode_in_parts(self.inner, (x,), 4, self.inner)


def test_whole_stages_run_with_accumulation_clipping_and_bfloat16(config_of: Configure, data: TrainingData) -> None:
    config = config_of("optim.micro_batch=6", "optim.accumulate=2", "optim.grad_clip=1", "precision=bf16-mixed")
    plain = fit_student(config, data, epochs=1)
    teacher = fit_teacher(config, data, init=plain.model.student, epochs=1)
    assert plain.steps == teacher.steps > 0
    assert all(value.dtype == torch.float32 for value in teacher.model.parameters())
    assert all(bool(value.isfinite().all()) for value in teacher.model.parameters())
