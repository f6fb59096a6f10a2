"""The plain dual encoder (the student's architecture) and the teacher built around one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lcr2s_ext import ops
from lcr2s_ext.models.encoders import TokenFeatures
from lcr2s_ext.nn import SupportSetFusion

__all__ = ["DualEncoder", "Student", "Teacher", "TeacherFeatures"]


def _output_width(encoder: nn.Module, name: str) -> int:
    width = getattr(encoder, "output_width", None)
    if not isinstance(width, int) or width < 1:
        raise TypeError(
            f"{name}: an encoder states its feature width in a positive int attribute `output_width`, "
            f"{type(encoder).__name__} has {width!r}"
        )
    return width


class DualEncoder(nn.Module):
    """An image encoder and a text encoder into one space.

    Args:
        image_encoder: any module with an int ``output_width``, ``(B, 3, H, W)`` to ``(B, output_width)``.
        text_encoder: any module with an int ``output_width``, ``(B, L)`` int64 tokens to ``(B, output_width)``.
        width: shared feature width ``d``; an encoder of another width gets a linear map. ``None`` takes the image
            encoder's.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, width: int | None = None) -> None:
        super().__init__()
        image_width = _output_width(image_encoder, "image_encoder")
        text_width = _output_width(text_encoder, "text_encoder")
        self.output_width = image_width if width is None else width
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.image_projection = self._projection(image_width)
        self.text_projection = self._projection(text_width)

    def _projection(self, width: int) -> nn.Module:
        return nn.Identity() if width == self.output_width else nn.Linear(width, self.output_width)

    def image_features(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised images to ``(B, d)`` features, not L2-normalised."""
        return self.image_projection(self.image_encoder(images))

    def text_features(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``(B, L)`` int64 tokens to ``(B, d)`` features, not L2-normalised.

        ``hidden`` is what a text encoder with a frozen backbone computed of these tokens before.
        """
        encoded = self.text_encoder(tokens) if hidden is None else self.text_encoder(tokens, hidden)
        return self.text_projection(encoded)

    def image_token_features(self, images: Tensor) -> TokenFeatures:
        """:meth:`image_features` with the patches they are made of; for image encoders with ``token_features``."""
        encoder: Any = self.image_encoder
        made: TokenFeatures = encoder.token_features(images)
        return made._replace(pooled=self.image_projection(made.pooled))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``((B, d), (N, d))`` features of ``(B, 3, H, W)`` images and ``(N, L)`` tokens."""
        return self.image_features(images), self.text_features(tokens)


class Student(DualEncoder):
    """The "lightweight" model: a plain dual encoder on single inputs, the only one used at test."""


class TeacherFeatures(NamedTuple):
    """What a teacher makes of a batch: fused features of the ``B`` anchors, and the encoders' own of the same rows."""

    image: Tensor
    text: Tensor
    single_image: Tensor
    single_text: Tensor


class Teacher(nn.Module):
    """The "richer" model: a dual encoder and one :class:`~lcr2s_ext.nn.SupportSetFusion` per modality.

    Args:
        encoders: the dual encoder.
        num_heads: heads of both fusions.
        feed_forward: hidden width of their feed-forward blocks, ``None`` for none.
        dropout: inside the fusions.
        input_norm: LayerNorm on encoder outputs before the fusion.
    """

    def __init__(
        self,
        encoders: DualEncoder,
        *,
        num_heads: int = 8,
        feed_forward: int | None = None,
        dropout: float = 0.0,
        input_norm: bool = True,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.output_width = encoders.output_width

        def fusion() -> SupportSetFusion:
            return SupportSetFusion(
                encoders.output_width, num_heads, feed_forward=feed_forward, dropout=dropout, input_norm=input_norm
            )

        self.image_fusion = fusion()
        self.text_fusion = fusion()

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        image_support: ops.SupportIndex | None = None,
        text_support: ops.SupportIndex | None = None,
    ) -> TeacherFeatures:
        """Features of the anchors, the first ``B`` rows of each pool.

        Args:
            images: ``(Mv, 3, H, W)`` normalised images: anchors first, then support rows. Each row is encoded once.
            tokens: ``(Mt, L)`` int64 tokens: anchors first, then support rows.
            image_support: ``B`` sets over the ``Mv`` rows, self included; ``None`` fuses every row with itself alone.
            text_support: ``B`` sets over the ``Mt`` rows.
        """
        image, text = self.encoders(images, tokens)
        return self.fuse(image, text, image_support, text_support)

    def fuse(
        self,
        image: Tensor,
        text: Tensor,
        image_support: ops.SupportIndex | None = None,
        text_support: ops.SupportIndex | None = None,
    ) -> TeacherFeatures:
        """The same from the encoders' ``(Mv, d)`` and ``(Mt, d)`` features, wherever the support rows come from."""
        return TeacherFeatures(
            self.image_fusion(image, image_support),
            self.text_fusion(text, text_support),
            image if image_support is None else image[: len(image_support)],
            text if text_support is None else text[: len(text_support)],
        )
