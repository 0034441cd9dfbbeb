"""Tiles of ``logsumexp`` losses: statistics of the negatives, and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, launch
from .kernels import logsumexp
from .workspace import Workspace, operands


def statistics(
    space: Workspace,
    a: Tensor,
    b: Tensor,
    targets: Tensor,
    start: int,
    maximum: Tensor,
    total: Tensor,
    target_cosine: Tensor,
) -> None:
    """See ``Engine.logsumexp_tile``."""
    config = space.config.statistics
    count, width = a.shape[0], b.shape[0]
    row_blocks = -(-count // config.block_m)
    column_blocks = -(-width // config.block_n)
    stretches = column_blocks * config.parts
    stretch_maximum, stretch_total = (
        space.empty((stretches, count)),
        space.empty((stretches, count)),
    )
    launch.run_product(
        logsumexp.statistics_kernel,
        config,
        row_blocks * column_blocks,
        *operands(a, b),
        targets,
        start,
        stretch_maximum,
        stretch_total,
        target_cosine,
        space.call.params,
        NEGATIVE=space.logsumexp_policy.negative,
        PARTS=config.parts,
        PRECISION=space.precision,
    )
    merge = configs.MERGE
    launch.run(
        logsumexp.merge_kernel,
        -(-count // merge.rows),
        stretch_maximum,
        stretch_total,
        maximum,
        total,
        stretches,
        count,
        ROWS=merge.rows,
        BLOCK=merge.block,
        num_warps=merge.num_warps,
    )


def positive_rows(space: Workspace, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
    """See ``Engine.positive_rows``."""
    target_cosine = target_cosine.contiguous()
    logits, slopes = torch.empty_like(target_cosine), torch.empty_like(target_cosine)
    count = target_cosine.numel()
    launch.run(
        logsumexp.positive_kernel,
        -(-count // configs.VECTOR.block),
        target_cosine,
        logits,
        slopes,
        count,
        space.call.params,
        POSITIVE=space.logsumexp_policy.positive,
        BLOCK=configs.VECTOR.block,
        num_warps=configs.VECTOR.num_warps,
    )
    return logits, slopes


def gradient(
    space: Workspace,
    a: Tensor,
    b: Tensor,
    targets: Tensor,
    start: int,
    log_negatives: Tensor,
    negative_weight: Tensor,
    target_gradient: Tensor,
) -> Tensor:
    """See ``Engine.logsumexp_gradient_tile``."""
    policy, config = space.logsumexp_policy, space.config.gradient
    count, width = a.shape[0], b.shape[0]
    tile = space.gradient_tile(count, width)
    space.set_scale(space.call.spec.slope_bound(space.call.params), target_gradient)
    launch.run_product(
        logsumexp.gradient_kernel,
        config,
        -(-count // config.block_m) * -(-width // config.block_n),
        *operands(a, b),
        targets,
        start,
        log_negatives,
        negative_weight,
        target_gradient,
        tile,
        tile.stride(0),
        space.scale,
        space.call.params,
        NEGATIVE=policy.negative,
        PRECISION=space.precision,
    )
    return tile
