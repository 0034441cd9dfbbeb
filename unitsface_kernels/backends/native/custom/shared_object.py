"""Shared objects of policies: their source, their place in the cache, and how they are loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from .... import cache as files
from ...._version import __version__
from ....losses import LossSpec
from ....policy.cpp import cpp_struct
from .compiler import TIMEOUT_S, Compiler, CompilerError

PACKAGE = Path(__file__).resolve().parents[3]
#: The folder of the headers below the package, or, in a repository, beside it.
SOURCES = "csrc"
_HEADERS = ("cpu/*.h", "include/unitsface/*.h")
#: Functions of csrc/cpu/policy_kernels.h by reduction and topology.
_KERNELS = {
    ("sum", "pair"): "sum_kernels",
    ("sum", "class"): "sum_kernels",
    ("logsumexp", "class"): "logsumexp_kernels",
    ("logsumexp", "pair"): "pair_logsumexp_kernels",
    ("logsumexps", "pair"): "pair_logsumexps_kernels",
}
_STRUCT = "Policy"
_SOURCE = """\
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"

namespace unitsface {{
inline namespace UF_ISA {{

{policy}
}}  // namespace UF_ISA
}}  // namespace unitsface

#include "cpu/shared_object.h"

UF_EXPORT({kernels}, {name})
"""


class LoadError(Exception):
    """A shared object that cannot be used; the message is one line."""


@cache
def headers() -> Path:
    """The folder of the extension's headers.

    Raises:
        CompilerError: they were not installed.
    """
    for folder in (PACKAGE / SOURCES, PACKAGE.parent / SOURCES):
        if (folder / "cpu" / "shared_object.h").exists():
            return folder
    raise CompilerError(f"the headers are missing in {PACKAGE / SOURCES}: install the package anew")


@cache
def _digest_of_headers() -> str:
    found = hashlib.sha256()
    for pattern in _HEADERS:
        for path in sorted(headers().glob(pattern)):
            found.update(f"{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def source_of(spec: LossSpec) -> str:
    """One translation unit; nothing but the policy depends on the loss."""
    assert spec.formula is not None
    kernels = _KERNELS[spec.reduction, spec.topology]
    return _SOURCE.format(policy=cpp_struct(spec.formula, _STRUCT), kernels=kernels, name=_STRUCT)


def isa_of(native: ModuleType) -> str:
    """The instruction set of the tile kernels."""
    name: str = native.cpu.isa()
    # They differ from the one below in their GEMMs.
    return "avx512" if name in ("avx512bf16", "amx") else name


def folder_names(native: ModuleType, compiler: Compiler) -> tuple[str, str]:
    """Folders below the cache's: of another version, compiler or processor, nothing is read."""
    isa = isa_of(native)
    parts = (
        *(__version__, str(native.cpu.loss_abi), isa, native.cpu.flags()),
        *(_digest_of_headers(), compiler.identity, *compiler.command),
    )
    return "policies", f"cpu-{isa}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def name_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:32] + ".so"


def load(spec: LossSpec, native: ModuleType, compiler: Compiler) -> None:
    """Makes the kernels of a loss known to the extension, compiled now or earlier.

    Raises:
        CompilerError: it cannot be compiled.
        UnsafeFolderError: the cache is not the user's alone.
        LoadError: what was compiled cannot be loaded.
    """
    source = source_of(spec)
    try:
        library = _kept(source, native, compiler)
    except OSError as error:
        warnings.warn(
            f"compiled losses are not kept, each process compiles them: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        library = _not_kept(source, native, compiler)
    _register(spec, library, native)


def _kept(source: str, native: ModuleType, compiler: Compiler) -> ctypes.CDLL:
    """The shared object in the cache, compiled if it is missing; OSError: there is no cache."""
    kept = files.private_folder(*folder_names(native, compiler)) / name_of(source)
    if not files.is_intact(kept):
        with files.only_one(kept, TIMEOUT_S):
            # Another process may have made it in the meantime.
            if not files.is_intact(kept):
                _build(source, kept, native, compiler)
    try:
        return _open(kept)
    except LoadError:
        # Whole, but of another system: a home folder that several share.
        _build(source, kept, native, compiler)
        return _open(kept)


def _not_kept(source: str, native: ModuleType, compiler: Compiler) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="unitsface_kernels-") as folder:
            made = Path(folder) / "policy.so"
            _build(source, made, native, compiler)
            return _open(made)
    except OSError as error:
        raise LoadError(f"there is no folder for the compiled loss ({error})") from None


def _build(source: str, target: Path, native: ModuleType, compiler: Compiler) -> None:
    """Compiles in a folder of its own, so that ``target`` is never half a file."""
    flags = [*native.cpu.flags().split(), f"-DUF_ISA={isa_of(native)}"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        text, made = Path(folder) / "policy.cpp", Path(folder) / "policy.so"
        text.write_text(source)
        compiler.compile(text, made, flags, (headers(), headers() / "include"))
        files.put(target, made.read_bytes())


#: Shared objects in use; the extension has pointers into them.
_loaded: list[ctypes.CDLL] = []


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        abi, kernels = library.unitsface_abi, library.unitsface_loss
    except (OSError, AttributeError) as error:
        raise LoadError(f"the compiled loss cannot be loaded ({error})") from None
    abi.restype = ctypes.c_int64
    kernels.restype, kernels.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return library


def _register(spec: LossSpec, library: ctypes.CDLL, native: ModuleType) -> None:
    if library.unitsface_abi() != native.cpu.loss_abi:
        raise LoadError(f"the headers in {headers()} are not those of the extension: build it anew")
    native.cpu.register_loss(spec.name, library.unitsface_loss(native.cpu.pool()))
    _loaded.append(library)
