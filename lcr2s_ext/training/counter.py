"""Random numbers that depend on named integers alone: the same on every device, in any batch, on any rank."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counter_bits"]


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mixed(state: Tensor) -> Tensor:
    """splitmix64's finaliser; the shifts of int64 are arithmetic, the masks make them logical."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _FIRST
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _SECOND
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def counter_bits(key: int, *numbers: Tensor) -> Tensor:
    """int64 in [0, 2**53), evenly spread: a hash of ``key`` and of int64 tensors that broadcast with each other."""
    state: Tensor = torch.zeros((), dtype=torch.int64, device=numbers[0].device) + _signed(key % (1 << 64))
    for number in numbers:
        state = _mixed(state + number + _GOLDEN)
    return (state >> 11) & ((1 << 53) - 1)
