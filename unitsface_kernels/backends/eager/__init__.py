"""Tiles in operations of Torch, for losses that are a formula and have no compiled kernels."""

from __future__ import annotations

import functools
import warnings

from .engine import EagerEngine


@functools.cache
def warn(loss: str, reason: str) -> None:
    """Once per process, loss and reason."""
    warnings.warn(
        f"loss {loss} runs in operations of Torch, tile by tile: without the N x M matrix, but "
        f"several times slower than compiled kernels; {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


__all__ = ["EagerEngine", "warn"]
