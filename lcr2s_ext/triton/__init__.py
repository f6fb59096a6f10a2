"""The operators in Triton, `torch.ops.lcr2s_triton`: for GPUs where no compiled library is at hand.

Importing this package imports neither triton nor a kernel: :func:`load` does, when an operator is first asked for.
Each module holds one family's kernels and, under `_launch.operator`, its operators, with the arguments and results of
their namesakes in `torch.ops.lcr2s`.
"""

import contextlib
import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterator

MINIMUM = (3, 6)
"""The oldest triton that the kernels run with."""

MODULES: dict[str, str] = {
    "support_attention": "support_attention",
    "info_nce": "similarity",
    "sdm": "similarity",
    "cmpm": "similarity",
    "tal": "similarity",
    "relation_frobenius": "relation_frobenius",
    "relation_kl": "relation_kl",
    "topk_similarity": "retrieval",
    "retrieval_metrics": "retrieval",
}
"""Operator -> the module that holds it."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether triton's interpreter runs the kernels, on CPU tensors: the environment's TRITON_INTERPRET, read at import."""


def _installed() -> str | None:
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _refusal(version: str | None) -> str | None:
    wanted = ".".join(map(str, MINIMUM))
    if version is None:
        return f"triton is not installed (triton >= {wanted} is needed)"
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < MINIMUM:
        return f"triton {version} is installed, triton >= {wanted} is needed"
    return None


UNAVAILABLE: str | None = _refusal(_installed())
"""Why no kernel can run here, whatever the device; None where triton is new enough. Constants, all three: torch.compile
traces through code that reads them."""


LOADS = ("pointers", "tma", "specialized")
"""How the matrix kernels may load their tiles: see :func:`tile_loads`."""


def _checked_loads(name: str, source: str) -> str:
    if name not in LOADS:
        raise ValueError(f"{source} must be one of {', '.join(LOADS)}, got {name!r}")
    return name


_loads = _checked_loads(os.environ.get("LCR2S_TRITON_LOADS", LOADS[0]), "the environment's LCR2S_TRITON_LOADS")


@contextlib.contextmanager
def tile_loads(name: str) -> Iterator[None]:
    """How tiles of rows reach the matrix kernels in this block, on GPUs that offer it (process-wide, all threads).

    Args:
        name: "pointers", the default; "tma", by descriptors of the Tensor Memory Accelerator from compute capability
            9.0 on; "specialized", that and warps of their own for the loads, where Triton can. Where a kernel, dtype,
            alignment or GPU does not allow what is asked, it loads by the next simpler way. Results keep their bits,
            but for the losses of "specialized". The environment's LCR2S_TRITON_LOADS sets the default.

    Raises:
        ValueError: for another name.
    """
    global _loads
    before, _loads = _loads, _checked_loads(name, "`name`")
    try:
        yield
    finally:
        _loads = before


def requested_loads() -> str:
    """What the environment or the innermost :func:`tile_loads` asks for."""
    return _loads


def load(module: str) -> None:
    """Import a module of this package, and with it triton; its operators are then in `torch.ops.lcr2s_triton`."""
    importlib.import_module(f"{__name__}.{module}")
