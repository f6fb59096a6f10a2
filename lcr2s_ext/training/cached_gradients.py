"""Large contrastive batches in little memory: gradients through features that are encoded again, part by part.

Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021,
arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["encode_in_parts"]


def encode_in_parts(
    encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], micro_batch: int, modules: nn.Module
) -> Tensor:
    """``encode(*inputs)`` with the activations of at most ``micro_batch`` rows in memory at a time.

    Each part is encoded without keeping activations. In the backward, when the gradient of all features is known, the
    parts are encoded again one by one, under the same random state and autocast, and back-propagated. Every loss
    therefore sees the whole batch, and a parameter's gradient reaches it once, summed: under DDP it is reduced once.

    Batch normalisation in train mode takes its statistics from each part, not from the batch; the running statistics
    take in each part once.

    Args:
        encode: rows in, a row of features for each out.
        inputs: tensors of ``rows`` rows, passed to ``encode`` part by part.
        micro_batch: rows of a part; 0 encodes everything at once.
        modules: what ``encode`` runs, for its parameters and batch normalisation.

    Returns:
        ``(rows, d)`` features.
    """
    rows = len(inputs[0])
    if not micro_batch or rows <= micro_batch:
        return encode(*inputs)
    parts = zip(*(value.split(micro_batch) for value in inputs), strict=True)
    if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in modules.parameters()):
        return torch.cat([encode(*part) for part in parts])
    device = inputs[0].device.type

    def encode_part(*part: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(device):
            return encode(*part)
        # Without autocast's cache each part casts the weights for itself, so that its weight gradients are in float32
        # before they are added to those of the other parts.
        with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False):
            return encode(*part)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_kept(modules)

    features = [checkpoint(encode_part, *part, use_reentrant=False, context_fn=contexts) for part in parts]
    return torch.cat([feature for feature in features if feature is not None])


@contextmanager
def _running_statistics_kept(modules: nn.Module) -> Iterator[None]:
    """Batch normalisation does not update its running statistics inside."""
    norms = [module for module in modules.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [(module.momentum, module.num_batches_tracked) for module in norms]
    for module in norms:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, (momentum, batches) in zip(norms, before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, batches
