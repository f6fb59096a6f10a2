"""Alignment losses that are combined."""

import torch

from lcr2s_ext.training import load_config
from lcr2s_ext.training.losses import TaskLoss


def test_combined_losses_are_the_weighted_sum_and_are_reported_one_by_one() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(12, 16), torch.randn(12, 16)
    labels = torch.arange(12) // 3

    def terms(*overrides: str) -> dict[str, float]:
        loss = TaskLoss(load_config(None, ["loss.identity_weight=0", *overrides]).loss, 16, 4)
        return {name: float(value) for name, value in loss(image, text, labels).items()}

    both = terms("loss.align={sdm: 2, tal: 0.5}", "loss.align_weight=3", "loss.logit_scales={tal: 60}")
    sdm = terms("loss.align=sdm")["align"]
    tal = terms("loss.align=[tal]", "loss.logit_scale=60")["align"]
    assert set(both) == {"align_sdm", "align_tal"}
    assert abs(both["align_sdm"] - 6 * sdm) < 1e-4
    assert abs(both["align_tal"] - 1.5 * tal) < 1e-4


def test_learnt_scale_of_one_loss_leaves_the_other_fixed() -> None:
    loss = TaskLoss(load_config(None, ["loss.align=[sdm, tal]", "loss.learn_logit_scale=true"]).loss, 16, 4)
    assert [name for name, _ in loss.align.named_parameters()] == ["sdm.logit_scale.log_scale"]
