"""Support rows from past batches: a bank of the features that the last batches had.

Wang, Zhang, Huang and Scott, "Cross-Batch Memory for Embedding Learning", CVPR 2020: features drift slowly enough for
those of past steps to serve, and cost nothing to make.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lcr2s_ext.ops import SupportIndex
from lcr2s_ext.ops._distributed import all_gather
from lcr2s_ext.training.counter import counter_bits

__all__ = ["FeatureBank"]


class FeatureBank(nn.Module):
    """The last ``size`` rows (image feature, text feature, identity), overwritten in a circle; nothing is trained.

    Of an image or a caption that is there more than once only the newest feature is drawn. Buffers, and so part of a
    stage's checkpoint.

    Args:
        size: rows.
        width: of the features, which are kept in the precision of the stage's weights.
        seed: of the draws.
    """

    image: Tensor
    text: Tensor
    labels: Tensor
    items: Tensor
    samples: Tensor
    newest_item: Tensor
    newest_sample: Tensor
    position: Tensor

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        self.size = size
        self.seed = seed
        for name in ("image", "text"):
            self.register_buffer(name, torch.zeros(size, width))
        for name in ("labels", "items", "samples"):
            self.register_buffer(name, torch.full((size,), -1, dtype=torch.int64))
        for name in ("newest_item", "newest_sample"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.bool))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(
        self,
        image: Tensor,
        text: Tensor,
        labels: Tensor,
        items: Tensor,
        samples: Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Put a batch in, over the oldest rows.

        Args:
            image, text: ``(B, d)`` features.
            labels: int64 ``(B,)`` identities.
            items: int64 ``(B,)`` images, equal for two captions of one image.
            samples: int64 ``(B,)`` captions.
            group: ranks whose rows, equally many, make the batch: every rank's bank gets all of them.
        """
        features = [value.detach().to(self.image.dtype) for value in (image, text)]
        batch = [*features, labels, items, samples]
        if group is not None:
            batch = [all_gather(group, value) for value in batch]
        rows = [value[-self.size :] for value in batch]
        slots = (self.position + torch.arange(len(rows[0]), device=self.position.device)) % self.size
        for ids, newest, kept in ((rows[3], self.newest_item, self.items), (rows[4], self.newest_sample, self.samples)):
            newest &= ~torch.isin(kept, ids)
            newest[slots] = ~(ids[:, None] == ids).triu(1).any(1)
        for kept, value in zip((self.image, self.text, self.labels, self.items, self.samples), rows, strict=True):
            kept[slots] = value.to(kept.dtype)
        self.position.copy_((self.position + len(rows[0])) % self.size)

    @torch.no_grad()
    def draw(
        self, labels: Tensor, items: Tensor, samples: Tensor, *, max_support: int, epoch: int
    ) -> tuple[tuple[Tensor, SupportIndex], tuple[Tensor, SupportIndex]]:
        """Support sets of a batch, for images and for captions: rows of its identities, never the own image (caption).

        Drawn without replacement, determined by seed, epoch, the row's caption and what the bank holds.

        Args:
            labels, items, samples: of the ``B`` anchors, as for :meth:`push`.
            max_support: largest set, the row itself not counted.
            epoch: of the batch.

        Returns:
            For each modality the ``n`` distinct bank rows drawn, and ``B`` sets, self first, over a pool of the ``B``
            anchors followed by those rows.
        """
        held = torch.isin(self.labels, labels).nonzero()[:, 0]
        same = labels[:, None] == self.labels[held]
        made = []
        for stream, (own, ids, newest) in enumerate(
            ((items, self.items, self.newest_item), (samples, self.samples, self.newest_sample))
        ):
            row, column = (same & newest[held] & (own[:, None] != ids[held])).nonzero(as_tuple=True)
            column = held[column]
            lot = counter_bits(
                self.seed, torch.tensor(2 * epoch + stream, device=row.device), samples[row], ids[column]
            )
            order = torch.argsort(lot)
            order = order[torch.argsort(row[order], stable=True)]
            row, column = row[order], column[order]
            counts = torch.bincount(row, minlength=len(labels))
            place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
            row, column = row[place < max_support], column[place < max_support]
            rows, entry = torch.unique(column, return_inverse=True)
            anchors = torch.arange(len(labels), device=row.device)
            # The anchors' own entries are put before those of their sets by a stable sort.
            by_row = torch.argsort(torch.cat([anchors, row]), stable=True)
            indices = torch.cat([anchors, len(labels) + entry])[by_row]
            ends = (torch.bincount(row, minlength=len(labels)) + 1).cumsum(0)
            made.append((rows, SupportIndex(torch.cat([ends.new_zeros(1), ends]), indices, len(labels) + len(rows))))
        return made[0], made[1]
