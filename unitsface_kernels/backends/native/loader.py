"""Lazy import of the compiled extension; a failure is kept and told, not raised on import."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # noqa: F401  (first: the extension shares the OpenMP runtime that Torch maps)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        _native = importlib.import_module("unitsface_kernels._native")
    except ImportError as error:
        return None, (
            f"the compiled extension cannot be imported ({error}); build it with "
            "'pip install -e .' in the repository"
        )
    try:
        _native.cpu.isa()
    except ValueError as error:
        return None, str(error)
    return _native, None


def extension() -> ModuleType:
    """The extension module ``unitsface_kernels._native``.

    Raises:
        RuntimeError: it is not built or cannot be loaded; says why.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def failure() -> str | None:
    """Why the extension cannot be used; None if it can."""
    return _load()[1]


def has_cuda() -> bool:
    module, _ = _load()
    return module is not None and hasattr(module, "cuda")


@functools.cache
def cuda_failure() -> str | None:
    """Why the CUDA kernels cannot be used; None if they can."""
    module, reason = _load()
    if module is None:
        return reason
    if not has_cuda():
        return "the extension was built without CUDA kernels (nvcc was not found)"
    count, reason = module.cuda.device_count()
    return None if count else reason
