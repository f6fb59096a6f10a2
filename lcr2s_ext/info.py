"""What this installation is: versions, what was compiled, which backends can run here and why the others cannot."""

import importlib.metadata
import platform
import sys

import torch

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
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"  cuda:{index} {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    elif torch.version.cuda is None:
        lines.append("  none: this torch was built without CUDA")
    else:
        lines.append(f"  none: torch was built for CUDA {torch.version.cuda} but finds no usable GPU")
    lines += ["", "backends by operator (on CPU tensors, then on CUDA tensors):"]
    for op in _backend.OPERATORS:
        for device in ("cpu", "cuda"):
            runs, not_here = [], []
            for backend in _backend.BACKENDS[1:]:
                reason = _backend.unavailable_reason(op, backend, torch.device(device))
                if reason is None:
                    runs.append(backend)
                elif not reason.startswith("the tensors are on"):
                    not_here.append(f"{backend}: {reason}")
            missing = f"; {'; '.join(not_here)}" if not_here else ""
            lines.append(f"  {op:<20} {device:<5} {', '.join(runs)}{missing}")
    return "\n".join(lines)


def main() -> int:
    """Print the report; the exit code is 0."""
    sys.stdout.write(report() + "\n")
    return 0
