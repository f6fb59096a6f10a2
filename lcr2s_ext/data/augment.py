"""Augmentation of whole batches with kornia, determined by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BatchAugment(nn.Module):
    """Random crop after padding, flip, brightness, contrast and erasing, each image on its own; then normalisation.

    In training mode a call augments, in eval mode (``.eval()``) it normalises only. Crop and flip are one resampling of
    the batch (``kornia.geometry.transform.remap``, nearest pixel, so shifts are exact); pixels from beyond the border
    repeat the border.

    Args:
        size: Height and width of the images.
        pad: Largest shift in pixels, in both directions.
        flip: Probability of a horizontal flip.
        erasing: Probability of a rectangle of 2 to 40 % of the area being erased to the mean.
        brightness: Largest amount added, images being in [0, 1].
        contrast: Largest relative change of contrast.
        mean: Per channel, for images in [0, 1].
        std: Per channel.

    Raises:
        TypeError, ValueError: An argument out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        *,
        pad: int = 3,
        flip: float = 0.5,
        erasing: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(type(side) is int for side in size):
            raise TypeError(f"size must be two ints (height, width), got {size!r}")
        if isinstance(pad, bool) or not isinstance(pad, int):
            raise TypeError(f"pad must be an int, got {pad!r}")
        if not 0 <= pad < min(size):
            raise ValueError(f"pad must be in [0, {min(size)}), got {pad}")
        for name, value in (("flip", flip), ("erasing", erasing), ("brightness", brightness), ("contrast", contrast)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a float, got {value!r}")
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"{name} must have three values, got {len(values)}")
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.size = (size[0], size[1])
        self.pad, self.flip, self.erasing = pad, flip, erasing
        self.brightness, self.contrast = brightness, contrast
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) to float32: divided by 255, less the mean, by the standard deviation."""
        return self._standardize(self._to_float(images))

    def _to_float(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.size):
            raise ValueError(
                f"images must have shape (n, 3, {self.size[0]}, {self.size[1]}), got {tuple(images.shape)}"
            )
        return images.float().div_(255.0)

    def _standardize(self, pixels: Tensor) -> Tensor:
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return pixels.sub_(mean).div_(std)

    def forward(self, images: Tensor, seed: int = 0, *, rows: Tensor | None = None, total: int | None = None) -> Tensor:
        """Augments (in training mode) and normalises.

        Args:
            images: uint8 (n, 3, H, W) on any device.
            seed: Determines every draw; draws are made on the host, so they are the same on every device.
            rows: int64 (n) positions of these images among the ``total`` that are drawn for; None takes them for all.
            total: Images of the whole batch, where ``rows`` is given.

        Returns:
            float32 (n, 3, H, W).

        Raises:
            TypeError, ValueError: ``images`` of another type or shape.
        """
        pixels = self._to_float(images)
        if not self.training or not len(pixels):
            return self._standardize(pixels)
        import kornia

        generator = torch.Generator().manual_seed(seed)
        # One row of uniform numbers per image, whatever is switched on.
        draws = torch.rand((len(pixels) if total is None else total, 10), generator=generator)
        draws = (draws if rows is None else draws[rows.cpu()]).to(pixels.device)
        if self.pad or self.flip:
            pixels = self._move(pixels, draws)
        if self.brightness:
            pixels = kornia.enhance.adjust_brightness(pixels, self.brightness * (2 * draws[:, 3] - 1))
        if self.contrast:
            pixels = kornia.enhance.adjust_contrast(pixels, 1 + self.contrast * (2 * draws[:, 4] - 1))
        if self.erasing:
            pixels = torch.where(self._erased(draws), self.mean.to(pixels.device), pixels)
        return self._standardize(pixels)

    def _move(self, pixels: Tensor, draws: Tensor) -> Tensor:
        from kornia.geometry.transform import remap

        height, width = self.size
        across = torch.arange(width, dtype=torch.float32, device=pixels.device)
        down = torch.arange(height, dtype=torch.float32, device=pixels.device)
        shift = torch.floor(draws[:, :2] * (2 * self.pad + 1)) - self.pad
        flipped = (draws[:, 2] < self.flip)[:, None]
        x = torch.where(flipped, (width - 1) - across, across) + shift[:, :1]
        y = down + shift[:, 1:]
        count = len(pixels)
        return remap(
            pixels,
            x[:, None, :].expand(count, height, width),
            y[:, :, None].expand(count, height, width),
            mode="nearest",
            padding_mode="border",
            align_corners=True,
        )

    def _erased(self, draws: Tensor) -> Tensor:
        """Boolean (n, 1, H, W): what is erased."""
        height, width = self.size
        area = height * width * (0.02 + 0.38 * draws[:, 6])
        aspect = torch.exp((2 * draws[:, 7] - 1) * 1.2)
        tall = torch.sqrt(area * aspect).clamp(1, height)
        wide = (area / tall).clamp(1, width)
        top = draws[:, 8] * (height - tall)
        left = draws[:, 9] * (width - wide)
        down = torch.arange(height, device=draws.device)[None, :] + 0.5
        across = torch.arange(width, device=draws.device)[None, :] + 0.5
        rows = (down >= top[:, None]) & (down < (top + tall)[:, None])
        columns = (across >= left[:, None]) & (across < (left + wide)[:, None])
        applied = draws[:, 5] < self.erasing
        return (rows[:, :, None] & columns[:, None, :] & applied[:, None, None])[:, None]
