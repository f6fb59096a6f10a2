"""What this installation is: versions, what was compiled, which backends can run here and why the others cannot."""

import importlib.metadata
import platform
import sys

import torch

from lcr2s_ext import triton
from lcr2s_ext._version import __version__
from lcr2s_ext.ops import _backend, _library

_PACKAGES = ("numpy", "einops", "triton", "lightning", "tokenizers", "safetensors", "kornia", "pillow")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native_build() -> dict[str, str]:
    try:
        from lcr2s_ext import native
    except ImportError as error:
        return {"native module": f"missing: {error}"}
    return dict(native.build_info())


def _no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch was built for CUDA {torch.version.cuda} but finds no usable GPU"


def _backend_lines(backend: str, no_gpu: str | None) -> list[str]:
    """Whether a backend runs here, and the operators it has and lacks."""
    interpreted = backend == "triton" and triton.INTERPRETED
    device = torch.device("cpu" if backend == "cpu" or interpreted else "cuda")
    reasons = {op: _backend.unavailable_reason(op, backend, device) for op in _backend.OPERATORS}
    held = [op for op, reason in reasons.items() if reason is None]
    missing = sorted({reason.replace(op, "OPERATOR") for op, reason in reasons.items() if reason is not None})
    if backend == "triton" and triton.UNAVAILABLE is not None:
        return [f"triton: cannot run here: {triton.UNAVAILABLE}"]
    if interpreted:
        lines = ["triton: runs here, in its interpreter on CPU tensors (TRITON_INTERPRET is set)"]
    elif backend != "cpu" and no_gpu is not None:
        lines = [f"{backend}: cannot run here: {no_gpu}"]
    else:
        lines = [f"{backend}: runs here" if held else f"{backend}: cannot run here"]
    if len(held) == len(reasons):
        lines.append("  kernels: every operator")
    else:
        lines.append(f"  kernels: {', '.join(held) or 'none'}")
        lines += [f"  the other operators: {reason.replace(' for OPERATOR', '')}" for reason in missing]
    return lines


def report() -> str:
    """The whole report, one fact a line."""
    lines = [
        f"lcr2s_ext {__version__}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "packages: " + ", ".join(f"{name} {_version_of(name)}" for name in _PACKAGES),
        "",
        "compiled library:",
    ]
    if _library.compiled():
        lines.append(f"  CPU instruction set in use: {_library.ISA_NAMES[torch.ops.lcr2s.cpu_isa()]}")
        lines.append(f"  CUDA kernels: {'compiled in' if torch.ops.lcr2s.compiled_with_cuda() else 'not compiled in'}")
    else:
        lines.append(f"  missing: {_library.LOAD_ERROR}")
    lines += [f"  {key}: {value or 'none'}" for key, value in _native_build().items()]
    lines += ["", "GPU:"]
    no_gpu = _no_gpu()
    if no_gpu is None:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"  cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    else:
        lines.append(f"  none: {no_gpu}")
    lines += ["", "backends:", "  reference: runs here, every operator (plain PyTorch)"]
    lines += [f"  {line}" for backend in ("cpu", "cuda", "triton") for line in _backend_lines(backend, no_gpu)]
    return "\n".join(lines)


def main() -> int:
    """Print the report; the exit code is 0."""
    sys.stdout.write(report() + "\n")
    return 0
