"""The byte budget of the compiled losses' workspace."""

_MIB = 1 << 20


class _State:
    mebibytes: int = 64


def set_workspace_limit(mebibytes: int) -> None:
    """Bound the temporary memory that one compiled loss may use for similarity tiles, beside O(B d).

    Where all B x N similarities fit, they are computed once and kept, otherwise they are computed again for the
    gradient. The default is 64 MiB on the CPU. Results are the same bits for the same limit; another limit may change
    the last digits.

    Args:
        mebibytes: at least 1.

    Raises:
        TypeError, ValueError: not an int of at least 1.
    """
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, int):
        raise TypeError(f"`mebibytes` must be an int, got {type(mebibytes).__name__}")
    if mebibytes < 1:
        raise ValueError(f"`mebibytes` must be at least 1, got {mebibytes}")
    _State.mebibytes = mebibytes


def workspace_bytes() -> int:
    """The current limit in bytes."""
    return _State.mebibytes * _MIB
