"""The CUDA kernels of the extension as a module that runs them on the CPU (csrc/cuda/emulation)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.gpu_model.fused_sm80 import write_losses
from unitsface_kernels.backends import native
from unitsface_kernels.backends.native import engine as native_engine
from unitsface_kernels.backends.native.cuda_engine import CudaEngine
from unitsface_kernels.backends.native.fused_engine import FusedEngine
from unitsface_kernels.backends.streaming import Call
from unitsface_kernels.cache import only_one, private_folder

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
EMULATION = SOURCES / "cuda" / "emulation"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


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
    return None


def require_tools() -> None:
    """Skips a test that compiles kernels as C++ where that is not possible."""
    if compiler() is None or cuda_headers() is None or os.uname().sysname != "Linux":
        pytest.skip("needs a C++ compiler, CUDA's headers and Linux")


def build_program(folder: Path, test: str, *kernels: str, losses: Sequence[str] = ()) -> Path:
    """``emulation/test_<test>.cpp`` with kernels, paths in csrc/cuda; accesses out of bounds or
    out of alignment end it. ``losses``: those that have kernels; none: all.

    It is compiled in ``folder``, once for all tests of a run, and kept in the cache folder.
    """
    flags = [
        *SANITIZE,
        *("-O1", "-std=c++17", "-Wno-psabi"),
        *(f"-I{SOURCES}", f"-I{SOURCES / 'include'}"),
        *("-isystem", f"{cuda_headers()}"),
        *("-include", f"{EMULATION / 'cuda_emulation.h'}", "-x", "c++"),
    ]
    parts = (test, kernels, tuple(losses), flags, compiler(), _digest_of_sources())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    program = private_folder("emulated") / f"{test}-{digest}"
    with only_one(program, seconds=600.0):
        if program.exists():
            return program
        if losses:
            write_losses(folder / "unitsface", losses)
        sources = [EMULATION / f"test_{test}.cpp", *(SOURCES / "cuda" / name for name in kernels)]
        objects = [folder / f"{source.stem}.o" for source in sources]
        compilations = [
            subprocess.Popen([f"{compiler()}", f"-I{folder}", *flags, "-c", source, "-o", target])
            for source, target in zip(sources, objects, strict=True)
        ]
        assert [process.wait() for process in compilations] == [0] * len(sources)
        linked = program.with_name(f"{program.name}.part")
        subprocess.run([f"{compiler()}", *SANITIZE, *objects, "-o", linked], check=True)
        os.replace(linked, program)
    return program


@cache
def _digest_of_sources() -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in SOURCES.rglob("*") if p.is_file()):
        found.update(f"{path}\n".encode() + path.read_bytes())
    return found.hexdigest()


def build_extension(folder: Path, sanitize: bool = False) -> Path:
    """Compiles the bindings with ``cuda`` and the emulated kernels; about a minute of a core, with
    sanitizers of the kernels three."""
    generated = folder / "include" / "unitsface"
    generated.mkdir(parents=True)
    (generated / "cuda_absence.h").write_text('#define UF_CUDA_ABSENCE ""\n')
    flags = [
        *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w"),
        *("-DUF_WITH_CUDA", "-DUF_WITH_SM90"),
        f"-I{folder / 'include'}",
        f"-I{SOURCES}",
        f"-I{SOURCES / 'include'}",
        *("-isystem", f"{cuda_headers()}"),
        *("-isystem", sysconfig.get_path("include")),
    ]
    emulated = ["-O1", "-include", f"{EMULATION / 'cuda_emulation.h'}", "-x", "c++"]
    emulated += SANITIZE if sanitize else ()
    kernels = [path for path in (SOURCES / "cuda").glob("*.cu") if path.stem != "device"]
    kernels += (SOURCES / "cuda" / "fused").glob("*.cu")
    plain = [SOURCES / f"{name}.cpp" for name in ("module", "arguments", "fused")]
    plain.append(EMULATION / "extension.cpp")

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
    link = [str(compiler()), "-shared", *(SANITIZE if sanitize else ())]
    link += [*map(str, objects), "-o", str(library)]
    subprocess.run(link, check=True)
    return library


def shared_extension(factory: pytest.TempPathFactory) -> ModuleType:
    """The module, compiled once for all processes of a run of the tests."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "emulated"
    folder.mkdir(exist_ok=True)
    library = folder / "_native.so"
    with only_one(library, seconds=600.0):
        if not library.exists():
            build = folder / "build"
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir()
            os.replace(build_extension(build), library)
    return load(library)


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated._native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized() -> dict[str, str]:
    """The environment of a Python that loads an extension with sanitizers."""
    root = SOURCES.parent
    libraries = [
        subprocess.run(
            [f"{compiler()}", f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": f"{root}:{root / 'python_tests'}",
    }


class _OnCpu(CudaEngine):
    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        # The CPU has no products of 16 bits into float32.
        return torch.mm(left.float(), right.float(), out=out)


class EmulatedEngine(_OnCpu):
    """Products by Torch, the emulated kernels on them."""


class EmulatedFusedEngine(_OnCpu, FusedEngine):
    """The emulated fused kernels."""


class EmulatedHopperEngine(EmulatedFusedEngine):
    """Kernels of sm_90a where there are any."""

    def __init__(self, call: Call | None) -> None:
        super().__init__(call)
        self._suffix = "_sm90"


@contextmanager
def fused_kernels(module: ModuleType, hopper: bool = False) -> Iterator[None]:
    """Inside, native calls on CPU tensors run the fused kernels of the emulated extension;
    ``hopper``: those of sm_90a where there are any."""
    engine = EmulatedHopperEngine if hopper else EmulatedFusedEngine
    with ExitStack() as stack:
        for target, name, value in (
            (native_engine, "extension", lambda: module),
            (native, "make_engine", lambda call, *_: engine(call)),
            (torch.cuda, "device", lambda _: nullcontext()),
            (torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield
