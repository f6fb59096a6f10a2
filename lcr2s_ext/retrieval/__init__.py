"""Retrieval on top of the operators: evaluation of a split in both directions."""

from lcr2s_ext.retrieval.evaluate import (
    Retrieval,
    RetrievalFeatures,
    distinct_images,
    embed_split,
    evaluate_features,
    evaluate_model,
    evaluate_oracle,
)
from lcr2s_ext.retrieval.rerank import KReciprocal, Rerank

__all__ = [
    "KReciprocal",
    "Rerank",
    "Retrieval",
    "RetrievalFeatures",
    "distinct_images",
    "embed_split",
    "evaluate_features",
    "evaluate_model",
    "evaluate_oracle",
]
