"""Moving statistics of the norms of rows, in two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dense import dense
from . import configs, launch
from .kernels import norms


@torch.no_grad()
def norm_sums(feats: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    """See ``backends/norms.py``."""
    count, width = feats.shape
    config = configs.rows(width)
    parts = -(-count // config.rows)
    if not parts:
        return feats.new_zeros((1, 3), dtype=torch.float64)
    sums = feats.new_empty((parts, 3), dtype=torch.float64)
    with launch.on_device_of(feats):
        launch.run(
            norms.norm_sums_kernel,
            parts,
            dense(feats.detach()),
            dense(labels),
            sums,
            count,
            width,
            LOW=low,
            HIGH=high,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return sums


@torch.no_grad()
def moved_statistics(sums: Tensor, mean: Tensor, std: Tensor, share: float) -> Tensor:
    """See ``backends/norms.py``; ``mean`` and ``std`` are float32."""
    found = mean.new_empty(2)
    with launch.on_device_of(sums):
        launch.run(
            norms.moved_statistics_kernel,
            1,
            sums,
            mean,
            std,
            found,
            len(sums),
            SHARE=share,
            BLOCK=configs.RANGE.block,
            num_warps=configs.RANGE.num_warps,
        )
    return found
