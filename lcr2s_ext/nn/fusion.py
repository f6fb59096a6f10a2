"""Multi-head attentional fusion (MHAF) of a row with its support set."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from lcr2s_ext import ops

__all__ = ["SupportSetFusion"]


class SupportSetFusion(nn.Module):
    r"""Fuse each row with its support set: the teacher's "richer" feature.

    For row :math:`i` with set :math:`X_i = [f_i; S_i]` (self first, the rest unordered) and heads of width ``d / H``::

        q = W_q f_i        k_j = W_k x_j        v_j = W_v x_j            for x_j in X_i
        a^h = softmax_j(q^h . k_j^h / sqrt(d / H))
        e_i = LayerNorm(f_i + W_o concat_h(sum_j a^h_j v^h_j))

    Source: LCR²S (Yan et al., ACM MM 2023, arXiv 2310.11210), multi-head attentional fusion. Choices the paper leaves
    open and this library makes: ``num_heads = 8``, the LayerNorm in front (``input_norm``, without it encoder outputs
    of large norm make the attention one-hot), the optional feed-forward block.

    Keys and values are linear in the pool of distinct rows, so each pool row is projected once and
    :func:`lcr2s_ext.ops.support_attention` gathers by index; sets are ragged, nothing is padded.

    Args:
        width: feature width ``d``; a multiple of ``num_heads``.
        num_heads: ``H``.
        input_norm: apply a LayerNorm to the pool first; ``f`` and ``x`` above are then its outputs.
        feed_forward: hidden width of a pre-norm feed-forward block after the fusion; ``None`` for no block.
        dropout: probability of dropping entries of the attended vector after ``W_o`` and inside the feed-forward block.
        bias: whether the four projections have a bias.
        backend: backend of the attention; ``None`` means the active one.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        *,
        input_norm: bool = True,
        feed_forward: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected a positive int, got {width}")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads: expected a positive divisor of width {width}, got {num_heads}")
        if feed_forward is not None and feed_forward < 1:
            raise ValueError(f"feed_forward: expected None or a positive int, got {feed_forward}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.width = width
        self.num_heads = num_heads
        self.backend = backend
        self.input_norm = nn.LayerNorm(width) if input_norm else nn.Identity()
        self.query = nn.Linear(width, width, bias=bias)
        # One GEMM for keys and values: both read the same pool rows.
        self.key_value = nn.Linear(width, 2 * width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.output_norm = nn.LayerNorm(width)
        self.feed_forward: nn.Module | None = None
        self.feed_forward_norm: nn.Module | None = None
        if feed_forward is not None:
            self.feed_forward = nn.Sequential(
                nn.Linear(width, feed_forward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
            )
            self.feed_forward_norm = nn.LayerNorm(width)

    def extra_repr(self) -> str:
        return f"width={self.width}, num_heads={self.num_heads}"

    def forward(self, pool: Tensor, support: ops.SupportIndex | None, anchors: Tensor | None = None) -> Tensor:
        """Fused features of the anchors.

        Args:
            pool: ``(M, d)`` encoder outputs, floating point; the first ``B`` rows are the anchors unless
                ``anchors`` says otherwise.
            support: ``B`` sets over the ``M`` pool rows, each holding its anchor's own row (``include_self=True``);
                ``None`` means that every anchor stands alone, the same as sets that hold nothing but the anchor.
            anchors: int64 ``(B,)`` pool rows of the anchors; ``None`` means ``0 .. B-1``.

        Returns:
            ``(B, d)`` fused features, not L2-normalised.

        Raises:
            TypeError, ValueError: where shapes, counts or kinds disagree.
        """
        if not isinstance(pool, Tensor):
            raise TypeError(f"pool: expected a Tensor, got {type(pool).__name__}")
        if pool.dim() != 2 or pool.shape[1] != self.width:
            raise ValueError(f"pool: expected shape (M, {self.width}), got {tuple(pool.shape)}")
        rows = pool.shape[0]
        if support is not None:
            if support.num_rows != rows:
                raise ValueError(f"support: made for a pool of {support.num_rows} rows, the pool has {rows}")
            if anchors is None and len(support) > rows:
                raise ValueError(f"support: {len(support)} sets but only {rows} pool rows to be their anchors")
            if anchors is not None and anchors.shape != (len(support),):
                raise ValueError(f"anchors: expected shape ({len(support)},), got {tuple(anchors.shape)}")
        x = self.input_norm(pool)
        if anchors is not None:
            own = x[anchors]
        else:
            own = x if support is None else x[: len(support)]
        if support is None:
            # A softmax over one entry is 1, so the attended vector is the anchor's own value.
            attended = nn.functional.linear(own, *self._value_parameters())
        else:
            key, value = rearrange(self.key_value(x), "m (two h e) -> two m h e", two=2, h=self.num_heads)
            query = rearrange(self.query(own), "b (h e) -> b h e", h=self.num_heads)
            attended = rearrange(
                ops.support_attention(query, key, value, support, backend=self.backend), "b h e -> b (h e)"
            )
        fused = self.output_norm(own + self.dropout(self.output(attended)))
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            fused = self.feed_forward_norm(fused + self.dropout(self.feed_forward(fused)))
        return fused

    def _value_parameters(self) -> tuple[Tensor, Tensor | None]:
        bias = self.key_value.bias
        return self.key_value.weight[self.width :], None if bias is None else bias[self.width :]
