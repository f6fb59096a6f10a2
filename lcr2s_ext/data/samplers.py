"""Batches of samples, determined by (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lcr2s_ext import native


class SampleBatch(list[int]):
    """Sample numbers of one batch, with the epoch and the step (both from 0) that they belong to.

    Of several processes that share a batch, ``rank`` of ``ranks`` makes its equal part, :attr:`own`.
    """

    def __init__(self, samples: Sequence[int], epoch: int, step: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(samples)
        self.epoch = epoch
        self.step = step
        self.rank = rank
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[SampleBatch], tuple[list[int], int, int, int, int]]:
        return SampleBatch, (list(self), self.epoch, self.step, self.rank, self.ranks)

    @property
    def own(self) -> range:
        """Positions in the batch of the samples of this rank."""
        size = len(self) // self.ranks
        return range(self.rank * size, (self.rank + 1) * size)


def _check_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class _BatchSampler:
    """What both samplers share: the epoch, the start within it, and the part of a batch that this process makes."""

    def __init__(self, seed: int, drop_last: bool) -> None:
        self.seed = _check_int("seed", seed, 0)
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0
        self.rank, self.ranks = 0, 1

    def share(self, rank: int, ranks: int) -> None:
        """Let every batch be made by ``ranks`` processes, an equal part each, of which this one is ``rank``.

        Batches are those of one process. Parts of a P x K batch are P / ``ranks`` whole identities.

        Raises:
            ValueError: no equal parts, or a last batch that may be smaller (``drop_last=False``).
        """
        parts = _check_int("ranks", ranks, 1)
        if not 0 <= _check_int("rank", rank, 0) < parts:
            raise ValueError(f"rank must be in [0, {parts}), got {rank}")
        if self.parts % parts:
            raise ValueError(f"ranks must divide {self.words}, got {ranks}")
        if parts > 1 and not self.drop_last:
            raise ValueError("ranks must be 1 without drop_last: the last batch may have no equal parts")
        self.rank, self.ranks = rank, ranks

    @property
    def parts(self) -> int:
        """What a batch may be divided into."""
        raise NotImplementedError

    @property
    def words(self) -> str:
        """``parts`` in a message."""
        raise NotImplementedError

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch; ``start`` leaves out its first batches once, to go on in the middle of it."""
        self.epoch = _check_int("epoch", epoch, 0)
        self.start = _check_int("start", start, 0)

    def batches(self, epoch: int) -> list[list[int]]:
        """Every batch of an epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[SampleBatch]:
        start, self.start = self.start, 0
        for step, samples in enumerate(self.batches(self.epoch)):
            if step >= start:
                yield SampleBatch(samples, self.epoch, step, self.rank, self.ranks)


class RandomBatchSampler(_BatchSampler):
    """Every sample once an epoch, in random order.

    Args:
        num_samples: Samples of the split.
        batch_size: Samples of a batch.
        seed: With the epoch, determines the order.
        drop_last: Leave out the last batch where it is smaller.

    Raises:
        TypeError, ValueError: An argument out of range, or ``drop_last`` would leave no batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int = 0, drop_last: bool = True) -> None:
        super().__init__(seed, drop_last)
        self.num_samples = _check_int("num_samples", num_samples, 1)
        self.batch_size = _check_int("batch_size", batch_size, 1)
        if drop_last and batch_size > num_samples:
            raise ValueError(f"batch_size must be at most num_samples={num_samples} with drop_last, got {batch_size}")

    @property
    def parts(self) -> int:
        return self.batch_size

    @property
    def words(self) -> str:
        return f"batches of {self.batch_size} samples"

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int) -> list[list[int]]:
        order = native.permutation(self.num_samples, seed=self.seed, epoch=epoch).tolist()
        return [order[step * self.batch_size : (step + 1) * self.batch_size] for step in range(len(self))]


class IdentityBatchSampler(_BatchSampler):
    """Batches of P identities with K samples each.

    Each identity's samples are put in random order, one of every image before the second of any, and cut into groups
    of K; groups of random identities make a batch. What is left over when an identity's number of samples is no
    multiple of K waits for another epoch's order; an identity with fewer than K samples makes one group in which they
    are repeated.
    The identities of a batch differ, except at an epoch's end where only groups of the same few may be left.

    Args:
        labels: (n) identity of each sample.
        p: Identities of a batch.
        k: Samples of an identity in a batch.
        items: (n) image of each sample; None takes every sample for an image of its own.
        seed: With the epoch, determines the batches.
        drop_last: Leave out the last batch where it has fewer than P groups.

    Raises:
        TypeError, ValueError: An argument of the wrong shape or range, or fewer than P identities.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        p: int,
        k: int,
        *,
        items: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__(seed, drop_last)
        self.labels = _to_integers("labels", labels)
        self.items = np.arange(len(self.labels)) if items is None else _to_integers("items", items)
        if len(self.items) != len(self.labels):
            raise ValueError(f"items must have as many elements as labels ({len(self.labels)}), got {len(self.items)}")
        self.p, self.k = _check_int("p", p, 1), _check_int("k", k, 1)
        self.batch_size = p * k
        sizes = np.unique(self.labels, return_counts=True)[1]
        if len(sizes) < p:
            raise ValueError(f"p must be at most the number of identities ({len(sizes)}), got {p}")
        self.num_groups = int(np.maximum(sizes // k, 1).sum())

    @property
    def parts(self) -> int:
        return self.p

    @property
    def words(self) -> str:
        return f"batches of {self.p} identities"

    def __len__(self) -> int:
        full, rest = divmod(self.num_groups, self.p)
        return full + (rest > 0 and not self.drop_last)

    def _groups(self, epoch: int) -> list[tuple[int, list[int]]]:
        order = native.permutation(len(self.labels), seed=self.seed, epoch=epoch)
        # How many samples of the same image come earlier in the random order.
        by_item = order[np.argsort(self.items[order], kind="stable")]
        items = self.items[by_item]
        new = np.r_[True, items[1:] != items[:-1]]
        position = np.arange(len(items))
        earlier = np.empty(len(items), dtype=np.int64)
        earlier[by_item] = position - np.maximum.accumulate(np.where(new, position, 0))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = position
        arranged = np.lexsort((rank, earlier, self.labels))
        starts = np.flatnonzero(np.r_[True, np.diff(self.labels[arranged]) != 0])
        groups = []
        for start, end in zip(starts, np.r_[starts[1:], len(arranged)], strict=True):
            samples = arranged[start:end].tolist()
            label = int(self.labels[samples[0]])
            if len(samples) < self.k:
                groups.append((label, [samples[i % len(samples)] for i in range(self.k)]))
            for first in range(0, len(samples) - self.k + 1, self.k):
                groups.append((label, samples[first : first + self.k]))
        shuffled = native.permutation(len(groups), seed=self.seed + 1, epoch=epoch).tolist()
        return [groups[number] for number in shuffled]

    def batches(self, epoch: int) -> list[list[int]]:
        waiting = self._groups(epoch)
        result = []
        for _ in range(len(self)):
            chosen: list[tuple[int, list[int]]] = []
            passed: list[tuple[int, list[int]]] = []
            taken: set[int] = set()
            used = 0
            for group in waiting:
                if len(chosen) == self.p:
                    break
                used += 1
                if group[0] in taken:
                    passed.append(group)
                else:
                    taken.add(group[0])
                    chosen.append(group)
            waiting = passed + waiting[used:]
            while len(chosen) < self.p and waiting:
                chosen.append(waiting.pop(0))
            result.append([sample for _, samples in chosen for sample in samples])
        return result


def _to_integers(name: str, values: Tensor | Sequence[int]) -> np.ndarray:
    tensor = torch.as_tensor(values)
    if tensor.dim() != 1 or len(tensor) == 0:
        raise ValueError(f"{name} must have one dimension and at least one element, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    return tensor.to(torch.int64).cpu().numpy()
