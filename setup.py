"""Builds the operators and the host module through CMake; everything else is in pyproject.toml."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_directory() -> Path:
    given = os.environ.get("LCR2S_TORCH_DIR")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "lcr2s_ext needs torch >= 2.11 to build: install it first (pip install torch), or build without "
            "--no-build-isolation"
        )
    return Path(spec.origin).parent


def torch_version(directory: Path) -> str:
    version = re.search(r"__version__ = '([^']+)'", (directory / "version.py").read_text())
    if version is None:
        raise SystemExit(f"{directory / 'version.py'} names no torch version")
    major, minor = (int(part) for part in version[1].split(".")[:2])
    if (major, minor) < (2, 11):
        raise SystemExit(f"lcr2s_ext needs torch >= 2.11, found {version[1]} in {directory}")
    return version[1]


def cuda_options() -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX") as CMake options; LCR2S_CUDA, LCR2S_EMULATE_CUDA, LCR2S_DEBUG as is."""
    choice = os.environ.get("LCR2S_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"LCR2S_CUDA must be 0, 1 or auto, got {choice!r}")
    options = [f"-DLCR2S_CUDA={choice}"]
    options += [f"-D{name}={os.environ.get(name, '0')}" for name in ("LCR2S_EMULATE_CUDA", "LCR2S_DEBUG")]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    if listed:
        archs = []
        ptx = ""
        for entry in listed:
            match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
            if match is None:
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0a or 12.0+PTX, got {entry!r}")
            arch = match[1] + match[2] + match[3]
            archs.append(arch)
            ptx = arch if match[4] else ptx
        options += [f"-DLCR2S_CUDA_ARCHS={';'.join(archs)}", f"-DLCR2S_CUDA_PTX={ptx}"]
    return options


class CMakeBuild(build_ext):
    def run(self) -> None:
        # One CMake project builds every extension; setuptools only needs to know where the files belong.
        torch_dir = torch_directory()
        output = ROOT / "lcr2s_ext" if self.inplace else Path(self.build_lib).resolve() / "lcr2s_ext"
        output.mkdir(parents=True, exist_ok=True)
        build_dir = Path(os.environ.get("LCR2S_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        if not self.inplace:
            build_dir = build_dir.with_name(build_dir.name + "-wheel")
        # The interpreter's own scripts first: `python setup.py` need not run in an activated environment.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if cmake is None or ninja is None:
            raise SystemExit("lcr2s_ext needs cmake >= 3.22 and ninja to build: pip install cmake ninja")
        import pybind11

        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            # Named anew each time: the one of an isolated build is gone when its folder is configured again.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DLCR2S_TORCH_DIR={torch_dir}",
            f"-DLCR2S_TORCH_VERSION={torch_version(torch_dir)}",
            f"-DLCR2S_OUTPUT_DIR={output}",
            f"-DLCR2S_VERSION={self.distribution.get_version()}",
            f"-DLCR2S_SANITIZE={os.environ.get('LCR2S_SANITIZE', '')}",
            f"-DLCR2S_EMULATE_AVX512={os.environ.get('LCR2S_EMULATE_AVX512', '0')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *cuda_options(),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        built = Path(self.build_lib) / "lcr2s_ext"
        return [str(path) for path in built.glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def pure() -> bool:
    """Whether to build without a compiler: Python, PyTorch and Triton alone."""
    choice = os.environ.get("LCR2S_PURE", "0")
    if choice not in ("0", "1"):
        raise SystemExit(f"LCR2S_PURE must be 0 or 1, got {choice!r}")
    return choice == "1"


if pure():
    setup(exclude_package_data={"lcr2s_ext": ["*.so"]})
else:
    setup(ext_modules=[Extension("lcr2s_ext.native", sources=[])], cmdclass={"build_ext": CMakeBuild})
