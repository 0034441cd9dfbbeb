"""Random numbers by key and place, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...draws import LOW_32, mix_32
from . import launch
from .configs import VECTOR
from .kernels.draws import centered_kernel


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
