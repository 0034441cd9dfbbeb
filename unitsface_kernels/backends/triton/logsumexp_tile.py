"""Tiles of ``logsumexp`` losses: statistics of the negatives, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..streaming import ClassSums, ClassTile, ClassWeights, NegativeSums
from ..streaming.shards import ELSEWHERE
from . import configs, launch
from .kernels import logsumexp
from .scaling import set_scale
from .variables import Given, counts
from .workspace import Workspace, operands


def statistics(space: Workspace, tile: ClassTile, rows: ClassSums) -> None:
    """See ``Engine.logsumexp_tile``."""
    config = space.config.class_statistics(given=not tile.b.shape[1])
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
        *_values(tile),
        space.params,
        **_constants(space, tile),
        EPILOGUE_SUBTILES=config.epilogue_subtiles,
        PRECISION=space.precision,
    )
    merge(maximum, total, rows, folds=False)


def merge(
    maximum: Tensor, total: Tensor, sums: ClassSums | NegativeSums, folds: bool = True
) -> None:
    """Folds (stretches, N) partial maxima and totals into ``sums``, in order, or replaces them."""
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
        FOLDS=folds,
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
        # All shards together have the target of every row that takes part.
        0 if call.shards is None else ELSEWHERE,
        space.params,
        POSITIVE=space.logsumexp_policy.positive,
        BLOCK=configs.VECTOR.block,
        num_warps=configs.VECTOR.num_warps,
    )
    return losses, state


def gradient(space: Workspace, tile: ClassTile, rows: ClassWeights) -> Tensor:
    """See ``Engine.logsumexp_gradient_tile``."""
    config = space.config.gradient
    if tile.selection is not None or not space.logsumexp_policy.linear:
        # Places of rows take registers, and so does a formula that is more than a multiplication.
        config = replace(config, max_registers=None)
    if tile.variables is not None:
        # Derivatives by them, for every pair of the block at once.
        config = replace(config, max_registers=None, block_n=config.block_n // 2)
    count, width = tile.a.shape[0], tile.b.shape[0]
    row_blocks, column_blocks = -(-count // config.block_m), -(-width // config.block_n)
    result = space.gradient_tile(count, width)
    sums = _partial_sums(space, tile, row_blocks, column_blocks)
    set_scale(space, 1, tile.variables, target_gradient=rows.target)
    launch.run_tile(
        logsumexp.gradient_kernel,
        config,
        row_blocks * column_blocks,
        *operands(tile.a, tile.b),
        tile.b_factors,
        tile.targets,
        tile.start,
        *rows,
        result,
        result.stride(0),
        space.scale,
        *(tile.selection or (None, None)),
        *_values(tile),
        *sums,
        space.params,
        **_constants(space, tile),
        PRECISION=space.precision,
    )
    _add_sums(tile, *sums)
    return result


def _values(tile: ClassTile) -> tuple[Tensor | int | None, ...]:
    """Variables as kernels of one direction take them."""
    given = Given.of(tile.variables)
    rows, columns = (given.a_rows, given.row_stride), (given.b_columns, given.column_stride)
    return given.scalars, *rows, *columns


def _constants(space: Workspace, tile: ClassTile) -> dict[str, Any]:
    """Constants of both kernels that follow from the loss."""
    policy = space.logsumexp_policy
    return {"NEGATIVE": policy.negative, "LINEAR": policy.linear, **counts(tile.variables)}


def _partial_sums(
    space: Workspace, tile: ClassTile, row_blocks: int, column_blocks: int
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the negatives' derivatives by variables: by row, and by column."""
    found = tile.d_variables
    if found is None:
        return None, None
    rows, columns = len(found.scalars) + len(found.a_rows), len(found.b_columns)
    by_row = space.empty((rows, column_blocks, len(tile.a))) if rows else None
    wanted = columns and found.b_columns.shape[1]
    return by_row, space.empty((columns, row_blocks, len(tile.b))) if wanted else None


def _add_sums(tile: ClassTile, by_row: Tensor | None, by_column: Tensor | None) -> None:
    found = tile.d_variables
    if found is None:
        return
    if by_row is not None:
        sums = by_row.sum(1)
        found.scalars.add_(sums[: len(found.scalars)])
        found.a_rows.add_(sums[len(found.scalars) :])
    if by_column is not None:
        found.b_columns.add_(by_column.sum(1))
