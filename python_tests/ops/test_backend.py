"""Which backend runs: use_backend, backend=, explain, and what is said when the compiled library is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lcr2s_ext
from lcr2s_ext import BackendUnavailableError, explain, triton, use_backend
from lcr2s_ext.ops import SupportIndex, _backend, _dispatch, support_attention
from lcr2s_ext.ops._backend import resolve, unavailable_reason

QUERY = torch.ones(2, 1, 4)
SETS = SupportIndex(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), 2)


def attention_backend(**arguments: str) -> str:
    """The backend of one call, read off the autograd graph that it leaves."""
    out = support_attention(QUERY.clone().requires_grad_(), QUERY, QUERY, SETS, **arguments)
    return "cpu" if "lcr2s" in type(out.grad_fn).__name__.lower() else "reference"


def test_the_compiled_library_is_the_default() -> None:
    assert attention_backend() == "cpu"
    assert attention_backend(backend="auto") == "cpu"
    assert resolve("support_attention", None, torch.device("cpu")) == "cpu"


def test_use_backend_nests_and_restores() -> None:
    with use_backend("reference"):
        assert attention_backend() == "reference"
        assert attention_backend(backend="cpu") == "cpu"
        with use_backend("cpu"):
            assert attention_backend() == "cpu"
        assert attention_backend() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert attention_backend() == "cpu"


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"`backend`.*'gpu'"):
        use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match=r"`backend`.*'gpu'"):
        attention_backend(backend="gpu")
    assert attention_backend() == "cpu"


@pytest.mark.parametrize(
    ("backend", "reason"), [("cuda", "needs cuda tensors"), ("triton", "Triton kernels need cuda tensors")]
)
def test_a_backend_that_cannot_run_says_why(backend: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match=f"support_attention.*'{backend}'.*{reason}"):
        attention_backend(backend=backend)
    assert issubclass(BackendUnavailableError, RuntimeError)


@pytest.mark.parametrize(
    ("version", "usable"),
    [("3.6.0", True), ("3.10.1", True), ("4.0", True), ("3.6.0+git1234", True), ("3.5.1", False), ("2.9", False)],
)
def test_triton_versions_are_compared_as_numbers(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = triton._refusal(version)
    assert reason is None if usable else f"triton {version} is installed, triton >= 3.6 is needed" in str(reason)
    monkeypatch.setattr(triton, "UNAVAILABLE", reason)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    assert unavailable_reason("support_attention", "triton", torch.device("cuda")) == reason


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "UNAVAILABLE", triton._refusal(None))
    with pytest.raises(BackendUnavailableError, match="triton is not installed"):
        attention_backend(backend="triton")


def test_auto_on_an_accelerator_names_every_candidate() -> None:
    with pytest.raises(BackendUnavailableError, match="cpu: the tensors are on meta"):
        resolve("support_attention", "auto", torch.device("meta"))
    with pytest.raises(BackendUnavailableError, match=r"no cuda kernel for no_such_op.*no Triton kernel"):
        resolve("no_such_op", "auto", torch.device("cuda"))


def test_the_table_of_gpu_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(_dispatch.CHOICES) == set(_backend.OPERATORS)
    entries = (_dispatch.Choice(1024, "triton", "results.csv"), _dispatch.Choice(None, "cuda", None))
    monkeypatch.setitem(_dispatch.CHOICES, "sdm", entries)
    monkeypatch.setattr(_backend, "unavailable_reason", lambda op, backend, device: None)
    gpu = torch.device("cuda")
    assert [resolve("sdm", None, gpu, rows) for rows in (1, 1024, 1025, None)] == ["triton", "triton", "cuda", "cuda"]
    assert resolve("sdm", "cuda", gpu, 1) == "cuda"
    assert _dispatch.describe("sdm", 7) == "on a GPU `auto` prefers triton at this size (measured in results.csv)"
    assert "cuda at this size (not measured" in _dispatch.describe("sdm", 5000)


def test_explain() -> None:
    lines = explain("support_attention", QUERY).splitlines()
    assert lines[0] == "support_attention on cpu:"
    assert lines[-1].strip() == "on a GPU `auto` prefers cuda at any size (not measured on a GPU yet)"
    states = {line.split()[0]: line for line in lines[1:-1]}
    assert set(states) == {"reference", "cpu", "cuda", "triton"}
    assert states["cpu"].endswith("runs")
    assert "available on request" in states["reference"]
    assert "needs cuda tensors" in states["cuda"]
    with use_backend("reference"):
        assert "runs" in explain("sdm_loss").splitlines()[1]


def without_library(tmp_path: Path, library: bytes | None, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` on a copy of the package whose compiled library is missing or broken."""
    package = tmp_path / "lcr2s_ext"
    source = Path(lcr2s_ext.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("liblcr2s.so", "__pycache__"))
    if library is not None:
        (package / "liblcr2s.so").write_bytes(library)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    setup = "import torch, lcr2s_ext\nfrom lcr2s_ext import ops\nprint(lcr2s_ext.__file__)\n"
    return subprocess.run(
        [sys.executable, "-c", setup + code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )


CALL = """
from lcr2s_ext.ops import BackendUnavailableError, SupportIndex, support_attention
q = torch.ones(1, 1, 4)
sets = SupportIndex(torch.tensor([0, 1]), torch.tensor([0]), 1)
print(support_attention(q, q, q, sets, backend="reference").sum().item())
try:
    support_attention(q, q, q, sets)
except BackendUnavailableError as error:
    print("refused:", error)
print(ops.explain("support_attention", q))
"""


def test_missing_library(tmp_path: Path) -> None:
    done = without_library(tmp_path, None, CALL)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1] == "4.0"
    assert (
        "refused: support_attention: backend 'auto' cannot run here (cpu: the compiled library is missing"
        in done.stdout
    )
    assert "liblcr2s.so does not exist" in done.stdout
    assert "backend='reference' runs plain PyTorch anywhere" in done.stdout
    assert "reference  available on request" in done.stdout


def test_broken_library_gives_the_loader_s_own_error(tmp_path: Path) -> None:
    done = without_library(tmp_path, b"not a library", CALL)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" in done.stderr
    refusal = next(line for line in done.stdout.splitlines() if line.startswith("refused"))
    assert "could not be loaded" in refusal
    assert "liblcr2s.so: " in refusal
    assert torch.__version__ in refusal


def test_import_is_light(tmp_path: Path) -> None:
    """Importing the operators pulls in no training package, starts no CUDA context and compiles nothing."""
    heavy = "lightning", "transformers", "tokenizers", "kornia", "PIL", "einops", "torch._inductor", "torchvision"
    code = f"import sys; import lcr2s_ext.ops; print([name for name in {heavy!r} if name in sys.modules])"
    plain = f"import sys; import torch; print([name for name in {heavy!r} if name in sys.modules])"
    ours, torch_alone = (
        subprocess.run([sys.executable, "-c", c], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for c in (code, plain)
    )
    assert ours == torch_alone
    started = subprocess.run(
        [sys.executable, "-c", "import torch, lcr2s_ext; print(torch.cuda.is_initialized())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert started.strip() == "False"
