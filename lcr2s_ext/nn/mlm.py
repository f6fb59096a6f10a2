"""Masked language modelling with the image at hand: implicit relation reasoning."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MaskedLanguageHead"]


class MaskedLanguageHead(nn.Module):
    """Logits of the masked words of a caption from its other words and the image.

    Every token of the masked caption queries the image's patches by cross-attention; transformer layers over the
    caption follow, then a classifier over the vocabulary: implicit relation reasoning of IRRA (Jiang and Ye, CVPR 2023,
    arXiv 2303.12501). GELU stands for QuickGELU, and padding is left out of the self-attention.

    Args:
        image_width: of the image's tokens; mapped linearly where it differs from ``width``.
        text_width: of the caption's tokens; the same.
        vocab_size: classes.
        width: inside.
        layers: transformer layers, four in IRRA.
        heads: of every attention; a divisor of ``width``.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, image_width: int, text_width: int, vocab_size: int, *, width: int, layers: int = 4, heads: int = 8
    ) -> None:
        super().__init__()
        if layers < 0:
            raise ValueError(f"layers: expected at least 0, got {layers}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a positive divisor of width {width}, got {heads}")
        self.image_map = nn.Identity() if image_width == width else nn.Linear(image_width, width)
        self.text_map = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.image_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocab_size)
        )

    def forward(self, image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, chosen: Tensor) -> Tensor:
        """Logits at the chosen positions.

        Args:
            image: ``(B, n, image_width)`` tokens of the images.
            image_mask: bool ``(B, n)``, False for padding.
            text: ``(B, L, text_width)`` tokens of the masked captions.
            text_mask: bool ``(B, L)``.
            chosen: bool ``(B, L)``: the positions to predict, ``M`` in all.

        Returns:
            ``(M, vocab_size)``, row by row.
        """
        patches = self.image_norm(self.image_map(image))
        words = self.text_norm(self.text_map(text))
        x = self.cross_attention(words, patches, patches, key_padding_mask=~image_mask, need_weights=False)[0]
        padding = ~text_mask
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.classifier(self.norm(x[chosen]))
