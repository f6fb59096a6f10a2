"""Ragged support sets as a CSR index over a pool of feature rows."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lcr2s_ext import _checks


class SupportIndex:
    """Support sets of B queries over a pool of `num_rows` feature rows, in CSR form.

    The set of query i is `indices[indptr[i]:indptr[i + 1]]`, rows of the pool; a row may occur in many sets and
    repeatedly in one. Validated and transposed when made: this reads the index on the host, once. An instance is a
    pytree of its five tensors, so it passes through torch.compile and torch.export; make it outside compiled code.

    Args:
        indptr: (B + 1,) int32 or int64, starts with 0, never falls, ends with the number of indices.
        indices: (nnz,) int32 or int64 in [0, num_rows).
        num_rows: rows of the pool, the M of key and value.

    Attributes:
        indptr, indices: as given, int64.
        entry_rows: (nnz,) int64, the query that each entry belongs to.
        t_indptr: (num_rows + 1,) int64, the transposed index: entries that use pool row r are
            `t_entries[t_indptr[r]:t_indptr[r + 1]]`.
        t_entries: (nnz,) int64, positions into `indices`, by pool row and ascending within a row.

    Raises:
        TypeError, ValueError: an argument has another type, shape or range; the message names it.
    """

    __slots__ = ("entry_rows", "indices", "indptr", "num_rows", "t_entries", "t_indptr")

    indptr: Tensor
    indices: Tensor
    entry_rows: Tensor
    t_indptr: Tensor
    t_entries: Tensor
    num_rows: int

    def __init__(self, indptr: Tensor, indices: Tensor, num_rows: int) -> None:
        _checks.check_tensor("indptr", indptr, "(B + 1,)", _checks.INTEGER)
        _checks.check_tensor("indices", indices, "(nnz,)", _checks.INTEGER)
        if isinstance(num_rows, bool) or not isinstance(num_rows, int):
            raise TypeError(f"`num_rows` must be an int, got {type(num_rows).__name__}")
        if num_rows < 0:
            raise ValueError(f"`num_rows` must not be negative, got {num_rows}")
        _checks.check_like("indices", indices, "indptr", indptr, dtype=False)
        if indptr.shape[0] == 0:
            raise ValueError("`indptr` must have B + 1 elements, got none")
        indptr, indices = indptr.to(torch.int64).contiguous(), indices.to(torch.int64).contiguous()
        nnz = indices.shape[0]
        lengths = indptr.diff()
        first, last = int(indptr[0]), int(indptr[-1])
        if first != 0:
            raise ValueError(f"`indptr` must start with 0, got {first}")
        if last != nnz:
            raise ValueError(f"`indptr` must end with the number of indices ({nnz}), got {last}")
        if bool((lengths < 0).any()):
            row = int((lengths < 0).nonzero()[0])
            raise ValueError(f"`indptr` must never fall, but does after position {row}")
        if nnz > 0:
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= num_rows:
                bad = low if low < 0 else high
                raise ValueError(f"`indices` must lie in [0, num_rows={num_rows}), got {bad}")
        self.indptr = indptr
        self.indices = indices
        self.num_rows = num_rows
        self.entry_rows = torch.repeat_interleave(
            torch.arange(lengths.shape[0], device=indptr.device), lengths, output_size=nnz
        )
        self.t_entries = torch.sort(indices, stable=True).indices
        self.t_indptr = torch.zeros(num_rows + 1, dtype=torch.int64, device=indptr.device)
        torch.cumsum(torch.bincount(indices, minlength=num_rows), 0, out=self.t_indptr[1:])

    @classmethod
    def from_ids(
        cls,
        ids: Tensor,
        max_support: int,
        *,
        item_ids: Tensor | None = None,
        include_self: bool = True,
        seed: int,
    ) -> "SupportIndex":
        """Draw every row's support set from the other rows of its identity.

        Args:
            ids: (B,) int32 or int64 identity of each row.
            max_support: largest number of support rows of a set (K), not counting the row itself.
            item_ids: (B,) int32 or int64; rows with the same item are never in each other's support (two captions of
                one image share an item). None: every row is an item of its own.
            include_self: put row i itself first into set i.
            seed: the draw is without replacement and determined by (seed, row).

        Returns:
            An index of B sets over B rows, on the device of `ids`.

        Raises:
            TypeError, ValueError: an argument has another type, shape or range.
        """
        from lcr2s_ext import native

        _checks.check_tensor("ids", ids, "(B,)", _checks.INTEGER)
        if item_ids is not None:
            _checks.check_ids("item_ids", item_ids, ids.shape[0], "ids", ids)
        for name, value in (("max_support", max_support), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
            if not 0 <= value < 2**63:
                raise ValueError(f"`{name}` must lie in [0, 2**63), got {value}")
        if not isinstance(include_self, bool):
            raise TypeError(f"`include_self` must be a bool, got {type(include_self).__name__}")
        indptr, indices = native.draw_support(
            ids.cpu().to(torch.int64).numpy(),
            max_support,
            item_ids=None if item_ids is None else item_ids.cpu().to(torch.int64).numpy(),
            include_self=include_self,
            seed=seed,
        )
        return cls(torch.from_numpy(indptr), torch.from_numpy(indices), ids.shape[0]).to(ids.device)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SupportIndex":
        """The same index on another device; itself where it is already there."""
        if self.indptr.device == torch.device(device):
            return self
        tensors, num_rows = _flatten(self)
        return _unflatten([tensor.to(device, non_blocking=non_blocking) for tensor in tensors], num_rows)

    def pin_memory(self) -> "SupportIndex":
        """The same index in page-locked memory."""
        tensors, num_rows = _flatten(self)
        return _unflatten([tensor.pin_memory() for tensor in tensors], num_rows)

    @property
    def device(self) -> torch.device:
        return self.indptr.device

    def __len__(self) -> int:
        """B, the number of sets."""
        return self.indptr.shape[0] - 1

    def __repr__(self) -> str:
        return f"SupportIndex(sets={len(self)}, entries={self.indices.shape[0]}, num_rows={self.num_rows})"

    def __reduce__(self) -> tuple[Any, ...]:
        tensors, num_rows = _flatten(self)
        return _unflatten, (tensors, num_rows)


def _flatten(index: SupportIndex) -> tuple[list[Tensor], int]:
    return [index.indptr, index.indices, index.entry_rows, index.t_indptr, index.t_entries], index.num_rows


def _unflatten(tensors: Any, num_rows: int) -> SupportIndex:
    index = SupportIndex.__new__(SupportIndex)
    index.indptr, index.indices, index.entry_rows, index.t_indptr, index.t_entries = tensors
    index.num_rows = num_rows
    return index


def _flatten_with_keys(index: SupportIndex) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], int]:
    tensors, num_rows = _flatten(index)
    names = ("indptr", "indices", "entry_rows", "t_indptr", "t_entries")
    return [(pytree.GetAttrKey(name), tensor) for name, tensor in zip(names, tensors, strict=True)], num_rows


pytree.register_pytree_node(
    SupportIndex,
    _flatten,
    _unflatten,
    serialized_type_name="lcr2s_ext.ops.SupportIndex",
    flatten_with_keys_fn=_flatten_with_keys,
)
