"""Builds the extension with CMake and Ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake once for the single extension ``unitsface_kernels._native``."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_pybind11_directory()}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        # Build isolation gives every build an environment, and so a ninja, of its own.
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        for name in ("UNITSFACE_CUDA_ARCHS", "UNITSFACE_CUDA"):
            if os.environ.get(name):
                configure.append(f"-D{name}={os.environ[name]}")
        self._run(configure, "configuring")
        self._run(["cmake", "--build", str(build)], "compiling")
        self._run(["cmake", "--install", str(build)], "installing")

    @staticmethod
    def _run(command: list[str], stage: str) -> None:
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            sys.exit(
                f"error: {command[0]} not found; build with isolation, or install cmake, ninja "
                "and pybind11 first"
            )
        except subprocess.CalledProcessError as error:
            hint = ""
            if shutil.which(os.environ.get("CXX", "c++")) is None:
                hint = " No C++ compiler was found: install g++ or clang++, or set CXX."
            sys.exit(
                f"error: {stage} the native extension failed (exit code {error.returncode})."
                f"{hint} The cause is in the CMake output above."
            )


def _pybind11_directory() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


setup(
    ext_modules=[Extension("unitsface_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
