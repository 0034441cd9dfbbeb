"""Lazy import of the compiled extension; a failure is kept and reported, not raised on import."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import images

PACKAGE = Path(__file__).resolve().parents[2]


def _built(folder: Path) -> bool:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return any((folder / f"_native{suffix}").exists() for suffix in suffixes)


def _remedy() -> str:
    """Advice for an extension that cannot be imported."""
    if _built(PACKAGE):
        return "build it again here with 'pip install -e .'"
    found = (Path(entry or ".").resolve() / PACKAGE.name for entry in sys.path)
    hidden = next((folder for folder in found if folder != PACKAGE and _built(folder)), None)
    if hidden is None:
        return "build it with 'pip install -e .' in the repository"
    return (
        f"{PACKAGE} has none and hides the installed {hidden}: build it there with "
        "'pip install -e .', or start from a folder without the sources"
    )


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        _native = importlib.import_module("unitsface_kernels._native")
    except ImportError as error:
        return None, f"the compiled extension cannot be imported ({error}); {_remedy()}"
    try:
        _native.cpu.isa()
    except ValueError as error:
        return None, str(error)
    return _native, None


def extension() -> ModuleType:
    """The extension module ``unitsface_kernels._native``.

    Raises:
        RuntimeError: it is not built or cannot be loaded; includes the reason.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def failure() -> str | None:
    """Why the extension cannot be used; None if it can."""
    return _load()[1]


@functools.cache
def warn_of_fallback(reason: str) -> None:
    """Once per process and reason."""
    warnings.warn(
        f"unitsface_kernels falls back on eager PyTorch, which is slower and takes more memory: "
        f"{reason}; UNITSFACE_BACKEND=reference silences this",
        RuntimeWarning,
        stacklevel=3,
    )


def has_cuda() -> bool:
    module, _ = _load()
    return module is not None and hasattr(module, "cuda")


@functools.cache
def cuda_failure() -> str | None:
    """Why the CUDA kernels cannot be used on any device; None if they can."""
    module, reason = _load()
    if module is None:
        return reason
    if not has_cuda():
        why = getattr(module, "cuda_absence", "")
        return f"the extension was built without CUDA kernels{why and f' ({why})'}"
    count, reason = module.cuda.device_count()
    return None if count else reason


def device_failure(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be used on ``device`` (without index: the current one)."""
    reason = cuda_failure()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "Torch finds no CUDA device"
    cuda = extension().cuda
    compiled, capability = cuda.compiled_archs(), torch.cuda.get_device_capability(device)
    if not images.fits(compiled, capability):
        major, minor = capability
        return (
            f"its CUDA kernels are {images.described(compiled)}, and this device has compute "
            f"capability {major}.{minor}; build with UNITSFACE_CUDA_ARCHS={major}{minor}"
        )
    # Absent from extensions built before it.
    if not hasattr(cuda, "image_failure"):
        return None
    return _image_failure(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _image_failure(index: int) -> str | None:
    """The driver's error when it loads the kernels: it may be too old for their PTX."""
    with torch.cuda.device(index):
        reason = extension().cuda.image_failure()
    return f"its CUDA kernels cannot be loaded on this device ({reason})" if reason else None
