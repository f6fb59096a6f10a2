"""The operators: fused kernels for cross-modal retrieval and distillation, as PyTorch custom operators."""

from lcr2s_ext.ops._backend import BackendUnavailableError, explain, use_backend
from lcr2s_ext.ops.support_attention import support_attention
from lcr2s_ext.ops.support_index import SupportIndex

__all__ = [
    "BackendUnavailableError",
    "SupportIndex",
    "explain",
    "support_attention",
    "use_backend",
]
