"""One tile of a ``sum`` loss: a launch, and its partial results added in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...losses import LossSpec
from ..streaming import SumTile
from . import launch
from .configs import Config, TileConfig, fewer_pairs
from .kernels import sum, sum_total
from .losses import SumPolicy, SumTermsPolicy, policy_of
from .scaling import set_scale
from .workspace import Workspace, operands


def is_heavy(spec: LossSpec, weighted: bool) -> bool:
    """Whether tiles take ``Config.sum_heavy``; ``weighted``: rows have upstream gradients."""
    policy = policy_of(spec)
    assert isinstance(policy, SumPolicy | SumTermsPolicy)
    return policy.heavy or spec.threshold == "per_column" or weighted


def _tile_config(spec: LossSpec, config: Config, weighted: bool) -> TileConfig:
    if not is_heavy(spec, weighted):
        return config.sum
    tile, policy = config.sum_heavy, policy_of(spec)
    if isinstance(policy, SumTermsPolicy) and policy.heavy:
        # Values and two derivatives of any formula, with two thresholds each.
        return fewer_pairs(tile)
    return tile


def most_programs(spec: LossSpec, config: Config, block: tuple[int, int]) -> int:
    """Programs of the launch for a tile of at most ``block`` pairs, without row weights."""
    tile = _tile_config(spec, config, weighted=False)
    return -(-block[0] // tile.block_m) * -(-block[1] // tile.block_n)


class Grid(NamedTuple):
    """Blocks of a launch; ``triangle``: only those on and above the diagonal have a program."""

    config: TileConfig
    row_blocks: int
    column_blocks: int
    triangle: bool

    @property
    def programs(self) -> int:
        if self.triangle:
            return self.row_blocks * (self.row_blocks + 1) // 2
        return self.row_blocks * self.column_blocks


def grid_of(space: Workspace, tile: SumTile) -> Grid:
    config = _tile_config(space.call.spec, space.config, tile.a_weights is not None)
    count, width = tile.a.shape[0], tile.b.shape[0]
    # A tile that compares a stretch of the batch with itself is its own mirror image.
    triangle = (
        tile.mirrored
        and tile.b_loss is None
        and tile.a_start == tile.b_start
        and count == width
        and config.block_m == config.block_n
    )
    return Grid(config, -(-count // config.block_m), -(-width // config.block_n), triangle)


def run(space: Workspace, tile: SumTile) -> Tensor | None:
    """See ``Engine.sum_tile``."""
    grid, gradient = grid_of(space, tile), gradient_of(space, tile)
    if tile.total:
        _add_totals(space, tile, grid, gradient)
    else:
        _add_rows(space, tile, grid, gradient)
    return gradient


def gradient_of(space: Workspace, tile: SumTile) -> Tensor | None:
    """Memory of the gradient of a tile, with its scale; None if none is wanted."""
    if not tile.gradient:
        return None
    has_thresholds = space.call.spec.threshold != "none"
    thresholds = (tile.b_threshold, tile.a_threshold) if has_thresholds else (None, None)
    set_scale(space, 1 + tile.mirrored, tile.variables, thresholds)
    return space.gradient_tile(tile.a.shape[0], tile.b.shape[0])


def _policy_of(space: Workspace, gradient: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of both kernels that follow from the loss, and where gradients go."""
    policy, params = space.sum_policy, space.params
    weights = policy.weights(params)
    arguments = (
        gradient,
        0 if gradient is None else gradient.stride(0),
        space.scale if gradient is not None else None,
        None if weights == (1.0, 1.0) else weights,
        params,
    )
    return arguments, policy.constants


def constants_of(space: Workspace, tile: SumTile, grid: Grid) -> dict[str, Any]:
    """The constants of all kernels that follow from the tile."""
    return {
        "TRIANGLE": grid.triangle,
        "BOTH": tile.b_loss is not None,
        "MIRRORED": tile.mirrored,
        "EXCLUDE": tile.diagonal is not None,
        "EPILOGUE_SUBTILES": grid.config.epilogue_subtiles,
        "PRECISION": space.precision,
    }


def _add_totals(space: Workspace, tile: SumTile, grid: Grid, gradient: Tensor | None) -> None:
    assert grid.programs <= tile.a_loss.shape[0]
    arguments, policy = _policy_of(space, gradient)
    launch.run_tile(
        sum_total.sum_total_kernel,
        grid.config,
        grid.programs,
        *operands(tile.a, tile.b),
        0 if tile.diagonal is None else tile.diagonal,
        tile.a_labels,
        tile.b_labels,
        tile.b_threshold,
        tile.a_loss,
        tile.d_threshold,
        *arguments,
        **policy,
        **constants_of(space, tile, grid),
    )


def _add_rows(space: Workspace, tile: SumTile, grid: Grid, gradient: Tensor | None) -> None:
    count, width = tile.a.shape[0], tile.b.shape[0]
    subtiles, triangle = grid.config.epilogue_subtiles, grid.triangle
    both = tile.b_loss is not None
    per_column = space.call.spec.threshold == "per_column"

    def partial(wanted: bool, blocks: int, size: int) -> Tensor | None:
        return space.empty((blocks * subtiles, size)) if wanted else None

    need_threshold = tile.d_threshold is not None
    row_loss = space.empty((grid.column_blocks * subtiles, count))
    column_loss = partial(both, grid.row_blocks, width)
    row_threshold = partial(
        need_threshold and (both or triangle or not per_column), grid.column_blocks, count
    )
    column_threshold = partial(need_threshold and per_column, grid.row_blocks, width)
    if triangle:
        # Blocks above the diagonal fill the places that those below it would have.
        column_loss = row_loss
        if per_column:
            column_threshold = row_threshold
        elif row_threshold is not None:
            # Both directions are in one place, the other one stays empty.
            row_threshold.zero_()
    arguments, policy = _policy_of(space, gradient)
    launch.run_tile(
        sum.sum_kernel,
        grid.config,
        grid.programs,
        *operands(tile.a, tile.b),
        0 if tile.diagonal is None else tile.diagonal,
        tile.a_labels,
        tile.b_labels,
        tile.a_threshold,
        tile.b_threshold,
        tile.a_weights,
        tile.b_weights,
        row_loss,
        column_loss,
        row_threshold,
        column_threshold,
        *arguments,
        **policy,
        **constants_of(space, tile, grid),
        PER_COLUMN=per_column,
    )
    tile.a_loss += row_loss.sum(0)
    if tile.b_loss is not None:
        assert column_loss is not None
        tile.b_loss += column_loss.sum(0)
    if per_column:
        _add_to(tile.d_threshold, tile.b_start, column_threshold)
        if not triangle:
            _add_to(tile.d_threshold, tile.a_start, row_threshold)
    elif tile.d_threshold is not None and row_threshold is not None:
        tile.d_threshold += row_threshold.sum()


def _add_to(total: Tensor | None, start: int, partial: Tensor | None) -> None:
    if total is not None and partial is not None:
        total[start : start + partial.shape[1]] += partial.sum(0)
