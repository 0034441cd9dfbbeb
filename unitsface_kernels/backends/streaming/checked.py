"""Debug mode, ``UNITSFACE_CHECK=1``: an engine that names the first tile that is not finite.

The operands of a call are checked before its first tile: those are the user's data. Every result
of the engine is checked when it is there, which waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .call import Call
from .checked_operands import check_operands, norms_of
from .engine import (
    ClassSums,
    ClassTile,
    ClassWeights,
    Engine,
    Nearest,
    NegativeSums,
    PairSums,
    PairTile,
    PairWeights,
    PositiveSums,
    SumTile,
    TileColumns,
)
from .engine_parts import BothProducts, UnitRows
from .values import TileVariables, Variables

#: Rows of an operand that are read at once.
CHUNK = 4096
#: Rows that an error lists.
LISTED = 4


def checked(engine: Engine, call: Call, weights: Tensor | None) -> Engine:
    """The engine of a pass with checks; ``weights``: (N,) upstream gradients, or None.

    Raises:
        FloatingPointError: an operand of the call is not finite. Results: in the pass.
    """
    if call.rows.is_cuda and torch.cuda.is_current_stream_capturing():
        # A check would wait for the device, which ends the capture.
        return engine
    check_operands(call, weights)
    return cast(Engine, CheckedEngine(engine, call))


@dataclass(frozen=True)
class _Origin:
    """Where unit rows come from: rows ``start + i`` of ``source``, or of ``source[index]``."""

    unit: Tensor
    source: Tensor
    start: int
    index: Tensor | None = None
    reuse: bool = False

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last address."""
        size = self.unit.stride(0) * self.unit.element_size()
        return self.unit.data_ptr(), self.unit.data_ptr() + len(self.unit) * size

    def overlaps(self, other: _Origin) -> bool:
        (low, high), (first, last) = self.bounds, other.bounds
        return low < last and first < high

    def raw(self, part: slice) -> Tensor:
        part = slice(part.start + self.start, part.stop + self.start)
        return self.source[part] if self.index is None else self.source[self.index[part]]


class _Side(NamedTuple):
    """The rows, or the columns, of a tile: numbers in the whole matrix and the largest norm."""

    numbers: Tensor
    norm: float

    def __str__(self) -> str:
        if not len(self.numbers):
            return "none"
        first, stop = int(self.numbers.min()), int(self.numbers.max()) + 1
        some = "" if stop - first == len(self.numbers) else f"{len(self.numbers)} of "
        return f"{some}{first}:{stop}"


class CheckedEngine(UnitRows, BothProducts):
    """See :class:`Engine`; everything without a check is the engine's own.

    Args:
        engine: does the work.
        call: of the pass.
    """

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call
        self._origins: list[_Origin] = []
        self._tile: SumTile | PairTile | ClassTile | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    # Rows

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        unit, inverse_norms = self._engine.normalize_rows(source, start, stop, index, reuse)
        self._register(_Origin(unit, source, start, index, reuse), inverse_norms)
        return unit, inverse_norms

    def tile_columns(
        self, source: Tensor, start: int, stop: int, index: Tensor | None = None
    ) -> TileColumns:
        columns = self._engine.tile_columns(source, start, stop, index)
        origin = _Origin(columns.matrix, source, start, index, reuse=True)
        self._register(origin, columns.inverse_norms)
        return columns

    def _register(self, origin: _Origin, inverse_norms: Tensor) -> None:
        # Freed memory is used again, and of columns the next ones replace the last.
        self._origins = [
            known
            for known in self._origins
            if not known.overlaps(origin) and not (origin.reuse and known.reuse)
        ]
        self._origins.append(origin)
        values = torch.cat([origin.unit.float(), inverse_norms[:, None]], dim=1)
        self._check_normalized("normalization", values, origin)

    def normalize_rows_backward(
        self,
        d_unit: Tensor,
        source: Tensor,
        start: int,
        inverse_norms: Tensor,
        out: Tensor,
        scale: Tensor | None = None,
        index: Tensor | None = None,
        raw: bool = False,
    ) -> None:
        self._engine.normalize_rows_backward(
            d_unit, source, start, inverse_norms, out, scale, index, raw
        )
        origin = _Origin(out, source, start, index)
        self._check_normalized("gradient of the normalization", out, origin)

    def _check_normalized(self, stage: str, values: Tensor, origin: _Origin) -> None:
        """Rows of finite features alone: others are ignored, or another rank's."""
        raw = origin.raw(slice(0, len(values)))
        bad = ~values.isfinite().all(dim=1) & raw.isfinite().all(dim=1)
        if bool(bad.any()):
            of_columns = origin.source is self._call.columns
            side = self._side(origin, slice(0, len(values)), of_columns)
            number = int(side.numbers[bad.nonzero()[0]])
            name = "columns" if of_columns else "rows"
            raise FloatingPointError(
                f"loss {self._call.spec.name}, stage {stage}: not finite in {name[:-1]} {number}; "
                f"{name} {side}, largest norm {side.norm:g}"
            )

    # Tiles

    def sum_tile(self, tile: SumTile) -> Tensor | None:
        self._tile = tile
        gradient = self._engine.sum_tile(tile)
        if tile.total:
            self._check_total(tile)
        else:
            self._check_losses(tile)
        if gradient is not None:
            self._check("gradient", "gradient", gradient)
        if tile.d_threshold is not None:
            self._check("gradient", "gradient of the threshold", tile.d_threshold, placed=False)
        self._check_variables(tile.d_variables)
        return gradient

    def _check_variables(self, gradients: TileVariables | None) -> None:
        for sums in gradients or ():
            if sums is not None:
                self._check("gradient", "gradient of the variables", sums, placed=False)

    def logsumexp_tile(self, tile: ClassTile, rows: ClassSums) -> None:
        self._tile = tile
        self._engine.logsumexp_tile(tile, rows)
        self._check_fields("statistics", rows, tile.targets != -1)

    def finish_rows(
        self, call: Call, sums: ClassSums, values: Variables | None = None
    ) -> tuple[Tensor, Tensor]:
        finished = self._engine.finish_rows(call, sums, values)
        # All rows: no tile.
        self._tile, valid = None, ~self._call.ignored
        loss, (log_negatives, _, slope, *_) = finished
        self._check("statistics", "log negatives", log_negatives, valid)
        self._check("statistics", "slope of the target's logit", slope, valid)
        self._check("loss", "loss", torch.where(log_negatives == -torch.inf, 0.0, loss), valid)
        return finished

    def logsumexp_gradient_tile(self, tile: ClassTile, rows: ClassWeights) -> Tensor:
        self._tile = tile
        gradient = self._engine.logsumexp_gradient_tile(tile, rows)
        valid = None
        if tile.selection is not None and tile.selection.places is not None:
            # The others are not written.
            valid = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
            valid[tile.selection.places[: int(tile.selection.number[0])]] = True
        self._check("gradient", "gradient", gradient, valid)
        self._check_variables(tile.d_variables)
        return gradient

    def pair_negatives_tile(
        self, tile: PairTile, rows: NegativeSums, columns: NegativeSums | None
    ) -> None:
        self._tile = tile
        self._engine.pair_negatives_tile(tile, rows, columns)
        self._check_both("statistics", tile, rows, columns)

    def pair_sums_tile(self, tile: PairTile, rows: PairSums, columns: PairSums | None) -> None:
        self._tile = tile
        self._engine.pair_sums_tile(tile, rows, columns)
        self._check_both("statistics", tile, rows, columns)

    def pair_positives_tile(
        self, tile: PairTile, rows: PositiveSums, columns: PositiveSums | None
    ) -> None:
        self._tile = tile
        self._engine.pair_positives_tile(tile, rows, columns)
        self._check_both("loss", tile, rows, columns)

    def pair_gradient_tile(
        self, tile: PairTile, rows: PairWeights, columns: PairWeights | None
    ) -> Tensor:
        self._tile = tile
        gradient = self._engine.pair_gradient_tile(tile, rows, columns)
        self._check("gradient", "gradient", gradient)
        self._check_variables(tile.d_variables)
        return gradient

    def nearest_tile(self, tile: ClassTile, rows: Nearest) -> None:
        self._tile = tile
        self._engine.nearest_tile(tile, rows)
        self._check_fields("search", rows, tile.targets != -1)

    # GEMMs of gradient tiles

    def addmm(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        self._engine.addmm(total, left, right)
        self._check("accumulation", "sum of the gradients", total, placed=False)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        result = self._engine.matmul(left, right)
        self._check("accumulation", "sum of the gradients", result, placed=False)
        return result

    # Checks

    def _check_losses(self, tile: SumTile) -> None:
        self._check("loss", "loss", tile.a_loss, tile.a_labels != -1)
        if tile.b_loss is not None:
            self._check("loss", "loss", tile.b_loss, tile.b_labels != -1, of_columns=True)

    def _check_total(self, tile: SumTile) -> None:
        if bool(tile.a_loss.isfinite().all()):
            return
        # Once more with the losses of the rows, which name the row.
        a_loss, b_loss = (tile.a_loss.new_zeros(len(side)) for side in (tile.a, tile.b))
        again = replace(
            tile,
            total=False,
            a_loss=a_loss,
            b_loss=None if tile.b_loss is None else b_loss,
            d_threshold=None,
            gradient=False,
        )
        self._engine.sum_tile(again)
        self._check_losses(again)
        self._check("loss", "loss", tile.a_loss, placed=False)

    def _check_both(
        self,
        stage: str,
        tile: PairTile,
        rows: NegativeSums | PositiveSums | PairSums,
        columns: NegativeSums | PositiveSums | PairSums | None,
    ) -> None:
        self._check_fields(stage, rows, tile.a_labels != -1)
        if columns is not None:
            self._check_fields(stage, columns, tile.b_labels != -1, of_columns=True)

    def _check_fields(
        self, stage: str, vectors: Any, valid: Tensor, of_columns: bool = False
    ) -> None:
        for name, values in vectors._asdict().items():
            self._check(stage, name.replace("_", " "), values, valid, of_columns)

    def _check(
        self,
        stage: str,
        what: str,
        values: Tensor,
        valid: Tensor | None = None,
        of_columns: bool = False,
        placed: bool = True,
    ) -> None:
        """Raises for the first of ``values`` that is not finite.

        Args:
            stage, what: for the error.
            values: of rows (n,), (n, k), of columns (m,), or of pairs (n, m), without ``valid``.
            valid: (n,) or (m,), which of them count; None: all.
            of_columns: they belong to the columns.
            placed: the place in ``values`` is that in the tile.
        """
        bad = ~values.isfinite()
        if what in ("maximum", "positive maximum", "best", "log negatives"):
            # Nothing has been found yet.
            bad &= values != -torch.inf
        if valid is not None:
            bad &= valid if values.dim() == 1 else valid[:, None]
        if not bool(bad.any()):
            return
        at = [int(i) for i in bad.nonzero()[0]]
        text = f"loss {self._call.spec.name}, stage {stage}: {what} is {values[tuple(at)].item():g}"
        if self._tile is None:
            text += f" in row {at[0]}" if placed else ""
        else:
            rows, columns = self._sides(self._tile)
            if placed and of_columns:
                text += f" in column {int(columns.numbers[at[0]])}"
            elif placed:
                text += f" in row {int(rows.numbers[at[0]])}"
                if valid is None:
                    # A gradient has those of every vector of a column.
                    column = at[1] * len(columns.numbers) // values.shape[1]
                    text += f", column {int(columns.numbers[column])}"
            norm = max(rows.norm, columns.norm)
            text += f"; rows {rows}, columns {columns}, largest norm {norm:g}"
        raise FloatingPointError(text)

    def _sides(self, tile: SumTile | PairTile | ClassTile) -> tuple[_Side, _Side]:
        rows, columns = self._located(tile.a, False), self._located(tile.b, True)
        start = None
        if isinstance(tile, SumTile):
            start = tile.b_start
        elif isinstance(tile, ClassTile):
            start = tile.start
        if start is not None:
            columns = columns._replace(
                numbers=torch.arange(start, start + len(tile.b) // self._call.centers)
            )
        return rows, columns

    def _located(self, tile: Tensor, of_columns: bool) -> _Side:
        """A part of unit rows, by its address."""
        for origin in self._origins:
            low, high = origin.bounds
            if len(tile) and low <= tile.data_ptr() < high:
                size = origin.unit.stride(0) * origin.unit.element_size()
                first = (tile.data_ptr() - low) // size
                return self._side(origin, slice(first, first + len(tile)), of_columns)
        return _Side(torch.arange(len(tile)), 0.0)

    def _side(self, origin: _Origin, part: slice, of_columns: bool) -> _Side:
        start = part.start + origin.start
        numbers = torch.arange(start, start + part.stop - part.start)
        if origin.index is not None:
            numbers = origin.index[start : start + len(numbers)].cpu()
        if of_columns and origin.source is self._call.rows:
            # In a batch of several ranks columns are the rows of them all.
            numbers = numbers + (self._call.self_offset or 0)
        norms = norms_of(origin.raw(part))
        return _Side(numbers, float(norms.max()) if len(norms) else 0.0)
