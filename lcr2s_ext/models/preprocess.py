"""From what users hold (a PIL image, a file, uint8 or float tensors) to what an image encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ImageInput", "images_to_tensor", "normalize_images"]

# PIL.Image.Image is left out of the annotation so that importing this module does not import Pillow.
ImageInput = Any


def normalize_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(B, 3, H, W)`` uint8 in 0..255 or floats in 0..1 to ``(x - mean) / std`` per channel."""
    if images.dtype == torch.uint8:
        images = images.float().div_(255.0)
    shape = (1, 3, 1, 1)
    mean_row = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    std_row = torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)
    return (images - mean_row) / std_row


def images_to_tensor(images: ImageInput, size: tuple[int, int]) -> Tensor:
    """A batch ``(B, 3, *size)``: uint8 in 0..255, or floats in 0..1 where floats came in.

    Args:
        images: a PIL image, a path, or a sequence of them; a uint8 tensor or array ``(3, H, W)`` or ``(B, 3, H, W)``;
            a float tensor of these shapes with values in 0..1. Other sizes are resized (bilinear, antialiased).
        size: ``(H, W)``.

    Raises:
        TypeError: for anything else, naming what came.
        ValueError: for a shape that is not three-channel images.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if isinstance(images, Tensor):
        return _resized(images, size)
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("images: expected at least one image, got an empty sequence")
        if all(isinstance(image, Tensor) for image in images):
            return torch.cat([_resized(image, size) for image in images])
        return torch.stack([_open(image, size) for image in images])
    return _open(images, size)[None]


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.dim() == 3:
        images = images[None]
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape (3, H, W) or (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    if images.dtype == torch.uint8:
        return resized.round().clamp(0, 255).to(torch.uint8)
    return resized.to(images.dtype)


def _open(image: ImageInput, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    if isinstance(image, (str, Path)):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"images: expected a PIL image, a path, a tensor or a list of them, got {type(image).__name__}")
    image = image.convert("RGB")
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
