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


# The same losses of a matrix that is cut into blocks, in two passes over them: statistics of every row and column,
# which merge; then gradients, from coefficients of whole rows and columns.
INFO_NCE, SDM, CMPM, TAL = range(4)
# Of a row's statistics.
FIELDS = (4, 5, 5, 6)

# Below every logit, and finite: differences of two of them are not NaN.
_LOWEST = -1e30


def _logits(image: Tensor, text: Tensor, logit_scale: Tensor, loss: int, tau: float) -> tuple[Tensor, Tensor]:
    """Logits of the rows (B, N) and of the columns (N, B)."""
    cosine, image_norm, text_norm = _cosine(image, text)
    if loss == CMPM:
        return image_norm * cosine, text_norm * cosine.T
    if loss == TAL:
        return cosine / tau, cosine.T / tau
    return logit_scale * cosine, logit_scale * cosine.T


def _row_statistics(x: Tensor, positive: Tensor, loss: int) -> Tensor:
    count = positive.sum(1).to(x.dtype)
    top = x.amax(1)
    if loss == TAL:
        top = torch.where(positive, x, _LOWEST).amax(1)
        other_top = torch.where(positive, _LOWEST, x).amax(1)
        below = x - torch.where(positive, top[:, None], other_top[:, None])
        e = below.exp()
        sums = [(e * positive).sum(1), torch.where(positive, e * below, 0.0).sum(1), (e * ~positive).sum(1)]
        return torch.stack([top, other_top, *sums, count])
    below = x - top[:, None]
    e = below.exp()
    if loss == INFO_NCE:
        return torch.stack([top, e.sum(1), torch.where(positive, x, 0.0).sum(1), count])
    return torch.stack([top, (e * positive).sum(1), (e * below).sum(1), (e * ~positive).sum(1), count])


def similarity_statistics(
    image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, logit_scale: Tensor, loss: int, tau: float
) -> tuple[Tensor, Tensor]:
    """Statistics of the rows (fields, B) and of the columns (fields, N) of a block, for :func:`merge_statistics`.

    Fields, with m the largest logit: InfoNCE m, sum e^(x - m), sum of x over positives; SDM and CMPM m, sum e^(x - m)
    over positives, sum e^(x - m) (x - m), sum e^(x - m) over negatives; TAL m over positives, m over negatives, sum
    e^(x - m) and sum e^(x - m) (x - m) over positives, sum e^(x - m) over negatives. Then the number of positives.

    Args:
        image, text: (B, d) and (N, d) features.
        image_ids, text_ids: (B,) and (N,) identities.
        logit_scale: () factor of the cosines, of InfoNCE and SDM.
        loss: INFO_NCE, SDM, CMPM or TAL.
        tau: temperature of TAL.
    """
    with torch.autocast(image.device.type, enabled=False), torch.no_grad():
        positive = _positive(image_ids, text_ids)
        x, y = _logits(image, text, logit_scale, loss, tau)
        return _row_statistics(x, positive, loss), _row_statistics(y, positive.T, loss)


def merge_statistics(first: Tensor, second: Tensor, loss: int, unit: float = 1.0) -> Tensor:
    """Statistics (rows, fields) of two blocks as those of both; their logits are counted in `unit`."""
    a, b = first.unbind(1), second.unbind(1)
    maxima = 2 if loss == TAL else 1
    tops = [torch.maximum(a[g], b[g]) for g in range(maxima)]
    sums: list[Tensor] = [torch.zeros_like(tops[0])] * (len(a) - maxima)
    for part in (a, b):
        shift = [part[g] - tops[g] for g in range(maxima)]
        by = [(unit * s).exp() for s in shift]
        if loss == INFO_NCE:
            moved = [by[0] * part[1], part[2]]
        elif loss == TAL:
            moved = [by[0] * part[2], by[0] * (part[3] + part[2] * shift[0]), by[1] * part[4]]
        else:
            moved = [by[0] * part[1], by[0] * (part[2] + (part[1] + part[3]) * shift[0]), by[0] * part[3]]
        sums = [total + more for total, more in zip(sums, [*moved, part[-1]], strict=True)]
    return torch.stack([*tops, *sums], 1)


def finish_statistics(
    statistics: Tensor,
    entries: int,
    loss: int,
    unit: float = 1.0,
    *,
    eps: float,
    l2_target: bool,
    margin: float,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """From statistics (rows, fields) of whole rows of `entries` columns, all in float64: the sum of the rows' losses
    without their weight, the number of rows with a positive, and (rows, 4) coefficients for :func:`weigh`.

    Maxima among the coefficients are in the unit of the statistics.
    """
    fields = statistics.double().unbind(1)
    count = fields[-1]
    has_positive = (count > 0).double()
    number = count.clamp(min=1)
    if loss == INFO_NCE:
        top, total, of_positive, _ = fields
        # Multiplied, not selected: NaN in a row that is left out still shows.
        losses = has_positive * (unit * (top - of_positive / number) + total.log())
        coefficients = [top, has_positive / total, has_positive / number, torch.zeros_like(top)]
    elif loss == TAL:
        top, other_top, of_positive, first, of_negative, _ = fields
        valid = (count > 0) & (count < entries)
        hinge = margin - tau * unit * (top + first / of_positive) + tau * (unit * other_top + of_negative.log())
        active = valid & ~(hinge <= 0)
        losses = torch.where(valid, torch.where(hinge <= 0, 0.0, hinge), 0.0 * (of_positive + of_negative))
        coefficients = [
            top,
            torch.where(active, -1.0 / of_positive, 0.0),
            other_top,
            torch.where(active, 1.0 / of_negative, 0.0),
        ]
    else:
        top, of_positive, first, of_negative, _ = fields
        total = of_positive + of_negative
        log_other = torch.full_like(top, eps).log()
        log_target = torch.where(count > 0, (1.0 / (number.sqrt() if l2_target else number) + eps).log(), log_other)
        losses = (unit * first - log_target * of_positive - log_other * of_negative) / total - total.log()
        coefficients = [top, 1.0 / total, total.log() + log_target + losses, total.log() + log_other + losses]
    return losses.sum(), has_positive.sum(), torch.stack(coefficients, 1)


def weigh(coefficients: Tensor, weight: Tensor, loss: int) -> Tensor:
    """Coefficients such that the gradient of the rows' losses is `weight` times as large."""
    weighed = {INFO_NCE: (1, 2), SDM: (1,), CMPM: (1,), TAL: (1, 3)}[loss]
    return torch.stack([c * weight if f in weighed else c for f, c in enumerate(coefficients.unbind(1))], 1)


def _logit_gradient(x: Tensor, positive: Tensor, coefficients: Tensor, loss: int) -> Tensor:
    """dL/dx of rows from their coefficients (4, rows); for TAL dL/dx / tau."""
    c = [coefficient[:, None] for coefficient in coefficients]
    if loss == TAL:
        return (x - torch.where(positive, c[0], c[2])).exp() * torch.where(positive, c[1], c[3])
    below = x - c[0]
    if loss == INFO_NCE:
        return below.exp() * c[1] - torch.where(positive, c[2], 0.0)
    return below.exp() * c[1] * (below - torch.where(positive, c[2], c[3]))


def similarity_gradients(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    logit_scale: Tensor,
    image_coefficients: Tensor,
    text_coefficients: Tensor,
    loss: int,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block contributes to the gradients of its images (B, d), of its texts (N, d) and of the logit scale ().

    Args:
        image, text, image_ids, text_ids, logit_scale, loss, tau: as :func:`similarity_statistics`.
        image_coefficients, text_coefficients: (4, B) and (4, N), weighed.
    """
    with torch.autocast(image.device.type, enabled=False), torch.enable_grad():
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (image, text, logit_scale)]
        positive = _positive(image_ids, text_ids)
        x, y = _logits(leaves[0], leaves[1], leaves[2], loss, tau)
        of_x = _logit_gradient(x.detach(), positive, image_coefficients, loss)
        of_y = _logit_gradient(y.detach(), positive.T, text_coefficients, loss)
        if loss == TAL:
            of_x, of_y = tau * of_x, tau * of_y
        found = torch.autograd.grad([x, y], leaves, [of_x, of_y], allow_unused=True, materialize_grads=True)
        return found[0], found[1], found[2]
