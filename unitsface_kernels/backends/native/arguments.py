"""Tensors as arguments of the extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..streaming import PairTile, TileVariables

#: Arguments for the gradients of variables, in the order of :class:`TileVariables`; against classes
#: those of scalars are by row.
BY_DIRECTION = "d_scalars", "a_drows", "b_dcolumns", "b_drows", "a_dcolumns"
BY_ROW = "a_dscalars", "a_drows", "b_dcolumns"


def strided_address(matrix: Tensor) -> tuple[int, int]:
    """Address and size of all that a kernel may touch of a matrix with strides."""
    if not matrix.numel():
        return 0, 0
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    elements = (rows - 1) * row + (columns - 1) * column + 1
    return matrix.data_ptr(), elements * matrix.element_size()


def matrix_argument(value: Tensor | None) -> Tensor | tuple[int, int] | None:
    """A dense tensor, which the extension takes as it is, or the address of a matrix."""
    return value if value is None or value.is_contiguous() else strided_address(value)


def variables_of(
    values: TileVariables | None,
    slopes: TileVariables | None = None,
    names: tuple[str, ...] = BY_DIRECTION,
) -> dict[str, Any]:
    """The arguments of tiles of a formula with variables; ``names``: of their gradients."""
    if values is None:
        return {}
    found: dict[str, Any] = {
        "num_scalars": len(values.scalars),
        "num_rows": len(values.a_rows),
        "num_columns": len(values.b_columns),
        "row_stride": values.a_rows.stride(0),
        "column_stride": values.b_columns.stride(0),
    }
    for name, value in values._asdict().items():
        if value is not None:
            found[name] = matrix_argument(value)
    if slopes is not None:
        found.update(zip(names, map(matrix_argument, slopes), strict=False))
    return found


def slopes_of(tile: PairTile) -> dict[str, Any]:
    """Gradients of variables, of one direction of pairs or of both."""
    slopes = tile.d_variables
    if slopes is None:
        return {}
    found: dict[str, Any] = dict(zip(BY_DIRECTION, map(matrix_argument, slopes), strict=True))
    return {**found, "both_slopes": slopes.b_rows is not None}
