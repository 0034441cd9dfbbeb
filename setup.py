"""Builds the extension with CMake and Ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
#: Environment variables that are options of CMakeLists.txt.
OPTIONS = ("UNITSFACE_CUDA", "UNITSFACE_CUDA_ARCHS")
#: Environment variables that CMake reads once and then keeps in its cache.
ENVIRONMENT = (
    *("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS"),
)
#: One wheel for every Python from 3.10 on. Free-threaded ones have no stable ABI before 3.15; on
#: Windows it takes another import library, and no wheels are released.
STABLE_ABI = os.name != "nt" and not sysconfig.get_config_var("Py_GIL_DISABLED")
TOOLS = ("c++", "nvcc", os.environ.get("CXX", "c++"), os.environ.get("CUDACXX", "nvcc"))


class CMakeBuild(build_ext):
    """Runs CMake once for the single extension ``unitsface_kernels._native``."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        _require_tools()
        _start_anew_if_changed(build)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
            f"-DUNITSFACE_STABLE_ABI={'ON' if STABLE_ABI else 'OFF'}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        # With build isolation every build has another environment, hence another ninja.
        ninja = shutil.which("ninja")
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        for name in OPTIONS:
            # An unset option is the default, not the value of an earlier build.
            given = os.environ.get(name)
            configure.append(f"-D{name}={given}" if given else f"-U{name}")
        self._run(configure, "configuring")
        self._run(["cmake", "--build", str(build)], "compiling")
        self._run(["cmake", "--install", str(build)], "installing")

    def copy_extensions_to_source(self) -> None:
        # Python would prefer one that an earlier version had built for itself alone.
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            (ROOT / "unitsface_kernels" / f"_native{suffix}").unlink(missing_ok=True)
        super().copy_extensions_to_source()

    @staticmethod
    def _run(command: list[str], stage: str) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            hint = ""
            if shutil.which(os.environ.get("CXX", "c++")) is None:
                hint = " No C++ compiler was found: install g++ or clang++, or set CXX."
            sys.exit(
                f"error: {stage} the native extension failed (exit code {error.returncode})."
                f"{hint} The cause is in the CMake output above."
            )


class PackHeaders(build_py):
    """Puts the headers with which losses are compiled at run time into the package."""

    #: In the package and in the repository; unitsface_kernels/backends/native/custom finds both.
    SOURCES = ROOT / "csrc"
    HEADERS = ("cpu/*.h", "include/unitsface/*.h")

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._headers():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs + [str(target) for _, target in self._headers()]

    def _headers(self) -> list[tuple[Path, Path]]:
        folder = Path(self.build_lib) / "unitsface_kernels" / "csrc"
        sources = (path for pattern in self.HEADERS for path in self.SOURCES.glob(pattern))
        return [(path, folder / path.relative_to(self.SOURCES)) for path in sorted(sources)]


def _require_tools() -> None:
    """Exits with one line if a tool is missing."""
    missing = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    if missing:
        sys.exit(
            f"error: building the native extension needs {', '.join(missing)}: "
            f"pip install {' '.join(missing)}, or leave out --no-build-isolation"
        )


def _start_anew_if_changed(build: Path) -> None:
    """Removes a build folder of another checkout or other compilers; CMake would use its cache."""
    inputs = {
        "root": str(ROOT),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "tools": {name: os.path.realpath(shutil.which(name) or "") for name in TOOLS},
    }
    record = build / "inputs.json"
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        known = None
    if known != inputs:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        record.write_text(json.dumps(inputs, indent=1))


# Its form differs from setuptools 77 on; LICENSE is packed by both.
KNOWS_EXPRESSIONS = int(setuptools.__version__.split(".")[0]) >= 77

setup(
    **{"license_expression" if KNOWS_EXPRESSIONS else "license": "MIT"},
    ext_modules=[Extension("unitsface_kernels._native", [], py_limited_api=STABLE_ABI)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
    cmdclass={"build_ext": CMakeBuild, "build_py": PackHeaders},
)
