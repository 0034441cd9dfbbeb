"""The backend that runs a call, and the error where the named one cannot."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

from .backends.histogram import ReferenceScores, ScoreEngine
from .backends.native import DTYPES, loader
from .backends.native import score_engine as score_kernels
from .validate import choice

BACKENDS = ("reference", "native", "triton")
_NAMES = "auto", *BACKENDS
#: "cuda" without an index is the current device.
Device = torch.device | str


@cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f".backends.{name}", __package__)


def unavailable(name: str, device: Device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot run ``dtype`` tensors on ``device``; None if it can."""
    return load(name).unavailable(device, dtype)


def available(device: Device, dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that can run such tensors here, fastest first."""
    return [name for name in _preference(device) if unavailable(name, device, dtype) is None]


def _preference(device: Device) -> tuple[str, ...]:
    # CPU: native is ahead of the reference for pairs of any number; for class softmaxes within 15 %
    # of it up to some thousand pairs and ahead beyond (bench/results/crossover.json): not worth
    # another backend's rounding and limits at some sizes. Triton there is only an interpreter.
    # CUDA: not measured yet, see bench/results/README.md.
    if torch.device(device).type == "cuda":
        return ("triton", "native", "reference")
    return ("native", "reference", "triton")


def meant_for_kernels(device: Device, dtype: torch.dtype) -> bool:
    """Whether a backend other than the reference has kernels for such tensors at all."""
    return torch.device(device).type in ("cpu", "cuda") and dtype in DTYPES


def why_reference(device: Device, dtype: torch.dtype) -> str | None:
    """Why "auto" takes the reference for tensors that the kernels are meant for; else None."""
    if not meant_for_kernels(device, dtype):
        return None
    names = _preference(device)
    reasons = {n: unavailable(n, device, dtype) for n in names[: names.index("reference")]}
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def resolve(backend: str, device: Device, dtype: torch.dtype) -> str:
    """The backend that runs a call with ``dtype`` tensors on ``device``.

    "auto" is the fastest that can, or the environment variable ``UNITSFACE_BACKEND``. If
    that is the reference because no kernels work, a RuntimeWarning gives the reason, once per
    process.

    Raises:
        ValueError: unknown name, or a named backend that cannot run the call. There is no
            fallback from a backend that is named.
    """
    if torch.compiler.is_compiling():
        # Imported here, as it needs Dynamo, which takes longer to import than Torch.
        from .compiled import constant

        # The answer depends on the installation alone.
        return constant(resolve_eagerly, backend, device, dtype)
    return resolve_eagerly(backend, device, dtype)


def resolve_eagerly(backend: str, device: Device, dtype: torch.dtype) -> str:
    """:func:`resolve` where nothing is being compiled."""
    choice("backend", backend, _NAMES)
    if backend == "auto":
        backend = os.environ.get("UNITSFACE_BACKEND", "auto")
        choice("UNITSFACE_BACKEND", backend, _NAMES)
    if backend == "auto":
        # Imports no backend that is slower than the one it takes.
        for backend in _preference(device):
            if unavailable(backend, device, dtype) is None:
                break
        reason = why_reference(device, dtype) if backend == "reference" else None
        if reason is not None:
            loader.warn_of_fallback(reason)
        return backend
    reason = unavailable(backend, device, dtype)
    if reason is not None:
        others = ", ".join(available(device, dtype))
        raise ValueError(
            f"backend {backend!r} cannot run {dtype} tensors on {device}: {reason}; "
            f"available here: {others}"
        )
    return backend


# --- device work outside the losses ---------------------------------------------------------------

#: Backends that count scores.
SCORES = ("native", "reference")


def score_engine(backend: str, device: torch.device, dtype: torch.dtype) -> ScoreEngine:
    """Implementation of scores and their counts for ``dtype`` features.

    ``backend`` is resolved as in :func:`resolve`.

    ``UNITSFACE_BACKEND`` overrides "auto" if it names one of ``SCORES``; "triton" does not.
    """
    choice("backend", backend, ("auto", *SCORES))
    if backend == "auto":
        backend = os.environ.get("UNITSFACE_BACKEND", "auto")
    if backend not in SCORES:
        reason = unavailable("native", device, dtype)
        backend = "native" if reason is None else "reference"
        if reason is not None and meant_for_kernels(device, dtype):
            loader.warn_of_fallback(f"native: {reason}")
    found = resolve(backend, device, dtype)
    return score_kernels(device) if found == "native" else ReferenceScores(device)


def row_kernels(device: torch.device) -> ModuleType | None:
    """Kernels on rows by index, ``backends/native/rows.py``; None: Torch operations do the work."""
    if unavailable("native", device, torch.float32) is None:
        return load("native.rows")
    reason = loader.failure()
    if reason is not None and device.type in ("cpu", "cuda"):
        loader.warn_of_fallback(reason)
    return None


def norm_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Kernels in place of ``backends/norms.py``; None: there are none."""
    return load("triton.norms") if _has_triton(device, dtype) else None


def draw_kernels(device: torch.device) -> ModuleType | None:
    """Kernels of random numbers, ``backends/triton/draws.py``; None: Torch operations do."""
    return load("triton.draws") if _has_triton(device, torch.float32) else None


def _has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return unavailable("triton", device, dtype) is None
