"""The byte budget of the fused operators' workspace."""

import torch

_MIB = 1 << 20
_DEFAULTS = {"cpu": 64, "cuda": 256}


class _State:
    mebibytes: dict[str, int] = dict(_DEFAULTS)  # noqa: RUF012


def set_workspace_limit(mebibytes: int | None, device_type: str | None = None) -> None:
    """Bound the temporary memory that one fused operator may use for similarity tiles, beside O(B d).

    Where all B x N similarities fit, they are computed once and kept, otherwise they are computed again for the
    gradient. Results are the same bits for the same limit; another limit may change the last digits.

    Args:
        mebibytes: at least 1; None: back to the default, 64 MiB on the CPU and 256 MiB on a GPU.
        device_type: "cpu" or "cuda"; None: both.

    Raises:
        TypeError, ValueError: not an int of at least 1, or another device type.
    """
    if isinstance(mebibytes, bool) or not isinstance(mebibytes, int | None):
        raise TypeError(f"`mebibytes` must be an int or None, got {type(mebibytes).__name__}")
    if mebibytes is not None and mebibytes < 1:
        raise ValueError(f"`mebibytes` must be at least 1, got {mebibytes}")
    if device_type is not None and device_type not in _DEFAULTS:
        raise ValueError(f"`device_type` must be one of {', '.join(map(repr, _DEFAULTS))}; got {device_type!r}")
    for name in _DEFAULTS if device_type is None else (device_type,):
        _State.mebibytes[name] = _DEFAULTS[name] if mebibytes is None else mebibytes


def workspace_bytes(device: torch.device) -> int:
    """The current limit in bytes for tensors on `device`."""
    return _State.mebibytes["cuda" if device.type == "cuda" else "cpu"] * _MIB
