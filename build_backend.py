"""PEP 517 backend: setuptools, told where the surrounding environment keeps its torch.

An isolated build hides the user's torch and would download another one. The library uses LibTorch's stable ABI, so the
headers of the torch that is already there serve; only where there is none is torch a build requirement.
"""

import os
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_FIND_TORCH = "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"


def _surrounding_torch() -> str | None:
    # -I leaves out PYTHONPATH, through which pip isolates a build: what is found is the user's own environment.
    found = subprocess.run([sys.executable, "-I", "-c", _FIND_TORCH], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def _export_torch() -> None:
    torch_dir = _surrounding_torch()
    if torch_dir is not None:
        os.environ.setdefault("LCR2S_TORCH_DIR", torch_dir)


def _requirements(base: list[str]) -> list[str]:
    if os.environ.get("LCR2S_PURE") == "1" or "LCR2S_TORCH_DIR" in os.environ or _surrounding_torch():
        return base
    return [*base, "torch>=2.11"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    _export_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    _export_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
