"""One tile of a ``sum`` loss: a launch, and its partial results added in a fixed order."""

from __future__ import annotations

from torch import Tensor

from ...losses import LossSpec
from ..streaming import SumTile
from . import launch
from .kernels import sum
from .losses import POLICIES, SumPolicy
from .workspace import Workspace, operands


def is_heavy(spec: LossSpec, weighted: bool) -> bool:
    """Whether tiles take ``Config.sum_heavy``; ``weighted``: rows have upstream gradients."""
    policy = POLICIES[spec.name]
    assert isinstance(policy, SumPolicy)
    return policy.heavy or spec.threshold == "per_column" or weighted


def run(space: Workspace, tile: SumTile) -> Tensor | None:
    """See ``Engine.sum_tile``."""
    policy, per_column = space.sum_policy, space.call.spec.threshold == "per_column"
    heavy = is_heavy(space.call.spec, tile.a_weights is not None)
    config = space.config.sum_heavy if heavy else space.config.sum
    count, width = tile.a.shape[0], tile.b.shape[0]
    row_blocks = -(-count // config.block_m)
    column_blocks = -(-width // config.block_n)
    both = tile.b_loss is not None
    # A tile that compares a stretch of the batch with itself is its own mirror image.
    triangle = (
        tile.mirrored
        and not both
        and tile.a_start == tile.b_start
        and count == width
        and config.block_m == config.block_n
    )
    programs = row_blocks * column_blocks
    if triangle:
        programs = row_blocks * (row_blocks + 1) // 2

    def partial(wanted: bool, blocks: int, size: int) -> Tensor | None:
        return space.empty((blocks * config.epilogue_subtiles, size)) if wanted else None

    need_threshold = tile.d_threshold is not None
    row_loss = space.empty((column_blocks * config.epilogue_subtiles, count))
    column_loss = partial(both, row_blocks, width)
    row_threshold = partial(
        need_threshold and (both or triangle or not per_column), column_blocks, count
    )
    column_threshold = partial(need_threshold and per_column, row_blocks, width)
    if triangle:
        # Blocks above the diagonal fill the places that those below it would have.
        column_loss = row_loss
        if per_column:
            column_threshold = row_threshold
        elif row_threshold is not None:
            # Both directions are in one place, the other one stays empty.
            row_threshold.zero_()
    gradient = None
    if tile.gradient:
        gradient = space.gradient_tile(count, width)
        space.set_scale((1 + tile.mirrored) * space.call.spec.slope_bound(space.call.params))
    launch.run_tile(
        sum.sum_kernel,
        config,
        programs,
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
        gradient,
        0 if gradient is None else gradient.stride(0),
        space.scale if tile.gradient else None,
        space.call.params,
        EVALUATE=policy.evaluate,
        TRIANGLE=triangle,
        BOTH=both,
        MIRRORED=tile.mirrored,
        EXCLUDE=tile.diagonal is not None,
        PER_COLUMN=per_column,
        EPILOGUE_SUBTILES=config.epilogue_subtiles,
        PRECISION=space.precision,
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
    return gradient


def _add_to(total: Tensor | None, start: int, partial: Tensor | None) -> None:
    if total is not None and partial is not None:
        total[start : start + partial.shape[1]] += partial.sum(0)
