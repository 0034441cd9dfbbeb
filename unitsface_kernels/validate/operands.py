"""Shapes that kernels rely on, for direct calls of the registered operators.

Public functions have checked them before, with messages about their own arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def packed(name: str, values: Sequence[float] | Tensor, wanted: int) -> None:
    """Hyper-parameters as kernels receive them, or all variables of a formula in one tensor."""
    if len(values) != wanted:
        raise ValueError(f"{name} must have {wanted} numbers, got {len(values)}")


def operands(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
    threshold: Tensor | None,
    thresholds: int,
) -> None:
    """Tensors of a call; ``thresholds``: how many elements one has to have."""
    _shape("rows", rows, None, None)
    _shape("row_labels", row_labels, rows.shape[0])
    if columns is not None:
        _shape("columns", columns, None, rows.shape[1])
    if column_labels is not None:
        _shape("column_labels", column_labels, None if columns is None else columns.shape[0])
    if column_index is not None:
        _shape("column_index", column_index, None)
    if threshold is not None:
        _shape("threshold", threshold, thresholds)
    device = rows.device
    for other in (row_labels, columns, column_labels, column_index, threshold):
        if other is not None and other.device != device:
            raise ValueError(f"all tensors must be on {device}, got one on {other.device}")


def _shape(name: str, value: Tensor, *sizes: int | None) -> None:
    shape = value.shape
    if len(shape) != len(sizes) or any(
        size is not None and size != given for size, given in zip(sizes, shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(shape)}")
