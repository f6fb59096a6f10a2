"""Fused kernels for cross-modal retrieval and distillation, and LCR²S (Yan et al., ACM MM 2023) on top of them."""

from typing import TYPE_CHECKING, Any

from lcr2s_ext import ops
from lcr2s_ext._version import __version__
from lcr2s_ext.ops import BackendUnavailableError, SupportIndex, explain, use_backend

if TYPE_CHECKING:
    from lcr2s_ext.models import LCR2S

__all__ = ["LCR2S", "BackendUnavailableError", "SupportIndex", "__version__", "explain", "ops", "use_backend"]


def __getattr__(name: str) -> Any:
    # The models are imported when first asked for: operators alone should not pay for them.
    if name == "LCR2S":
        from lcr2s_ext.models import LCR2S

        return LCR2S
    raise AttributeError(f"module 'lcr2s_ext' has no attribute {name!r}")
