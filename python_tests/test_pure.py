"""A wheel built without a compiler: what it holds, that it imports, what it says it lacks."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lcr2s_ext import triton

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests stand without the source tree")

CHECK = """
import sys
import torch
from lcr2s_ext import info, ops
from lcr2s_ext.ops import _backend, _library

assert not _library.compiled()
ids = torch.arange(4)
features = torch.randn(4, 3)
for call, error in (
    (lambda: ops.sdm_loss(features, features, ids), ops.BackendUnavailableError),
    (lambda: ops.SupportIndex.from_ids(ids, 2, seed=0), ImportError),
):
    try:
        call()
    except error as refusal:
        print(refusal)
    else:
        sys.exit("not refused")
assert ops.sdm_loss(features, features, ids, backend="reference").isfinite()
if sys.argv[1] == "triton":
    assert {_backend.resolve(op, None, torch.device("cuda")) for op in _backend.OPERATORS} == {"triton"}
print(info.report())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lcr2s_ext", source / "lcr2s_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # What an in-place build may have left does not belong to the wheel.
    (source / "lcr2s_ext" / "liblcr2s.so").touch()
    build = f"import sys; sys.path.insert(0, '.'); import build_backend; build_backend.build_wheel({str(out)!r})"
    # A PATH without a compiler, cmake or ninja.
    environment = {**os.environ, "LCR2S_PURE": "1", "PATH": os.devnull}
    subprocess.run([sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, check=True)
    return next(out.iterdir())


def test_the_wheel_is_for_any_platform_and_holds_no_library(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lcr2s_ext/triton/retrieval.py" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]


def test_it_imports_and_says_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LCR2S_", "TRITON_"))}
    environment["PYTHONPATH"] = str(tmp_path)
    default = "triton" if triton.UNAVAILABLE is None else "none"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", CHECK, default],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, drawing, *report = done.stdout.splitlines()
    assert f"{tmp_path}/lcr2s_ext/liblcr2s.so does not exist" in refused
    assert "built without the compiled library" in refused
    assert "lcr2s_ext.native is not part of this installation" in drawing
    report_text = "\n".join(report)
    assert "missing: " in report_text
    assert "native module: missing: lcr2s_ext.native is not part of this installation" in report_text
    assert "cpu: cannot run here" in report_text


def test_the_option_is_0_or_1() -> None:
    environment = {**os.environ, "LCR2S_PURE": "yes"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "LCR2S_PURE must be 0 or 1, got 'yes'" in done.stderr
