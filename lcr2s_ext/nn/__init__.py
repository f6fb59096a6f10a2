"""Modules on top of :mod:`lcr2s_ext.ops`: support-set fusion and the losses of the method and its alternatives."""

from lcr2s_ext.nn.fusion import SupportSetFusion
from lcr2s_ext.nn.losses import (
    ALIGNMENT_LOSSES,
    CMPMLoss,
    FeatureDistillationLoss,
    IdentityLoss,
    InfoNCELoss,
    RelationFrobeniusLoss,
    RelationKLLoss,
    SDMLoss,
    TALLoss,
    make_alignment_loss,
)
from lcr2s_ext.nn.mlm import MaskedLanguageHead

__all__ = [
    "ALIGNMENT_LOSSES",
    "CMPMLoss",
    "FeatureDistillationLoss",
    "IdentityLoss",
    "InfoNCELoss",
    "MaskedLanguageHead",
    "RelationFrobeniusLoss",
    "RelationKLLoss",
    "SDMLoss",
    "SupportSetFusion",
    "TALLoss",
    "make_alignment_loss",
]
