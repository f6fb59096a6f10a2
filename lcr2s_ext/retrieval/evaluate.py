"""Retrieval evaluation of a split: every image once in the gallery, every caption a query, both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext import ops
from lcr2s_ext.retrieval.rerank import KReciprocal, Rerank

__all__ = [
    "Retrieval",
    "RetrievalFeatures",
    "distinct_images",
    "embed_split",
    "evaluate_features",
    "evaluate_model",
    "evaluate_oracle",
]

Retrieval = dict[str, dict[str, float]]
"""``{"text_to_image": metrics, "image_to_text": metrics}``, each as :func:`lcr2s_ext.ops.retrieval_metrics`
returns them.
"""


class Split(Protocol):
    """What is read of a :class:`lcr2s_ext.data.PersonSplit`."""

    image_paths: list[Any]
    image_ids: Tensor
    captions: list[str]
    caption_image: Tensor
    caption_ids: Tensor


class Store(Protocol):
    """What is read of a :class:`lcr2s_ext.data.ImageStore`."""

    def load(self, indices: Any) -> Tensor: ...


@dataclass
class RetrievalFeatures:
    """Features of a split: ``G`` distinct images and ``Q`` captions.

    Attributes:
        image: ``(G, d)``.
        text: ``(Q, d)``.
        image_ids: int64 ``(G,)`` identities.
        text_ids: int64 ``(Q,)`` identities.
        image_rows: int64 ``(G,)`` positions of the distinct images in the split.
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    text_ids: Tensor
    image_rows: Tensor


def distinct_images(split: Split) -> Tensor:
    """int64 positions of the split's distinct image files, in order: an image listed twice enters the gallery once."""
    seen: dict[str, int] = {}
    for row, path in enumerate(split.image_paths):
        seen.setdefault(str(path), row)
    return torch.tensor(list(seen.values()), dtype=torch.int64)


def _in_batches(encode: Callable[[Any], Tensor], batches: Sequence[Any], group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return torch.cat([encode(batch).float().cpu() for batch in batches])
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + len(batch))
    everything: Tensor | None = None
    # Whole batches are dealt out: a row has the same neighbours, and so the same arithmetic, as in one process.
    # All ranks encode equally often: a sharded model is gathered for each batch by all of them.
    for first in range(0, len(batches), ranks):
        number = first + rank
        features = encode(batches[number] if number < len(batches) else batches[0]).float().cpu()
        if everything is None:
            everything = features.new_zeros((starts[-1], features.shape[1]))
        if number < len(batches):
            everything[starts[number] : starts[number + 1]] = features
    if everything is None:
        raise ValueError("split: expected at least one row, got none")
    # Every row is one rank's, the others' are zero.
    shared = everything.cuda() if dist.get_backend(group) == "nccl" else everything
    dist.all_reduce(shared, group=group)
    return shared.cpu()


def embed_split(
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Any], Tensor],
    split: Split,
    store: Store,
    *,
    tokens: Tensor | None = None,
    batch_size: int = 256,
    group: dist.ProcessGroup | None = None,
) -> RetrievalFeatures:
    """Encode each distinct image and each caption of a split once, in batches, without gradients.

    Args:
        encode_image: uint8 ``(B, 3, H, W)`` to ``(B, d)``.
        encode_text: a list of captions, or int64 ``(B, L)`` tokens where ``tokens`` is given, to ``(B, d)``.
        split: the captions, identities and image files.
        store: the decoded images of the split.
        tokens: int64 ``(Q, L)`` tokens of all captions, to save tokenizing them again.
        batch_size: rows encoded at a time.
        group: ranks that share the work, batch by batch; all of them call this, and all get the whole result.
    """
    if not len(split.captions):
        raise ValueError("split: expected at least one caption, got none")
    rows = distinct_images(split)
    with torch.no_grad():
        image = _in_batches(lambda part: encode_image(store.load(part)), rows.split(batch_size), group)
        starts = range(0, len(split.captions), batch_size)
        source: Any = split.captions if tokens is None else tokens
        text = _in_batches(encode_text, [source[start : start + batch_size] for start in starts], group)
    return RetrievalFeatures(
        image, text, torch.as_tensor(split.image_ids)[rows], torch.as_tensor(split.caption_ids), rows
    )


def evaluate_features(
    features: RetrievalFeatures,
    ks: Sequence[int] = (1, 5, 10),
    *,
    backend: str | None = None,
    rerank: Rerank | None = None,
    group: dist.ProcessGroup | None = None,
) -> Retrieval:
    """Metrics of both directions from features; those of the first rank on all ranks of a ``group``.

    With ``rerank`` the result holds ``"text_to_image_reranked"`` and ``"image_to_text_reranked"`` as well: those after
    k-reciprocal re-ranking (:class:`lcr2s_ext.retrieval.KReciprocal`), which reads the similarities within the gallery
    and among all queries.
    """
    if group is not None:
        found = [evaluate_features(features, ks, backend=backend, rerank=rerank) if dist.get_rank(group) == 0 else None]
        dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
        return cast(Retrieval, found[0])
    f = features
    metrics = {
        "text_to_image": ops.retrieval_metrics(f.text, f.image, f.text_ids, f.image_ids, tuple(ks), backend=backend),
        "image_to_text": ops.retrieval_metrics(f.image, f.text, f.image_ids, f.text_ids, tuple(ks), backend=backend),
    }
    if rerank is not None:
        encoding = KReciprocal(f.text, f.image, rerank)
        for reverse, name in ((False, "text_to_image"), (True, "image_to_text")):
            metrics[f"{name}_reranked"] = encoding.metrics(f.text_ids, f.image_ids, ks, reverse=reverse)
    return metrics


def evaluate_model(
    model: Any,
    split: Split,
    store: Store,
    *,
    tokens: Tensor | None = None,
    batch_size: int = 256,
    ks: Sequence[int] = (1, 5, 10),
    rerank: Rerank | None = None,
    group: dist.ProcessGroup | None = None,
) -> Retrieval:
    """Metrics of a model with ``encode_image`` and ``encode_text`` (:class:`lcr2s_ext.LCR2S`) on a split; eval mode.
    ``rerank`` as in :func:`evaluate_features`. Ranks of a ``group`` share the work; all of them call this, and all get
    the metrics that one process would find.
    """
    training = model.training
    model.eval()
    try:
        features = embed_split(
            model.encode_image, model.encode_text, split, store, tokens=tokens, batch_size=batch_size, group=group
        )
    finally:
        model.train(training)
    return evaluate_features(features, ks, rerank=rerank, group=group)


def evaluate_oracle(
    fusions: tuple[nn.Module, nn.Module],
    features: RetrievalFeatures,
    *,
    max_support: int,
    seed: int = 0,
    ks: Sequence[int] = (1, 5, 10),
    group: dist.ProcessGroup | None = None,
) -> Retrieval:
    """Metrics of a teacher that is handed support sets at test: an **oracle**, for it reads the identities.

    Args:
        fusions: the image and the text :class:`~lcr2s_ext.nn.SupportSetFusion`.
        features: what the teacher's encoders make of the split, not L2-normalised.
        max_support: largest support set drawn from the other rows of the same identity; 0 removes the support, and each
            row is fused with itself alone: what the teacher is worth where nobody tells it the identities.
        seed: of the draw.
        ks: cut-offs of R@k.
        group: ranks that all call this, and all get the first one's metrics.
    """
    fused = []
    with torch.no_grad():
        for fusion, rows, ids in (
            (fusions[0], features.image, features.image_ids),
            (fusions[1], features.text, features.text_ids),
        ):
            weight = next(fusion.parameters())
            support = ops.SupportIndex.from_ids(ids, max_support, include_self=True, seed=seed) if max_support else None
            if support is not None:
                support = support.to(weight.device)
            fused.append(fusion(rows.to(weight.device, weight.dtype), support).float().cpu())
    image, text = fused
    return evaluate_features(
        RetrievalFeatures(image, text, features.image_ids, features.text_ids, features.image_rows), ks, group=group
    )
