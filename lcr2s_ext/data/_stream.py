"""A short-hand for reproducible scalar draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Stream:
    """Uniform draws that depend on the seed and the keys alone.

    numpy may change its distributions from one version to the next, but keeps its bit streams; so only the raw stream
    and ``Generator.random`` are used, and every draw below is made from these by arithmetic of our own.

    Args:
        seed: Non-negative seed of the corpus.
        *keys: Non-negative integers that name the purpose of the stream, e.g. (IMAGE, identity, view).
    """

    def __init__(self, seed: int, *keys: int) -> None:
        self.generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *keys))))
        self._block: list[float] = []

    def uniform(self) -> float:
        """One float in [0, 1)."""
        if not self._block:
            self._block = self.generator.random(96).tolist()
        return self._block.pop()

    def between(self, low: float, high: float) -> float:
        """One float in [low, high)."""
        return low + (high - low) * self.uniform()

    def below(self, count: int) -> int:
        """One integer in [0, count)."""
        return min(int(self.uniform() * count), count - 1)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A random permutation of the items (Fisher-Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def weighted_sample(self, items: Sequence[T], weights: Sequence[float], count: int) -> list[T]:
        """``count`` different items, drawn one after the other in proportion to their weights."""
        remaining = list(zip(items, weights, strict=True))
        chosen: list[T] = []
        while remaining and len(chosen) < count:
            point = self.uniform() * sum(weight for _, weight in remaining)
            position = 0
            while position < len(remaining) - 1 and point >= remaining[position][1]:
                point -= remaining[position][1]
                position += 1
            chosen.append(remaining.pop(position)[0])
        return chosen
