"""The CUDA kernels of the extension as a module that runs them on the CPU (csrc/cuda/emulation)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
EMULATION = SOURCES / "cuda" / "emulation"


def cuda_headers() -> Path | None:
    """Folder of ``cuda_fp16.h``."""
    roots = [Path(home) for home in [os.environ.get("CUDA_HOME")] if home]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parent.parent)
    roots.append(Path("/usr/local/cuda"))
    folders = [root / "include" for root in roots]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def missing() -> str | None:
    """Why nothing can be emulated here; None if it can."""
    if compiler() is None or cuda_headers() is None or os.uname().sysname != "Linux":
        return "needs a C++ compiler, CUDA's headers and Linux"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return None


def require_tools() -> None:
    """Skips a test that compiles kernels as C++ where that is not possible."""
    if compiler() is None or cuda_headers() is None or os.uname().sysname != "Linux":
        pytest.skip("needs a C++ compiler, CUDA's headers and Linux")


def build_program(folder: Path, test: str, *kernels: str) -> Path:
    """``emulation/test_<test>.cpp`` with kernels, paths in csrc/cuda; accesses out of bounds or
    out of alignment end it."""
    flags = [
        *(
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
            "-O1",
            "-std=c++17",
            "-Wno-psabi",
        ),
        *(f"-I{SOURCES}", f"-I{SOURCES / 'include'}", "-isystem", f"{cuda_headers()}"),
        *("-include", f"{EMULATION / 'cuda_emulation.h'}", "-x", "c++"),
    ]
    sources = [EMULATION / f"test_{test}.cpp", *(SOURCES / "cuda" / name for name in kernels)]
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilations = [
        subprocess.Popen([f"{compiler()}", *flags, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in compilations] == [0] * len(sources)
    program = folder / "test"
    sanitize = flags[:2]
    subprocess.run([f"{compiler()}", *sanitize, *objects, "-o", program], check=True)
    return program


def build_extension(folder: Path) -> ModuleType:
    """Compiles the bindings with ``cuda`` and the emulated kernels; about a minute of a core."""
    import pybind11

    generated = folder / "include" / "unitsface"
    generated.mkdir(parents=True)
    (generated / "cuda_absence.h").write_text('#define UF_CUDA_ABSENCE ""\n')
    flags = [
        *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w", "-DUF_WITH_CUDA"),
        # pybind11 knows a type by its name, in all modules of a process.
        "-Dunitsface=unitsface_emulated",
        f"-I{folder / 'include'}",
        f"-I{SOURCES}",
        f"-I{SOURCES / 'include'}",
        *("-isystem", f"{cuda_headers()}"),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
    ]
    emulated = ["-O1", "-include", f"{EMULATION / 'cuda_emulation.h'}", "-x", "c++"]
    kernels = [path for path in (SOURCES / "cuda").glob("*.cu") if path.stem != "device"]
    plain = [SOURCES / "module.cpp", SOURCES / "arguments.cpp", EMULATION / "extension.cpp"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        options = emulated if source.suffix == ".cu" else ["-O0"]
        command = [str(compiler()), *flags, *options, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compiled, [*kernels, *plain]))
    library = folder / "_native.so"
    link = [str(compiler()), "-shared", *map(str, objects), "-o", str(library)]
    subprocess.run(link, check=True)
    spec = importlib.util.spec_from_file_location("emulated._native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
