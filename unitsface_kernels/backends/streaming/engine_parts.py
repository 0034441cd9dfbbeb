"""Methods of engines in terms of their other methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import Call, clear_ignored
from .engine import TileColumns


class BothProducts:
    """Both products of a gradient tile, one after the other."""

    def both_products(
        self: Any, tile: Tensor, a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor | None
    ) -> Tensor:
        self.addmm(d_a, tile, b)
        if d_b is None:
            return self.matmul(tile.T, a)
        self.addmm(d_b, tile.T, a)
        return d_b


class UnitColumns:
    """Columns of tiles by the kernels for any rows."""

    def tile_columns(
        self: Any, source: Tensor, start: int, stop: int, index: Tensor | None = None
    ) -> TileColumns:
        return TileColumns(*self.normalize_rows(source, start, stop, index, reuse=True))

    def update_columns(self, *_: Any, **__: Any) -> bool:
        return False


class UnitRows(UnitColumns):
    """Both directions of a call's unit rows, by the kernels for any rows."""

    def unit_rows(self: Any, call: Call) -> tuple[Tensor, Tensor]:
        unit, inverse_norms = self.normalize_rows(call.rows, 0, call.rows.shape[0])
        clear_ignored(call, unit)
        return unit, inverse_norms

    def unit_rows_backward(
        self: Any, call: Call, d_unit: Tensor, inverse_norms: Tensor, scale: Tensor | None
    ) -> None:
        self.normalize_rows_backward(d_unit, call.rows, 0, inverse_norms, d_unit, scale)
        clear_ignored(call, d_unit)
