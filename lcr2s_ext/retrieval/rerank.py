"""k-reciprocal re-ranking: the ranking of a query corrected by what the retrieved rows have for neighbours.

Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. Figures made with it
use the similarities within the gallery and within the set of queries, and are to be reported as re-ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcr2s_ext import ops
from lcr2s_ext.ops.retrieval import ranking_metrics

__all__ = ["KReciprocal", "Rerank"]

# Elements of the largest temporary tensors.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class Rerank:
    """Settings of k-reciprocal re-ranking.

    Attributes:
        k1: length of the neighbour lists, the row itself not counted.
        k2: rows, itself included, over which a row's encoding is averaged (local query expansion); 1 for none.
        weight: ``lambda``, the share of the original distance: 1 leaves the ranking as it is, 0 is Jaccard alone.
        standardize: for queries and gallery of two modalities: similarities within either set are shifted and scaled
            to the mean and standard deviation of those between the sets. Without it a text whose nearest neighbours
            are all texts has no image in its encoding. False is the published method, for sets of one modality.
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3
    standardize: bool = True

    def __post_init__(self) -> None:
        for name, value in (("k1", self.k1), ("k2", self.k2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight: expected a number in [0, 1], got {self.weight!r}")

    def describe(self) -> str:
        """The label of every figure made with these settings."""
        return f"re-ranked, k1={self.k1}, k2={self.k2}, lambda={self.weight:g}"


class KReciprocal:
    r"""The k-reciprocal encoding of two sets of features, and the distances it gives.

    All N = Q + P rows of both sets are encoded. With N(i, k) the k nearest rows of i among all N, itself included:

    - R(i, k) = {j in N(i, k): i in N(j, k)}; R*(i) adds to R(i, k1) every R(j, k1 / 2), j in R(i, k1), of which at
      least two thirds lie in R(i, k1).
    - V_i[j] = exp(-d(i, j)) over j in R*(i), divided by its sum, then averaged over the k2 nearest rows of i.
    - d_J(i, j) = 1 - sum_c min(V_i[c], V_j[c]) / sum_c max(V_i[c], V_j[c]), and the distance by which is ranked is
      (1 - lambda) d_J + lambda d.

    d is 1 - cosine (at least 0). That V is normalised and holds the row itself is the authors' code rather than the
    paper; their code also divides d by the largest distance of the row, which is not done here: d has its fixed scale.

    Encodings are sparse and everything is done in blocks: besides the features, memory is O(N k1) and that of some
    blocks of two million elements; the N x N and Q x P matrices are never formed.

    Args:
        query: ``(Q, d)`` features, normalised inside.
        gallery: ``(P, d)`` features of the same dtype and device.
        options: the settings.

    Raises:
        TypeError, ValueError: as :func:`lcr2s_ext.ops.topk_similarity` raises them.
    """

    def __init__(self, query: Tensor, gallery: Tensor, options: Rerank | None = None) -> None:
        self.options = options or Rerank()
        ops.topk_similarity(query[:1], gallery[:1], 1)  # its checks, before anything is done
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.sizes = (query.shape[0], gallery.shape[0])
        self._rows = torch.nn.functional.normalize(torch.cat([query, gallery]).detach().to(dtype), dim=1)
        self._shift, self._scale = self._calibration()
        lists = self._neighbours(max(self.options.k1 + 1, self.options.k2))
        encoded = self._encode(lists[:, : self.options.k1 + 1])
        if self.options.k2 > 1:
            encoded = self._expand(lists[:, : self.options.k2], *encoded)
        self._indptr, self._columns, self._weights = encoded

    def _part(self, which: int) -> Tensor:
        first = 0 if which == 0 else self.sizes[0]
        return self._rows[first : first + self.sizes[which]]

    def _calibration(self) -> tuple[list[list[float]], list[list[float]]]:
        """Shift and scale of the cosines between set a and set b; from sums and d x d matrices alone."""
        shift, scale = [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]
        if not self.options.standardize:
            return shift, scale
        parts = [self._part(which).double() for which in (0, 1)]
        sums = [part.sum(0) for part in parts]
        grams = [part.T @ part for part in parts]

        def moments(a: int, b: int) -> tuple[float, float]:
            pairs = parts[a].shape[0] * parts[b].shape[0]
            first, second = float(sums[a] @ sums[b]), float((grams[a] * grams[b]).sum())
            if a == b:  # without the pairs of a row with itself
                squares = parts[a].square().sum(1)
                pairs -= parts[a].shape[0]
                first, second = first - float(squares.sum()), second - float(squares.square().sum())
            mean = first / max(pairs, 1)
            return mean, math.sqrt(max(second / max(pairs, 1) - mean * mean, 0.0))

        mean, deviation = moments(0, 1)
        for which in (0, 1):
            own_mean, own_deviation = moments(which, which)
            if deviation > 1e-6 and own_deviation > 1e-6:
                scale[which][which] = deviation / own_deviation
                shift[which][which] = mean - own_mean * deviation / own_deviation
        return shift, scale

    def _neighbours(self, count: int) -> Tensor:
        """int64 ``(N, min(count, N))``: each row first in its own list, then by similarity, ties by row."""
        lists = []
        for a in (0, 1):
            rows = torch.arange(self.sizes[a], device=self._rows.device)[:, None]
            values, indices = [], []
            for b in (0, 1):
                # One more in the own set: the row itself is put first whatever its rank among equal rows is.
                found, index = ops.topk_similarity(self._part(a), self._part(b), min(count + (a == b), self.sizes[b]))
                found = found * self._scale[a][b] + self._shift[a][b]
                if a == b:
                    found = found.masked_fill(index == rows, math.inf)
                    missing = ~(index == rows).any(1)
                    found[missing, -1], index[missing, -1] = math.inf, rows[missing, 0]
                values.append(found)
                indices.append(index + (self.sizes[0] if b else 0))
            order = torch.sort(torch.cat(values, 1), dim=1, descending=True, stable=True).indices
            lists.append(torch.cat(indices, 1).gather(1, order[:, :count]))
        width = min(entry.shape[1] for entry in lists)
        return torch.cat([entry[:, :width] for entry in lists])

    def _blocks(self, elements: int) -> Iterator[Tensor]:
        """Row numbers in blocks of at most ``_BLOCK`` elements, given those of a row."""
        yield from torch.arange(len(self._rows), device=self._rows.device).split(max(1, _BLOCK // max(1, elements)))

    def _mutual(self, lists: Tensor) -> Tensor:
        """Which entries of the lists have the row in their own list."""
        width = lists.shape[1]
        return torch.cat([(lists[lists[rows]] == rows[:, None, None]).any(2) for rows in self._blocks(width * width)])

    def _encode(self, lists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V before the expansion, as CSR."""
        count, width = len(self._rows), lists.shape[1]
        half = lists[:, : round(self.options.k1 / 2) + 1]
        mutual, mutual_half = self._mutual(lists), self._mutual(half)
        # Entries that are not reciprocal: -1 in the long lists and -2 in the short ones, which match nothing.
        long, short = lists.masked_fill(~mutual, -1), half.masked_fill(~mutual_half, -2)
        keys = []
        for rows in self._blocks(width * width * half.shape[1]):
            own = long[rows]
            candidates = short[lists[rows]]
            inside = (candidates[..., None] == own[:, None, None, :]).any(3).sum(2)
            accepted = mutual[rows] & (3 * inside >= 2 * (candidates >= 0).sum(2))
            members = torch.cat([own, candidates.masked_fill(~accepted[..., None], -1).flatten(1)], 1)
            row = rows[:, None].expand_as(members)[members >= 0]
            keys.append(torch.unique(row * count + members[members >= 0]))
        key = torch.cat(keys)
        row, column = key // count, key % count
        cosine = torch.cat(
            [
                (self._rows[r] * self._rows[c]).sum(1)
                for r, c in zip(
                    *(part.split(max(1, _BLOCK // self._rows.shape[1])) for part in (row, column)), strict=True
                )
            ]
        )
        which = (row >= self.sizes[0]).long(), (column >= self.sizes[0]).long()
        scale = torch.tensor(self._scale, dtype=cosine.dtype, device=cosine.device)[which]
        shift = torch.tensor(self._shift, dtype=cosine.dtype, device=cosine.device)[which]
        weight = torch.exp(-(1.0 - cosine * scale - shift).clamp(min=0.0).masked_fill(row == column, 0.0))
        total = weight.new_zeros(count).index_add_(0, row, weight)
        return self._pointers(row), column, weight / total[row]

    def _pointers(self, row: Tensor) -> Tensor:
        counts = torch.bincount(row, minlength=len(self._rows))
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def _expand(self, lists: Tensor, indptr: Tensor, column: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every row's encoding averaged over its nearest rows."""
        count, width = len(self._rows), lists.shape[1]
        longest = int(indptr.diff().max())
        keys, sums = [], []
        for rows in self._blocks(width * longest):
            entry, position = _ranges(indptr, lists[rows].flatten())
            key, group = torch.unique(rows[entry // width] * count + column[position], return_inverse=True)
            keys.append(key)
            sums.append(weight.new_zeros(len(key)).index_add_(0, group, weight[position]) / width)
        key = torch.cat(keys)
        return self._pointers(key // count), key % count, torch.cat(sums)

    def distances(self, *, reverse: bool = False) -> Iterator[Tensor]:
        """Blocks of rows of the ``(Q, P)`` distances; ``reverse`` takes the gallery for queries: ``(P, Q)``."""
        rows_of, columns_of = (1, 0) if reverse else (0, 1)
        row0, column0 = (self.sizes[0] if which else 0 for which in (rows_of, columns_of))
        rows, columns, count = self.sizes[rows_of], self.sizes[columns_of], len(self._rows)
        # Inverted index: which columns' encodings hold row c, and with what weight.
        first, last = int(self._indptr[column0]), int(self._indptr[column0 + columns])
        owner = torch.repeat_interleave(
            torch.arange(columns, device=self._rows.device), self._indptr[column0 : column0 + columns + 1].diff()
        )
        held, order = torch.sort(self._columns[first:last], stable=True)
        owner, weight = owner[order], self._weights[first:last][order]
        held_counts = torch.bincount(held, minlength=count)
        pointers = torch.cat([held_counts.new_zeros(1), held_counts.cumsum(0)])
        # Rows are blocked by the pairs of weights that meet.
        indptr = self._indptr[row0 : row0 + rows + 1]
        pairs = torch.cat([indptr.new_zeros(1), held_counts[self._columns].cumsum(0)])[indptr].diff().tolist()
        start = 0
        while start < rows:
            stop, elements = start, 0
            while stop < rows and (stop == start or elements + pairs[stop] + columns <= _BLOCK):
                elements += pairs[stop] + columns
                stop += 1
            low, high = int(indptr[start]), int(indptr[stop])
            local = torch.repeat_interleave(
                torch.arange(stop - start, device=self._rows.device), indptr[start : stop + 1].diff()
            )
            entry, position = _ranges(pointers, self._columns[low:high])
            shared = self._weights.new_zeros((stop - start) * columns)
            shared.index_add_(
                0,
                local[entry] * columns + owner[position],
                torch.minimum(self._weights[low:high][entry], weight[position]),
            )
            shared = shared.view(stop - start, columns)
            jaccard = 1.0 - shared / (2.0 - shared)
            cosine = self._part(rows_of)[start:stop] @ self._part(columns_of).T
            share = self.options.weight
            yield (1.0 - share) * jaccard + share * (1.0 - cosine)
            start = stop

    def metrics(
        self, query_ids: Tensor, gallery_ids: Tensor, ks: Sequence[int] = (1, 5, 10), *, reverse: bool = False
    ) -> dict[str, float]:
        """As :func:`lcr2s_ext.ops.retrieval_metrics`, of the re-ranked gallery; equal distances by gallery index."""
        rows, columns = (gallery_ids, query_ids) if reverse else (query_ids, gallery_ids)
        expected = (self.sizes[1], self.sizes[0]) if reverse else self.sizes
        if (len(rows), len(columns)) != expected:
            raise ValueError(
                f"query_ids, gallery_ids: expected {self.sizes} identities, got {len(query_ids), len(gallery_ids)}"
            )

        def hits() -> Iterator[Tensor]:
            start = 0
            for block in self.distances(reverse=reverse):
                order = torch.sort(block, dim=1, stable=True).indices
                wanted = rows[start : start + len(block)].to(order.device)
                yield columns.to(order.device)[order] == wanted[:, None]
                start += len(block)

        return ranking_metrics(hits(), ks)


def _ranges(pointers: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """For each element of the CSR rows ``parts``: its place in ``parts`` and its position among all elements."""
    lengths = pointers[parts + 1] - pointers[parts]
    place = torch.repeat_interleave(torch.arange(len(parts), device=parts.device), lengths)
    before = lengths.cumsum(0) - lengths
    return place, torch.arange(len(place), device=parts.device) - before[place] + pointers[parts][place]
