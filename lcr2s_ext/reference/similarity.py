"""Similarity losses in plain PyTorch; every function forms the B x N cosine matrix."""

import torch
from torch import Tensor

# Autocast would turn the cosine's matrix product into a half one; the statistics of a loss stay in float32.


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalised rows and norms (rows, 1) in the statistics dtype; a zero row stays zero and gets no gradient."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    zero = norm == 0
    return torch.where(zero, 0.0, features / torch.where(zero, 1.0, norm)), norm


def _cosine(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (B, N) and the norms (B, 1), (N, 1)."""
    image_unit, image_norm = _unit(image)
    text_unit, text_norm = _unit(text)
    dtype = torch.promote_types(image_unit.dtype, text_unit.dtype)
    return image_unit.to(dtype) @ text_unit.to(dtype).T, image_norm.to(dtype), text_norm.to(dtype)


def _positive(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    return image_ids[:, None] == text_ids[None, :]


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean cross entropy against uniform mass over each row's positives, over the rows that have one."""
    count = positive.sum(1)
    target = positive.to(logits.dtype) / count.clamp(min=1)[:, None]
    rows = torch.logsumexp(logits, 1) - (target * logits).sum(1)
    valid = count > 0
    # Multiplied, not selected: NaN in a row that is left out still shows.
    return (rows * valid).sum() / valid.sum().clamp(min=1)


def info_nce_loss(
    image: Tensor, text: Tensor, image_ids: Tensor | None, text_ids: Tensor | None, logit_scale: Tensor
) -> Tensor:
    """See :func:`lcr2s_ext.ops.info_nce_loss`."""
    with torch.autocast(image.device.type, enabled=False):
        cosine, _, _ = _cosine(image, text)
        if image_ids is None or text_ids is None:
            positive = torch.eye(cosine.shape[0], dtype=torch.bool, device=cosine.device)
        else:
            positive = _positive(image_ids, text_ids)
        logits = logit_scale * cosine
        return (_cross_entropy(logits, positive) + _cross_entropy(logits.T, positive.T)) / 2


def _matching(logits: Tensor, target: Tensor, eps: float) -> Tensor:
    """Mean over rows of KL(softmax(logits) || target), the target regularised by eps inside its logarithm."""
    log_p = torch.log_softmax(logits, 1)
    return (log_p.exp() * (log_p - torch.log(target + eps))).sum(1).mean()


def _row_target(positive: Tensor, dtype: torch.dtype, power: float) -> Tensor:
    """y_ij / n_i^power, 0 in a row without a positive."""
    count = positive.sum(1, keepdim=True).clamp(min=1)
    return positive.to(dtype) / count.to(dtype) ** power


def sdm_loss(
    image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, logit_scale: Tensor, eps: float
) -> Tensor:
    """See :func:`lcr2s_ext.ops.sdm_loss`."""
    with torch.autocast(image.device.type, enabled=False):
        cosine, _, _ = _cosine(image, text)
        positive = _positive(image_ids, text_ids)
        logits = logit_scale * cosine
        image_to_text = _matching(logits, _row_target(positive, logits.dtype, 1.0), eps)
        text_to_image = _matching(logits.T, _row_target(positive.T, logits.dtype, 1.0), eps)
        return image_to_text + text_to_image


def cmpm_loss(image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, target: str, eps: float) -> Tensor:
    """See :func:`lcr2s_ext.ops.cmpm_loss`."""
    with torch.autocast(image.device.type, enabled=False):
        cosine, image_norm, text_norm = _cosine(image, text)
        positive = _positive(image_ids, text_ids)
        power = 0.5 if target == "l2" else 1.0
        # v_i . t_j / |t_j| = |v_i| cos(v_i, t_j): only the other side is normalised.
        image_to_text = _matching(image_norm * cosine, _row_target(positive, cosine.dtype, power), eps)
        text_to_image = _matching(text_norm * cosine.T, _row_target(positive.T, cosine.dtype, power), eps)
        return image_to_text + text_to_image


def _triplet_alignment(cosine: Tensor, positive: Tensor, margin: float, tau: float) -> Tensor:
    """Sum over rows of [m - sum_j a_ij s_ij + tau log sum_{j negative} exp(s_ij / tau)]_+."""
    logits = cosine / tau
    lowest = torch.finfo(logits.dtype).min
    weights = torch.softmax(logits.detach().masked_fill(~positive, lowest), 1)
    similarity = (weights * cosine).sum(1)
    hardest = tau * torch.logsumexp(logits.masked_fill(positive, lowest), 1)
    hinge = torch.relu(margin - similarity + hardest)
    valid = positive.any(1) & ~positive.all(1)
    return (hinge * valid).sum()


def tal_loss(image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, margin: float, tau: float) -> Tensor:
    """See :func:`lcr2s_ext.ops.tal_loss`."""
    with torch.autocast(image.device.type, enabled=False):
        cosine, _, _ = _cosine(image, text)
        positive = _positive(image_ids, text_ids)
        image_to_text = _triplet_alignment(cosine, positive, margin, tau)
        return image_to_text + _triplet_alignment(cosine.T, positive.T, margin, tau)
