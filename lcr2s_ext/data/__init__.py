"""Data on disk: readers, tokenizer, samplers, batches, augmentation and the generated corpus.

Names are imported when they are asked for; pillow, kornia and tokenizers (the `train` extra) when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcr2s_ext.data.augment import BatchAugment
    from lcr2s_ext.data.batches import PersonBatch, TrainingDataset
    from lcr2s_ext.data.check import CheckReport, check_dataset
    from lcr2s_ext.data.convert import convert_dataset
    from lcr2s_ext.data.datasets import ImageFileError, ImageStore, PersonSplit, load_dataset, make_split
    from lcr2s_ext.data.records import DatasetError
    from lcr2s_ext.data.samplers import IdentityBatchSampler, RandomBatchSampler, SampleBatch
    from lcr2s_ext.data.synth import generate_corpus
    from lcr2s_ext.data.tokenizer import CaptionTokenizer

_HOMES = {
    "BatchAugment": "augment",
    "CaptionTokenizer": "tokenizer",
    "CheckReport": "check",
    "DatasetError": "records",
    "IdentityBatchSampler": "samplers",
    "ImageFileError": "datasets",
    "ImageStore": "datasets",
    "PersonBatch": "batches",
    "PersonSplit": "datasets",
    "RandomBatchSampler": "samplers",
    "SampleBatch": "samplers",
    "TrainingDataset": "batches",
    "check_dataset": "check",
    "convert_dataset": "convert",
    "generate_corpus": "synth",
    "load_dataset": "datasets",
    "make_split": "datasets",
}

__all__ = [
    "BatchAugment",
    "CaptionTokenizer",
    "CheckReport",
    "DatasetError",
    "IdentityBatchSampler",
    "ImageFileError",
    "ImageStore",
    "PersonBatch",
    "PersonSplit",
    "RandomBatchSampler",
    "SampleBatch",
    "TrainingDataset",
    "check_dataset",
    "convert_dataset",
    "generate_corpus",
    "load_dataset",
    "make_split",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lcr2s_ext.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lcr2s_ext.data' has no attribute {name!r}")
