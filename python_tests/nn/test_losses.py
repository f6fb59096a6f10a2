"""The loss modules: what they add to the operators."""

import math

import pytest
import torch
from torch.nn import functional as F

from lcr2s_ext import nn, ops

IDS = torch.tensor([0, 0, 1, 2, 1, 3])


def features(width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, width, generator=generator), torch.randn(6, width, generator=generator)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.SDMLoss(20.0), lambda v, t: ops.sdm_loss(v, t, IDS, logit_scale=20.0)),
        (nn.InfoNCELoss(20.0), lambda v, t: ops.info_nce_loss(v, t, IDS, IDS, logit_scale=20.0)),
        (nn.InfoNCELoss(20.0, many_to_many=False), lambda v, t: ops.info_nce_loss(v, t, logit_scale=20.0)),
        (nn.CMPMLoss(target="sum"), lambda v, t: ops.cmpm_loss(v, t, IDS, target="sum")),
        (nn.TALLoss(margin=0.2, tau=0.05), lambda v, t: ops.tal_loss(v, t, IDS, margin=0.2, tau=0.05)),
    ],
)
def test_alignment_modules_call_their_operator(module: torch.nn.Module, expected: object) -> None:
    image, text = features()
    torch.testing.assert_close(module(image, text, IDS), expected(image, text))  # type: ignore[operator]


@pytest.mark.parametrize("name", nn.ALIGNMENT_LOSSES)
def test_made_by_name(name: str) -> None:
    image, text = features()
    assert nn.make_alignment_loss(name, logit_scale=10.0)(image, text, IDS).isfinite()


def test_unknown_name_and_missing_scale() -> None:
    with pytest.raises(ValueError, match="align: expected one of sdm, info_nce, cmpm, tal, got 'clip'"):
        nn.make_alignment_loss("clip")
    with pytest.raises(ValueError, match="learn_logit_scale"):
        nn.make_alignment_loss("cmpm", learnable=True)
    with pytest.raises(ValueError, match="logit_scale"):
        nn.SDMLoss(0.0)


@pytest.mark.parametrize("kind", [nn.SDMLoss, nn.InfoNCELoss])
def test_learnt_scale_starts_as_told_and_gets_the_gradient_of_its_logarithm(kind: type) -> None:
    image, text = (x.double() for x in features())
    loss = kind(20.0, learnable=True)
    fixed = kind(20.0)(image, text, IDS)
    made = loss(image, text, IDS)
    torch.testing.assert_close(made, fixed, rtol=1e-6, atol=1e-6)
    made.backward()
    step = 1e-3
    up, down = (kind(20.0 * math.exp(sign * step))(image, text, IDS) for sign in (1, -1))
    assert loss.logit_scale.log_scale.grad == pytest.approx(float((up - down) / (2 * step)), rel=1e-3)


def test_learnt_scale_is_capped() -> None:
    loss = nn.InfoNCELoss(50.0, learnable=True, max_logit_scale=60.0)
    with torch.no_grad():
        loss.logit_scale.log_scale.fill_(10.0)
    assert loss.logit_scale().item() == pytest.approx(60.0)


def test_relation_modules_call_their_operator() -> None:
    student, teacher = features(16, 1), features(24, 2)
    torch.testing.assert_close(
        nn.RelationFrobeniusLoss(reduction="row")(*student, *teacher),
        ops.relation_frobenius_loss(*student, *teacher, reduction="row"),
    )
    torch.testing.assert_close(
        nn.RelationKLLoss(student_scale=10.0, teacher_scale=20.0)(*student, *teacher),
        ops.relation_kl_loss(*student, *teacher, student_scale=10.0, teacher_scale=20.0),
    )
    with pytest.raises(ValueError, match="reduction"):
        nn.RelationFrobeniusLoss(reduction="batch")
    with pytest.raises(ValueError, match="teacher_scale"):
        nn.RelationKLLoss(teacher_scale=-1.0)


def test_feature_distillation_is_the_formula_and_its_reductions() -> None:
    (v, t), (ev, et) = features(16, 1), features(16, 2)
    v.requires_grad_()
    ev.requires_grad_()
    raw = (v - ev).square().sum() + (t - et).square().sum()
    for reduction, divisor in (("sum", 1), ("row", 6), ("mean", 6 * 16)):
        loss = nn.FeatureDistillationLoss(16, 16, normalize=False, reduction=reduction)(v, t, ev, et)
        torch.testing.assert_close(loss, raw / divisor)
    unit = nn.FeatureDistillationLoss(16, 16)(v, t, ev, et)
    expected = 2 - 2 * F.cosine_similarity(v, ev).mean() + 2 - 2 * F.cosine_similarity(t, et).mean()
    torch.testing.assert_close(unit, expected)
    unit.backward()
    assert v.grad is not None
    assert ev.grad is None


def test_feature_distillation_maps_where_widths_differ() -> None:
    loss = nn.FeatureDistillationLoss(16, 24)
    loss(*features(16, 1), *features(24, 2)).backward()
    assert all(weight.grad is not None for weight in loss.parameters())
    assert sum(1 for _ in nn.FeatureDistillationLoss(16, 16).parameters()) == 0
    assert sum(1 for _ in nn.FeatureDistillationLoss(16, 16, projection=True).parameters()) == 4
    with pytest.raises(ValueError, match="projection"):
        nn.FeatureDistillationLoss(16, 24, projection=False)
    with pytest.raises(ValueError, match="teacher_image"):
        nn.FeatureDistillationLoss(16, 16)(*features(16), *features(24))


def test_identity_loss_is_the_mean_of_both_modalities_over_one_classifier() -> None:
    (image, text), loss = features(), nn.IdentityLoss(16, 4)
    expected = (F.cross_entropy(loss.classifier(image), IDS) + F.cross_entropy(loss.classifier(text), IDS)) / 2
    torch.testing.assert_close(loss(image, text, IDS), expected)
    with pytest.raises(ValueError, match="num_identities"):
        nn.IdentityLoss(16, 0)
    with pytest.raises(ValueError, match="text"):
        loss(image, text[:3], IDS)
