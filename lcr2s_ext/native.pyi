"""Host-side C++ of lcr2s_ext: identity index, seeded support draws, build information."""

import numpy as np
import numpy.typing as npt

_Int64 = npt.NDArray[np.int64]
_Ints = npt.NDArray[np.int64] | npt.NDArray[np.int32]

class IdentityIndex:
    def __init__(self, ids: _Ints, item_ids: _Ints | None = None) -> None: ...
    def __len__(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_identities(self) -> int: ...
    @property
    def identities(self) -> _Int64: ...
    @property
    def sizes(self) -> _Int64: ...
    def rows(self, identity: int) -> _Int64: ...
    def draw(
        self,
        rows: _Ints | None = None,
        *,
        max_support: int,
        keys: _Ints | None = None,
        include_self: bool = True,
        distinct_items: bool = False,
        seed: int,
        epoch: int = 0,
    ) -> tuple[_Int64, _Int64]: ...

def draw_support(
    ids: _Ints,
    max_support: int,
    *,
    item_ids: _Ints | None = None,
    rows: _Ints | None = None,
    keys: _Ints | None = None,
    include_self: bool = True,
    distinct_items: bool = False,
    seed: int,
    epoch: int = 0,
) -> tuple[_Int64, _Int64]: ...
def permutation(size: int, *, seed: int, epoch: int = 0) -> _Int64: ...
def build_info() -> dict[str, str]: ...
