"""`python -m lcr2s_ext` and `lcr2s info` say what an installation is."""

import os
import subprocess
import sys

import pytest
import torch

import lcr2s_ext
from lcr2s_ext import info, triton


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout


def test_report_names_versions_and_backends() -> None:
    text = info.report()
    assert f"lcr2s_ext {lcr2s_ext.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert "reference: runs here" in text
    for backend in ("cpu", "cuda", "triton"):
        assert f"  {backend}: runs here" in text or f"  {backend}: cannot run here" in text


def test_triton_is_named_with_its_version_and_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"triton {info._version_of('triton')}" in info.report()
    monkeypatch.setattr(triton, "INTERPRETED", True)
    assert "triton: runs here, in its interpreter on CPU tensors" in info.report()
    monkeypatch.setattr(triton, "UNAVAILABLE", triton._refusal("3.5.1"))
    assert "triton: cannot run here: triton 3.5.1 is installed, triton >= 3.6 is needed" in info.report()


def test_module_prints_the_report() -> None:
    assert run("-m", "lcr2s_ext").startswith(f"lcr2s_ext {lcr2s_ext.__version__}\n")


def test_instruction_set_can_be_lowered() -> None:
    assert "CPU instruction set in use: portable" in run("-m", "lcr2s_ext", LCR2S_CPU_ISA="portable")


def test_missing_library_is_explained() -> None:
    text = run("-W", "ignore", "-m", "lcr2s_ext", LCR2S_LIBRARY="nowhere/liblcr2s.so")
    assert "nowhere/liblcr2s.so does not exist" in text
    assert "cpu: cannot run here" in text
