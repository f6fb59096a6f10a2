"""Encoders made ready for a stage: memory format and compilation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from lcr2s_ext.models import DualEncoder
from lcr2s_ext.training.config import TrainConfig

__all__ = ["accelerated"]


@contextmanager
def accelerated(encoders: Iterable[DualEncoder], config: TrainConfig) -> Iterator[None]:
    """Encoders in channels-last format and compiled inside, as the configuration has it; uncompiled afterwards.

    Compilation is in place (``nn.Module.compile``): names of parameters, checkpoints and saved models do not know
    of it.
    """
    modules = [module for dual in encoders for module in (dual.image_encoder, dual.text_encoder)]
    if config.channels_last:
        for module in modules:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        for module in modules:
            module.compile(backend=config.compile, mode=config.compile_mode or None)
    try:
        yield
    finally:
        if config.compile:
            for module in modules:
                module._compiled_call_impl = None
