"""The operators: fused kernels for cross-modal retrieval and distillation, as PyTorch custom operators."""

from lcr2s_ext.ops._backend import BackendUnavailableError, explain, use_backend
from lcr2s_ext.ops._workspace import set_workspace_limit
from lcr2s_ext.ops.relation import relation_frobenius_loss, relation_kl_loss
from lcr2s_ext.ops.retrieval import retrieval_metrics, topk_similarity
from lcr2s_ext.ops.similarity import cmpm_loss, info_nce_loss, sdm_loss, tal_loss
from lcr2s_ext.ops.support_attention import support_attention
from lcr2s_ext.ops.support_index import SupportIndex

__all__ = [
    "BackendUnavailableError",
    "SupportIndex",
    "cmpm_loss",
    "explain",
    "info_nce_loss",
    "relation_frobenius_loss",
    "relation_kl_loss",
    "retrieval_metrics",
    "sdm_loss",
    "set_workspace_limit",
    "support_attention",
    "tal_loss",
    "topk_similarity",
    "use_backend",
]
