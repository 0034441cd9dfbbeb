"""Rows that the device selects, for gradient filtering, and the GEMMs over them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class RowSelection(NamedTuple):
    """Rows of a tile whose gradients are needed, as device memory has them.

    Attributes:
        places: (n,) int32, of which the first ``number`` are their places in the tile; None: they
            are the first ``number`` rows.
        number: int32, its first element.
    """

    places: Tensor | None
    number: Tensor


class SortedTargets(NamedTuple):
    """(N,) int64 positions of targets in ascending order, below 0: none, the (N,) int64 rows that
    they are targets of, and d loss / d cosine (N,) float32 by row.
    """

    places: Tensor
    rows: Tensor
    slopes: Tensor


class DeviceFilter(Protocol):
    """GEMMs of gradient tiles over rows that the device selects.

    Their launches are the same whatever is selected: nothing waits for the device, and a CUDA graph
    may hold them.
    """

    def add_rows(
        self, total: Tensor, tile: Tensor, columns: Tensor, selection: RowSelection
    ) -> None:
        """``total[i] += tile[i] @ columns`` (n, D) for the selected rows."""

    def columns(
        self, tile: Tensor, rows: Tensor, selection: RowSelection, total: Tensor | None = None
    ) -> Tensor:
        """``tile.T @ rows`` (m, D) over the selected rows; added to ``total``, if given."""

    def add_targets(
        self,
        d_unit: Tensor,
        factors: Tensor | None,
        start: int,
        targets: SortedTargets,
        rows: Tensor,
    ) -> None:
        """Adds ``slope[i] rows[i]`` to the target of row i, for targets in a tile.

        Args:
            d_unit: (m, D) float32 gradient of the tile's unit columns, times ``factors`` (m,).
            factors: :attr:`TileColumns.factors`.
            start: position of the first of the columns.
            targets: of all rows.
            rows: (N, D) unit rows.
        """
