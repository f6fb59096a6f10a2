"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage"]


class WeightAverage:
    """``average = decay * average + (1 - decay) * weights`` after every step of the optimiser.

    Parameters and floating buffers (the statistics of batch normalisation) are averaged, other buffers copied. In the
    beginning the decay is ``(1 + n) / (10 + n)`` after ``n`` updates where that is smaller, so that the initial
    weights are soon forgotten.

    Args:
        module: whose weights are averaged; the average starts from them, on their device.
        decay: in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.updates = 0
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in."""
        now = self.module.state_dict()
        floats = [name for name, value in self.state.items() if value.is_floating_point()]
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)([self.state[name] for name in floats], [now[name] for name in floats], None)
        for name in self.state.keys() - set(floats):
            self.state[name].copy_(now[name])
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the average as its weights inside, its own again afterwards."""
        own = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.state)
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "state": self.state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.updates = saved["updates"]
        values: dict[str, Tensor] = saved["state"]
        for name, value in self.state.items():
            value.copy_(values[name])
