"""The workspace's byte budget: one for each kind of device."""

from collections.abc import Iterator

import pytest
import torch

from lcr2s_ext.ops import _workspace, set_workspace_limit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _defaults_after() -> Iterator[None]:
    yield
    set_workspace_limit(None)


def test_defaults() -> None:
    assert _workspace.workspace_bytes(CPU) == 64 << 20
    assert _workspace.workspace_bytes(GPU) == 256 << 20


def test_one_device_type_or_both() -> None:
    set_workspace_limit(8, "cuda")
    assert (_workspace.workspace_bytes(CPU), _workspace.workspace_bytes(GPU)) == (64 << 20, 8 << 20)
    set_workspace_limit(2)
    assert (_workspace.workspace_bytes(CPU), _workspace.workspace_bytes(GPU)) == (2 << 20, 2 << 20)
    set_workspace_limit(None, "cpu")
    assert (_workspace.workspace_bytes(CPU), _workspace.workspace_bytes(GPU)) == (64 << 20, 2 << 20)


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"`mebibytes` must be an int or None, got float"):
        set_workspace_limit(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`mebibytes` must be at least 1, got 0"):
        set_workspace_limit(0)
    with pytest.raises(ValueError, match="`device_type` must be one of 'cpu', 'cuda'; got 'tpu'"):
        set_workspace_limit(4, "tpu")
