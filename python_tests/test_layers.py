"""The layer law of docs/architecture.md, held against the imports, and what importing the package may cost."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lcr2s_ext

PACKAGE = Path(lcr2s_ext.__file__).parent

# What each room may import of the package, besides itself.
ALLOWED = {
    "reference": set(),
    "triton": set(),
    "ops": {"reference", "triton", "native"},
    "nn": {"ops"},
    "models": {"nn", "ops"},
    "data": {"ops", "native"},
    "retrieval": {"ops"},
    "training": {"models", "nn", "ops", "data", "retrieval"},
    "info": {"ops", "triton", "native"},
}
ROOT_MODULES = {"_version", "_checks", "_files"}  # any room may name these


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "lcr2s_ext" and len(parts) > 1 else None


def rooms_imported(path: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {room for alias in node.names if (room := room_of(alias.name))}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "lcr2s_ext":
                rooms |= {alias.name for alias in node.names}
            elif node.module and (room := room_of(node.module)):
                rooms.add(room)
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_downwards(room: str) -> None:
    folder = PACKAGE / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
    assert files
    for path in files:
        upward = rooms_imported(path) - ALLOWED[room] - {room} - ROOT_MODULES
        assert not upward, f"{path.relative_to(PACKAGE)} imports {sorted(upward)}"


def test_import_needs_only_the_core() -> None:
    script = (
        "import sys, json, torch; before = set(sys.modules); import lcr2s_ext; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in json.loads(out.stdout)}
    assert "lcr2s_ext" in roots
    extras = {"lightning", "pytorch_lightning", "kornia", "tokenizers", "transformers", "safetensors", "PIL", "rich"}
    assert not roots & (extras | {"tensorboard", "jsonargparse", "yaml", "triton"})


def test_cuda_is_not_initialised_by_import() -> None:
    script = "import torch, lcr2s_ext; print(torch.cuda.is_initialized())"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
