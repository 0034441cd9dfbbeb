"""Random numbers by key and place, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...draws import LOW_32, mix_32
from . import launch
from .configs import RANGE, VECTOR
from .kernels.draws import centered_kernel, distinct_kernel, positions_kernel

#: Labels that the single program of ``distinct`` takes; more are sorted once more instead.
MOST_LABELS = 1 << 14


def centered(seed: int, draw: Tensor, first: int, count: int) -> Tensor:
    """See ``draws.centered``."""
    found = draw.new_empty(count, dtype=torch.float64)
    with launch.on_device_of(draw):
        launch.run(
            centered_kernel,
            -(-count // VECTOR.block),
            draw,
            mix_32(seed & LOW_32),
            first,
            found,
            count,
            BLOCK=VECTOR.block,
            num_warps=VECTOR.num_warps,
        )
    return found


def distinct(places: Tensor, size: int) -> Tensor:
    """(N,) ascending ``places``, each once, without those from ``size`` on, which follow."""
    found = torch.empty_like(places)
    with launch.on_device_of(places):
        launch.run(
            distinct_kernel,
            1,
            places,
            found,
            places.shape[0],
            size,
            BLOCK=RANGE.block,
            num_warps=RANGE.num_warps,
        )
    return found


def positions(index: Tensor, labels: Tensor) -> Tensor:
    """(N,) places of ``labels`` (N,) in ``index`` (K,), ascending; below 0 as they are."""
    labels, found = (
        labels.contiguous(),
        torch.empty(labels.shape, dtype=torch.int64, device=labels.device),
    )
    with launch.on_device_of(labels):
        launch.run(
            positions_kernel,
            -(-labels.shape[0] // VECTOR.block),
            labels,
            index,
            found,
            labels.shape[0],
            index.shape[0],
            index.shape[0].bit_length(),
            BLOCK=VECTOR.block,
            num_warps=VECTOR.num_warps,
        )
    return found
