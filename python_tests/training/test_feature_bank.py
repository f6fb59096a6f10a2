"""Support rows from past batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcr2s_ext.data import TrainingDataset
from lcr2s_ext.training import TrainConfig, TrainingData, fit_one_stage, fit_student, fit_teacher
from lcr2s_ext.training.counter import counter_bits
from lcr2s_ext.training.feature_bank import FeatureBank
from lcr2s_ext.training.prepare import make_loader, make_model, make_teacher
from lcr2s_ext.training.stages import TeacherStage

Configure = Callable[..., TrainConfig]

BANK = ["data.support=bank", "data.bank_size=40"]


def naive(bank: FeatureBank, ids: Tensor, own: Tensor, kept: Tensor) -> list[set[int]]:
    """What may be drawn: the newest of every other image (caption) of the identity."""
    newest: dict[int, int] = {}
    filled = bank.labels >= 0
    oldest_first = sorted(filled.nonzero().flatten().tolist(), key=lambda slot: (slot - int(bank.position)) % bank.size)
    for slot in oldest_first:
        newest[int(kept[slot])] = slot
    return [
        {slot for key, slot in newest.items() if bank.labels[slot] == ids[i] and key != own[i]} for i in range(len(ids))
    ]


def test_draws_are_the_newest_other_rows_of_the_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = FeatureBank(50, 4, seed=3)
    whole = FeatureBank(50, 4, seed=3)
    captions = torch.arange(60)
    images, labels = captions // 2, captions // 6
    for step in range(30):
        samples = torch.randperm(60, generator=generator)[:8]
        batch = (labels[samples], images[samples], samples)
        drawn = bank.draw(*batch, max_support=3, epoch=step // 7)
        for (rows, support), own, kept in ((drawn[0], batch[1], bank.items), (drawn[1], samples, bank.samples)):
            allowed = naive(bank, batch[0], own, kept)
            assert support.num_rows == 8 + len(rows)
            for i, (first, last) in enumerate(zip(support.indptr[:-1], support.indptr[1:], strict=True)):
                entries = support.indices[first:last].tolist()
                chosen = [int(rows[entry - 8]) for entry in entries[1:]]
                assert entries[0] == i
                assert set(chosen) <= allowed[i]
                assert len(set(chosen)) == len(chosen) == min(3, len(allowed[i]))
        # Who stands beside a row in its batch changes nothing about its draw.
        half = whole.draw(batch[0][4:], batch[1][4:], samples[4:], max_support=3, epoch=step // 7)
        for (rows, support), (some, part) in zip(drawn, half, strict=True):
            first = int(support.indptr[4])
            assert [int(rows[e - 8]) for e in support.indices[first:] if e >= 8] == [
                int(some[e - 4]) for e in part.indices if e >= 4
            ]
        features = torch.randn(2, 8, 4, generator=generator)
        bank.push(*features, *batch)
        whole.push(*features, *batch)
        assert torch.equal(bank.image[(int(bank.position) - 1) % 50], features[0, -1])
    assert int(bank.position) == 30 * 8 % 50
    other = bank.draw(*batch, max_support=3, epoch=99)
    assert not torch.equal(other[1][0], drawn[1][0])


def test_a_batch_larger_than_the_bank_leaves_its_last_rows() -> None:
    bank = FeatureBank(3, 2, seed=0)
    features = torch.arange(10.0).view(5, 2)
    bank.push(features, -features, torch.zeros(5, dtype=torch.int64), torch.arange(5), torch.tensor([0, 1, 2, 3, 3]))
    assert torch.equal(bank.image, features[2:])
    assert bank.newest_sample.tolist() == [True, False, True]
    assert bank.newest_item.all()


def test_bits_are_even_and_depend_on_every_number() -> None:
    a, b = torch.arange(64)[:, None], torch.arange(64)
    bits = counter_bits(5, a, b)
    assert len(bits.unique()) == 64 * 64
    assert abs(float((bits.double() / 2**53).mean()) - 0.5) < 0.02
    assert not torch.equal(bits, counter_bits(6, a, b))
    assert not torch.equal(bits, counter_bits(5, b, a))


def stage_of(config: TrainConfig, data: TrainingData) -> tuple[TeacherStage, Any]:
    loader = make_loader(config, data, config.data.support)
    stage = TeacherStage(
        config,
        "teacher",
        make_teacher(config, data),
        lambda images, *_, **__: images.float() / 255,
        num_identities=data.splits["train"].num_identities,
        epochs=1,
        steps_per_epoch=len(loader),
        evaluate=None,
    )
    return stage, loader


def test_the_fusion_gets_stored_features_and_no_encoder_rows(config_of: Configure, data: TrainingData) -> None:
    stage, loader = stage_of(config_of(*BANK, "data.batch_size=8"), data)
    pools: list[tuple[Tensor, Any]] = []
    stage.model.image_fusion.register_forward_pre_hook(lambda _, arguments: pools.append(arguments))
    encoded: list[Tensor] = []
    stage.model.encoders.image_encoder.register_forward_hook(lambda *call: encoded.append(call[2]))
    for batch in loader:
        stage.losses(batch.images.float() / 255, batch)
    assert all(len(rows) == 8 for rows in encoded)
    assert len(pools[0][0]) == 8  # nothing is there yet
    pool, support = pools[-1]
    assert len(pool) > 8
    assert len(support.indices) > 8
    past = torch.cat(encoded[:-1])
    stored = pool[8:]
    assert all((past == row).all(1).any() for row in stored)
    assert torch.autograd.grad(pool.sum(), encoded[-1], retain_graph=True)[0].eq(1).all()  # none through the bank
    assert not any("bank" in name for name in stage.model.state_dict())


class CrashError(Exception):
    pass


@pytest.mark.parametrize("kind", ["teacher", "one_stage", "student"])
def test_resumed_run_is_the_same_run(
    config_of: Configure, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = config_of(*BANK, "teacher.start=scratch", "loggers=[]", "eval_every=2")
    fixed = make_teacher(config, data)

    def fit(folder: str, resume: bool = False) -> Any:
        options: dict[str, Any] = {"out": tmp_path / folder, "resume": resume}
        if kind == "teacher":
            return fit_teacher(config, data, **options)
        if kind == "one_stage":
            return fit_one_stage(config, data, **options)[0]
        return fit_student(config, data, teacher=fixed, **options)

    whole = fit("whole")
    make_batch = TrainingDataset.make_batch

    def crashing(self: TrainingDataset, samples: Any, *rest: Any) -> Any:
        if (samples.epoch, samples.step) == (1, 1):
            raise CrashError
        return make_batch(self, samples, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDataset, "make_batch", crashing)
        with pytest.raises(CrashError):
            fit("parts")
    parts = fit("parts", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name])
    saved = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "parts")]
    assert bool((saved[0]["bank.labels"] >= 0).all())
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert not any("bank" in name for name in make_model(config, data).student.state_dict())
