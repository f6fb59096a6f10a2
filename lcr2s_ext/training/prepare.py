"""What a run needs before its first step: the corpus in memory, fresh models, batches; and metrics of either model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lcr2s_ext.data import (
    BatchAugment,
    CaptionTokenizer,
    IdentityBatchSampler,
    ImageStore,
    PersonBatch,
    PersonSplit,
    RandomBatchSampler,
    TrainingDataset,
    load_dataset,
)
from lcr2s_ext.models import (
    IMAGE_MEAN,
    IMAGE_STD,
    LCR2S,
    PRESETS,
    DualEncoder,
    SavedTokenizer,
    Teacher,
    normalize_images,
)
from lcr2s_ext.retrieval import Retrieval, RetrievalFeatures, embed_split, evaluate_model, evaluate_oracle
from lcr2s_ext.training import distributed
from lcr2s_ext.training.config import ConfigError, TrainConfig
from lcr2s_ext.training.stage import TrainingError, step_seed
from lcr2s_ext.training.text_cache import TextCache

__all__ = [
    "BatchLoader",
    "TrainingData",
    "evaluate_student",
    "evaluate_teacher",
    "make_augment",
    "make_loader",
    "make_model",
    "make_teacher",
    "prepare_data",
    "weights_seed",
]

DEFAULT_BATCH = 64


@dataclass
class TrainingData:
    """A corpus in memory: splits, decoded images, tokenizer, tokens. One instance serves any number of runs."""

    splits: dict[str, PersonSplit]
    stores: dict[str, ImageStore]
    tokenizer: CaptionTokenizer | SavedTokenizer
    tokens: dict[str, Tensor]
    image_size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    """Statistics that the encoders' images are normalised with."""
    text_caches: dict[str, TextCache] = field(default_factory=dict)
    """What frozen text backbones made of the train captions, with ``data.text_cache``."""

    def has(self, split: str) -> bool:
        """Whether the corpus has captions in this split."""
        return split in self.splits and len(self.splits[split].captions) > 0


class BatchLoader:
    """Epochs of :class:`PersonBatch`; Lightning tells the sampler which epoch it is.

    Batches carry their epoch and step, so they are the same whether this process makes them or workers do.
    """

    def __init__(
        self,
        dataset: TrainingDataset,
        batches: RandomBatchSampler | IdentityBatchSampler,
        workers: int = 0,
        text_caches: dict[str, TextCache] | None = None,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.workers = workers
        self.text_caches = {} if text_caches is None else text_caches
        self._position = (0, 0)
        self._resumed = (0, 0)

    @property
    def sampler(self) -> BatchLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        resumed, done = self._resumed
        start = done if epoch == resumed else 0
        self.batches.set_epoch(epoch, start)
        self._position = (epoch, start)

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch the next batch is; Lightning keeps it in checkpoints."""
        return {"epoch": self._position[0], "done": self._position[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = (state["epoch"], state["done"])

    def batch(self, epoch: int, step: int) -> PersonBatch:
        """One batch by its numbers, made anew."""
        self.batches.set_epoch(epoch, step)
        return self.dataset.make_batch(next(iter(self.batches)))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PersonBatch]:
        # A generator: nothing is drawn before the first batch is asked for, which is after `set_epoch`.
        made: Iterable[PersonBatch] = (
            self.dataset.loader(self.batches, num_workers=self.workers)
            if self.workers
            else map(self.dataset.make_batch, self.batches)
        )
        for batch in made:
            self._position = (batch.epoch, batch.step + 1)
            yield batch


def prepare_data(config: TrainConfig, *, tokenizer: CaptionTokenizer | SavedTokenizer | None = None) -> TrainingData:
    """Read the dataset of a configuration. Its tokenizer is the given one, that of ``model.text_weights``, or trained
    on the train captions.
    """
    if not config.data.root:
        raise ConfigError("data.root: expected the folder that holds the dataset, got none")
    splits = load_dataset(config.data.dataset, config.data.root)
    if "train" not in splits or not len(splits["train"].captions):
        raise TrainingError(f"data.root: {config.data.root} has no captions in split train")
    size = model_size(config)
    if tokenizer is None and config.model.text_weights:
        tokenizer = SavedTokenizer.from_pretrained(config.model.text_weights, config.data.max_length)
    if tokenizer is None:
        tokenizer = CaptionTokenizer.train(
            splits["train"].captions, vocab_size=config.data.vocab_size, max_length=config.data.max_length
        )
    stores = {
        name: ImageStore(split.image_paths, size, cache=config.data.cache, cache_dir=config.data.cache_dir or None)
        for name, split in splits.items()
    }
    tokens = {name: tokenizer.encode(split.captions) for name, split in splits.items() if len(split.captions)}
    preset = PRESETS[config.model.preset]
    mean, std = preset.get("mean", IMAGE_MEAN), preset.get("std", IMAGE_STD)
    return TrainingData(splits, stores, tokenizer, tokens, size, mean, std)


def model_size(config: TrainConfig) -> tuple[int, int]:
    """``(H, W)`` of the images of a configuration."""
    if config.model.preset not in PRESETS:
        raise ConfigError(f"model.preset: expected one of {', '.join(PRESETS)}, got {config.model.preset!r}")
    size = config.model.image_size or PRESETS[config.model.preset]["image_size"]
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"model.image_size: expected two positive ints [H, W], got {size}")
    return int(size[0]), int(size[1])


def make_model(config: TrainConfig, data: TrainingData) -> LCR2S:
    """Fresh student of a configuration; its weights depend on the seed alone."""
    model = config.model
    return LCR2S.from_preset(
        model.preset,
        vocab_size=data.tokenizer.vocab_size,
        tokenizer=data.tokenizer,
        seed=step_seed(config.seed, 0, 0, 10),
        width=model.width,
        image_size=data.image_size,
        max_length=data.tokenizer.max_length,
        image_encoder=model.image_encoder,
        text_encoder=model.text_encoder,
        image_weights=model.image_weights or None,
        text_weights=model.text_weights or None,
    )


@contextmanager
def weights_seed(config: TrainConfig, purpose: int) -> Iterator[None]:
    """Fresh weights drawn inside depend on the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(step_seed(config.seed, 0, 0, purpose))
        yield


def make_teacher(config: TrainConfig, data: TrainingData, encoders: DualEncoder | None = None) -> Teacher:
    """Fresh teacher of a configuration; ``encoders`` gives the encoders' weights, copied, else they are pretrained
    where the configuration names weights.
    """
    shell = make_model(config, data)
    with weights_seed(config, 11):
        teacher = shell.make_teacher(
            num_heads=config.model.heads,
            feed_forward=config.model.feed_forward,
            dropout=config.model.fusion_dropout,
            input_norm=config.model.fusion_input_norm,
        )
    if encoders is not None:
        teacher.encoders.load_state_dict(encoders.state_dict())
        return teacher
    for name, weights in (("image_encoder", config.model.image_weights), ("text_encoder", config.model.text_weights)):
        if weights:
            own, pretrained = getattr(teacher.encoders, name), getattr(shell.student, name)
            own.load_state_dict(pretrained.state_dict())
    return teacher


def make_loader(config: TrainConfig, data: TrainingData, support: str) -> BatchLoader:
    """Batches of the train split.

    Args:
        config: of the run.
        data: prepared corpus.
        support: ``"none"``, ``"drawn"``, ``"batch"``, or ``"bank"``, for which a batch is as for ``"none"``.

    Raises:
        TrainingError: where the batch does not fit the split.
    """
    split, settings = data.splits["train"], config.data
    captions, identities = len(split.captions), split.num_identities
    if settings.sampler == "identity":
        if settings.identities > identities:
            raise TrainingError(
                f"data.identities: batches of {settings.identities} identities x {settings.instances} instances are "
                f"impossible, the train split has {identities} identities"
            )
        batches: Any = IdentityBatchSampler(
            split.labels, settings.identities, settings.instances, items=split.caption_image, seed=config.seed
        )
    else:
        size = _default_batch(captions) if settings.batch_size is None else settings.batch_size
        if size > captions:
            raise TrainingError(
                f"data.batch_size: a batch of {size} is larger than the train split of {captions} captions"
            )
        batches = RandomBatchSampler(captions, size, seed=config.seed)
    if batches.parts % distributed.ranks():
        key = "data.identities" if settings.sampler == "identity" else "data.batch_size"
        raise TrainingError(
            f"{key}: {batches.words} are the whole batch, and cannot be divided equally among {distributed.ranks()} "
            "processes"
        )
    batches.share(distributed.rank(), distributed.ranks())
    dataset = TrainingDataset(
        split,
        data.stores["train"],
        data.tokenizer,
        support="none" if support == "bank" else support,
        max_support=settings.max_support,
        seed=config.seed,
    )
    return BatchLoader(dataset, batches, settings.workers, data.text_caches)


def _default_batch(captions: int) -> int:
    """64; on a corpus that would give fewer than eight batches an epoch, what gives eight, but not less than 8."""
    return min(captions, max(8, min(DEFAULT_BATCH, captions // 8)))


def evaluate_student(
    model: LCR2S, data: TrainingData, split: str, *, batch_size: int = 256, group: ProcessGroup | None = None
) -> Retrieval:
    """Metrics of a student on a split of prepared data, both directions; ranks of a ``group`` share the work."""
    return evaluate_model(
        model, data.splits[split], data.stores[split], tokens=data.tokens[split], batch_size=batch_size, group=group
    )


def teacher_features(
    teacher: Teacher, data: TrainingData, split: str, *, batch_size: int = 256, group: ProcessGroup | None = None
) -> RetrievalFeatures:
    """What a teacher's encoders make of a split, before the fusion, in eval mode."""
    device = next(teacher.parameters()).device
    training = teacher.training
    teacher.eval()
    try:
        return embed_split(
            lambda images: teacher.encoders.image_features(normalize_images(images.to(device), data.mean, data.std)),
            lambda tokens: teacher.encoders.text_features(tokens.to(device)),
            data.splits[split],
            data.stores[split],
            tokens=data.tokens[split],
            batch_size=batch_size,
            group=group,
        )
    finally:
        teacher.train(training)


def evaluate_teacher(
    teacher: Teacher,
    data: TrainingData,
    split: str,
    *,
    max_support: int,
    seed: int = 0,
    batch_size: int = 256,
    group: ProcessGroup | None = None,
) -> Retrieval:
    """Metrics of a teacher on a split, support sets drawn by identity: an oracle. ``max_support=0`` removes the
    support; ranks of a ``group`` share the work.
    """
    features = teacher_features(teacher, data, split, batch_size=batch_size, group=group)
    training = teacher.training
    teacher.eval()
    try:
        return evaluate_oracle(
            (teacher.image_fusion, teacher.text_fusion), features, max_support=max_support, seed=seed, group=group
        )
    finally:
        teacher.train(training)


def steps_per_epoch(config: TrainConfig, loader: BatchLoader) -> int:
    if not len(loader):
        raise TrainingError("data.batch_size: the train split gives no full batch")
    return len(loader)


def make_augment(config: TrainConfig, data: TrainingData) -> BatchAugment:
    settings = config.data
    return BatchAugment(
        data.image_size,
        pad=settings.pad,
        flip=settings.flip,
        erasing=settings.erasing,
        brightness=settings.brightness,
        contrast=settings.contrast,
        mean=data.mean,
        std=data.std,
    ).train()
