"""Which backend runs a call, and what to say when the one asked for cannot."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from .validate import choice

BACKENDS = ("reference", "native", "triton")


def load(name: str) -> ModuleType:
    return importlib.import_module(f".backends.{name}", __package__)


def unavailable(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot run ``dtype`` tensors on ``device_type``; None if it can."""
    return load(name).unavailable(device_type, dtype)


def _usable(device_type: str, dtype: torch.dtype) -> Iterator[str]:
    # Lazy: "auto" imports no backend that is slower than the one it takes.
    return (n for n in _preference(device_type) if unavailable(n, device_type, dtype) is None)


def available(device_type: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that can run such tensors here, fastest first."""
    return list(_usable(device_type, dtype))


def _preference(device_type: str) -> tuple[str, ...]:
    # CPU: native is ahead of the reference for pairs of any number; for class softmaxes within 15 %
    # of it up to some thousand pairs and ahead beyond (bench/results/crossover.json): not worth
    # another backend's rounding and limits at some sizes. Triton there is only an interpreter.
    # CUDA: not measured yet, see bench/results/README.md.
    if device_type == "cuda":
        return ("triton", "native", "reference")
    return ("native", "reference", "triton")


# The answer depends on the installation alone, so torch.compile may bake it in.
@torch.compiler.assume_constant_result
def resolve(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs a call.

    Raises:
        ValueError: unknown name, or a named backend that cannot run the call. There is no
            fallback from a backend asked for by name.
    """
    choice("backend", backend, ("auto", *BACKENDS))
    if backend == "auto":
        backend = os.environ.get("UNITSFACE_BACKEND", "auto")
        choice("UNITSFACE_BACKEND", backend, ("auto", *BACKENDS))
    if backend == "auto":
        return next(_usable(device_type, dtype))
    reason = unavailable(backend, device_type, dtype)
    if reason is not None:
        others = ", ".join(available(device_type, dtype))
        raise ValueError(
            f"backend {backend!r} cannot run {dtype} tensors on {device_type}: {reason}; "
            f"available here: {others}"
        )
    return backend
