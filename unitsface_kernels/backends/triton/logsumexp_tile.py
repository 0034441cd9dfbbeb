"""Tiles of ``logsumexp`` losses: statistics of the negatives, and gradients."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..streaming import ClassSums, ClassTile, ClassWeights, NegativeSums
from ..streaming.shards import ELSEWHERE
from . import configs, launch
from .kernels import logsumexp
from .workspace import Workspace, operands


def statistics(space: Workspace, tile: ClassTile, rows: ClassSums) -> None:
    """See ``Engine.logsumexp_tile``."""
    config = space.config.statistics
    count, width = tile.a.shape[0], tile.b.shape[0]
    row_blocks = -(-count // config.block_m)
    column_blocks = -(-width // config.block_n)
    maximum, total = space.partial_sums(column_blocks, count)
    launch.run_tile(
        logsumexp.statistics_kernel,
        config,
        row_blocks * column_blocks,
        *operands(tile.a, tile.b),
        tile.b_factors,
        tile.targets,
        tile.start,
        maximum,
        total,
        rows.target_cosine,
        space.call.kernel_params,
        NEGATIVE=space.logsumexp_policy.negative,
        LINEAR=space.logsumexp_policy.linear,
        EPILOGUE_SUBTILES=config.epilogue_subtiles,
        PRECISION=space.precision,
    )
    merge(maximum, total, rows)


def merge(maximum: Tensor, total: Tensor, sums: ClassSums | NegativeSums) -> None:
    """Folds (stretches, N) partial maxima and totals into ``sums``, in order."""
    stretches, count = maximum.shape
    config = configs.MERGE
    launch.run(
        logsumexp.merge_kernel,
        -(-count // config.rows),
        maximum,
        total,
        sums.maximum,
        sums.total,
        stretches,
        count,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def finish_rows(space: Workspace, sums: ClassSums) -> tuple[Tensor, Tensor]:
    """See ``Engine.finish_rows``."""
    call = space.call
    parts, count = sums.maximum.shape
    losses, state = space.empty(count), space.empty((3, count))
    launch.run(
        logsumexp.finish_rows_kernel,
        -(-count // configs.VECTOR.block),
        *sums,
        call.row_labels,
        losses,
        state,
        parts,
        count,
        # Of shards together every row that takes part has its target.
        0 if call.shards is None else ELSEWHERE,
        call.kernel_params,
        POSITIVE=space.logsumexp_policy.positive,
        BLOCK=configs.VECTOR.block,
        num_warps=configs.VECTOR.num_warps,
    )
    return losses, state


def gradient(space: Workspace, tile: ClassTile, rows: ClassWeights) -> Tensor:
    """See ``Engine.logsumexp_gradient_tile``."""
    policy, config = space.logsumexp_policy, space.config.gradient
    if tile.selection is not None:
        # Places of rows take registers.
        config = replace(config, max_registers=None)
    count, width = tile.a.shape[0], tile.b.shape[0]
    result = space.gradient_tile(count, width)
    space.set_scale(space.call.spec.slope_bound(space.call.params), rows.target)
    launch.run_tile(
        logsumexp.gradient_kernel,
        config,
        -(-count // config.block_m) * -(-width // config.block_n),
        *operands(tile.a, tile.b),
        tile.b_factors,
        tile.targets,
        tile.start,
        *rows,
        result,
        result.stride(0),
        space.scale,
        *(tile.selection or (None, None)),
        space.call.kernel_params,
        NEGATIVE=policy.negative,
        LINEAR=policy.linear,
        PRECISION=space.precision,
    )
    return result
