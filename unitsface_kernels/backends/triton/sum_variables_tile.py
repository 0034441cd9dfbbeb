"""One tile of a ``sum`` loss whose formula reads variables, see ``sum_tile.py``."""

from __future__ import annotations

from torch import Tensor

from ..streaming import SumTile
from . import launch
from .kernels import sum_variables
from .sum_tile import constants_of, gradient_of, grid_of
from .variables import Given, Sums, counts
from .workspace import Workspace, operands


def run(space: Workspace, tile: SumTile) -> Tensor | None:
    """See ``Engine.sum_tile``."""
    grid, values, threshold = grid_of(space, tile), tile.variables, space.call.spec.threshold
    assert values is not None
    slopes = tile.d_threshold is not None or tile.d_variables is not None
    scalars, rows, columns = 0, 1, 0
    if slopes:
        # Thresholds come before variables, losses before those of rows.
        scalars = len(values.scalars) + (threshold == "scalar")
        rows += len(values.a_rows)
        columns = len(values.b_columns) + (threshold == "per_column")
    sums = Sums.of(
        space,
        (grid.config, grid.programs),
        (len(tile.a), len(tile.b)),
        (scalars, rows, columns),
        tile.b_loss is not None,
        grid.triangle,
    )
    gradient = gradient_of(space, tile)
    launch.run_tile(
        sum_variables.sum_variables_kernel,
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
        *Given.of(values),
        *sums,
        gradient,
        0 if gradient is None else gradient.stride(0),
        space.scale if gradient is not None else None,
        space.params,
        PAIR=space.terms_policy.term,
        **counts(values),
        ONE_THRESHOLD=threshold == "scalar",
        PER_COLUMN=threshold == "per_column",
        SLOPES=slopes,
        **constants_of(space, tile, grid),
    )
    _add(sums, tile, threshold, grid.triangle)
    return gradient


def _add(sums: Sums, tile: SumTile, threshold: str, triangle: bool) -> None:
    """Adds up partial sums in a fixed order."""
    found = tile.d_variables
    scalars = None if sums.scalars is None else sums.scalars.sum(1)
    if scalars is not None and threshold == "scalar":
        if tile.d_threshold is not None:
            tile.d_threshold += scalars[:1]
        scalars = scalars[1:]
    if found is not None and scalars is not None:
        found.scalars.add_(scalars)
    per_column = tile.d_threshold if threshold == "per_column" else None
    assert sums.a_rows is not None
    own = (None, None) if found is None else (found.a_rows, found.b_columns)
    _add_direction(tile.a_loss, sums.a_rows, sums.b_columns, own, (per_column, tile.b_start))
    if tile.b_loss is not None and not triangle:
        assert sums.b_rows is not None
        other = (None, None) if found is None else (found.b_rows, found.a_columns)
        _add_direction(tile.b_loss, sums.b_rows, sums.a_columns, other, (per_column, tile.a_start))


def _add_direction(
    loss: Tensor,
    of_rows: Tensor,
    of_columns: Tensor | None,
    found: tuple[Tensor | None, Tensor | None],
    threshold: tuple[Tensor | None, int],
) -> None:
    """Adds up what pairs taken in one direction give.

    Args:
        loss: of the rows of the direction.
        of_rows, of_columns: partial sums.
        found: gradients of variables of rows and of columns; None: not needed.
        threshold: its gradient, if it is per column and needed, and where the columns begin in it.
    """
    rows = of_rows.sum(1)
    loss += rows[0]
    if found[0] is not None:
        found[0].add_(rows[1:])
    if of_columns is None:
        return
    columns, (total, start) = of_columns.sum(1), threshold
    if total is not None:
        total[start : start + columns.shape[1]] += columns[0]
    if found[1] is not None:
        found[1].add_(columns[len(columns) - len(found[1]) :])
