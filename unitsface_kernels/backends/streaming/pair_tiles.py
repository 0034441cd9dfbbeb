"""Tiles of pairs of samples in passes over statistics and gradients, for rows of any number of
positives.

In-batch each tile on or above the diagonal serves both directions of its pairs. Against the batches
of other ranks a tile serves its rows, which get the gradient of both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..dense import zeros
from . import towers, variables
from .call import Call, Gradients, Result, clear_ignored, clear_ignored_columns
from .columns import unit_columns
from .computed import add_column_norms
from .engine import Engine, NegativeSums, PairSums, PairTile, PairWeights, PositiveSums, part
from .filtering import add_to_both
from .other_ranks import Blocks
from .tiles import Columns, Panel, Tile, against_columns, against_ranks, in_batch, shifted
from .values import Variables, own_rows


@dataclass
class Operands:
    """Rows and their labels, those of the columns, which may be the rows, and variables.

    Attributes:
        unit: unit rows.
        column_index: the columns that take part; None: all.
        sorted: rows of a batch are in the order of their labels, none of which is ignored.
        variables: that tiles read; None: there are none.
        d_variables: accumulates their gradients; None: not needed.
        own: place of the rows among those that have variables.
    """

    unit: Tensor
    labels: Tensor
    column_labels: Tensor
    column_index: Tensor | None = None
    sorted: bool = False
    variables: Variables | None = None
    d_variables: Variables | None = None
    own: int = 0

    def with_variables(
        self, tile: PairTile, rows: slice, columns: slice, both: bool, own_alone: bool
    ) -> None:
        """Gives a tile its variables.

        Args:
            rows, columns: places among the rows, and among all columns.
            both: the other direction reads variables, too.
            own_alone: gradients of the other direction are not this tile's.
        """
        places = rows, columns, self.own
        if self.variables is not None:
            tile.variables = self.variables.tile(*places, both)
        if self.d_variables is not None:
            tile.d_variables = self.d_variables.tile(*places, both and not own_alone)


class Prepared(NamedTuple):
    """Operands, inverse norms of the rows, and all variables of the call, if it has any."""

    operands: Operands
    inverse_norms: Tensor
    values: Variables | None


def operands_of(call: Call, engine: Engine) -> Prepared:
    unit, inverse_norms = engine.unit_rows(call)
    if call.columns is None:
        everyone = call.row_labels if call.column_labels is None else call.column_labels
        labels = engine.prepare_labels(call.row_labels, everyone)
    elif call.both:
        labels = engine.prepare_labels(call.row_labels, call.column_labels)
    else:
        # An invalid row counts as ignored here, but remains a column of the others.
        labels_of_valid = torch.where(call.valid_rows, call.row_labels, -1)
        labels = engine.prepare_labels(labels_of_valid, call.column_labels)
    operands, values = Operands(unit, *labels), variables.of_call(call, engine, unit, inverse_norms)
    if values is not None:
        operands.variables = values.streamed(call.spec)
        operands.own = own_rows(call).start
    return Prepared(operands, inverse_norms, values)


def log_of_sums(maximum: Tensor, total: Tensor) -> Tensor:
    """-inf, not NaN, for a row without any pair of the kind."""
    return torch.where(total == 0, -torch.inf, maximum + torch.log(total))


def result_of(
    call: Call, engine: Engine, per_row: Tensor, state: Tensor, values: Variables | None
) -> Result:
    """The result of a pass over statistics from (num_losses,) losses, which it may change."""
    if values is not None:
        per_row = per_row + variables.not_finite(call, values)
    clear_ignored(call, per_row)
    return Result(engine.reduced(call, per_row), state, Gradients())


# --- tiles ----------------------------------------------------------------------------------------


_Sums = TypeVar("_Sums", NegativeSums, PositiveSums, PairSums, PairWeights)
Placed = tuple[PairTile, slice, slice]


def other_side(call: Call, tile: PairTile, sums: _Sums, columns: slice) -> _Sums | None:
    """Statistics, or weights, of the columns, where a tile serves them as well."""
    if call.both:
        return part(sums, shifted(columns, call.column_losses.start))
    return None if call.columns is not None or tile.symmetric else part(sums, columns)


def tiles(call: Call, engine: Engine, operands: Operands) -> Iterator[Placed]:
    """Tiles with the rows of the call, and the places of their rows and columns."""
    if call.columns is None:
        yield from _batch_tiles(engine, operands)
        return
    for tile, rows, columns, _ in _memory_tiles(call, engine, operands):
        yield tile, rows, columns


def _batch_tiles(engine: Engine, operands: Operands) -> Iterator[Placed]:
    unit, labels = operands.unit, operands.labels

    def may_hold_a_positive(tile: Tile) -> bool:
        return not bool(labels[tile.columns.start] > labels[tile.rows.stop - 1])

    reaches = may_hold_a_positive if operands.sorted else None
    for place in in_batch(unit.shape[0], engine.sum_block[0], reaches):
        rows, columns = place
        tile = PairTile(
            a=unit[rows],
            b=unit[columns],
            a_labels=labels[rows],
            b_labels=labels[columns],
            diagonal=place.diagonal,
            symmetric=place.symmetric,
        )
        among_all = shifted(columns, operands.own)
        operands.with_variables(tile, rows, among_all, both=True, own_alone=place.symmetric)
        yield tile, rows, columns


def _panel_tiles(
    call: Call,
    engine: Engine,
    operands: Operands,
    panel: Panel,
    labels: Tensor,
    offset: int | None = None,
    both: bool = False,
    own_alone: bool = True,
) -> Iterator[tuple[PairTile, slice, slice, Tensor]]:
    """Tiles with the inverse norms of their columns; ``both``: the gradient of a tile is of
    both directions of its pairs; ``own_alone``: as of :meth:`Operands.with_variables`."""
    b, norms = unit_columns(engine, panel)
    clear_ignored_columns(call, labels[panel.columns], b)
    for place in panel.tiles:
        rows, columns = place
        tile = PairTile(
            a=operands.unit[rows],
            b=b,
            a_labels=operands.labels[rows],
            b_labels=labels[columns],
            diagonal=None if offset is None else place.diagonal + offset,
            symmetric=False,
        )
        operands.with_variables(tile, rows, columns, both, own_alone)
        yield tile, rows, columns, norms


def _memory_tiles(
    call: Call, engine: Engine, operands: Operands
) -> Iterator[tuple[PairTile, slice, slice, Tensor]]:
    assert call.columns is not None
    labels = operands.column_labels
    columns = Columns(call.columns, operands.column_index, labels.shape[0])
    for panel in against_columns(columns, operands.unit.shape[0], engine.class_block):
        yield from _panel_tiles(
            call, engine, operands, panel, labels, call.self_offset, call.both, not call.both
        )


class Others(NamedTuple):
    """Own rows, or columns, that meet those of other ranks.

    Attributes:
        operands: of the own ones, with the labels of all others.
        blocks: the others.
        losses: place of the own ones among the losses of the call.
        inverse_norms: of the own ones.
    """

    operands: Operands
    blocks: Blocks
    losses: slice
    inverse_norms: Tensor


def others_of(call: Call, engine: Engine, prepared: Prepared) -> list[Others]:
    """The sides that meet other ranks: the own batch, or both towers; none without ranks."""
    operands, inverse_norms, _ = prepared
    if call.ranks is not None and call.columns is None:
        own = slice(0, call.rows.shape[0])
        return [Others(operands, call.ranks.blocks(), own, inverse_norms)]
    return [
        Others(
            replace(operands, unit=s.unit, labels=s.labels, column_labels=s.other_labels),
            s.blocks,
            s.losses,
            s.inverse_norms,
        )
        for s in towers.sides(call, engine, operands.unit, inverse_norms)
    ]


def remote_tiles(
    call: Call, engine: Engine, others: Others, possible: Tensor | None = None
) -> Iterator[Placed]:
    """Tiles against other ranks, of whose vectors only the ``possible`` (T,), if given; the places
    of their own side among the losses of the call, and of the other among all others.
    """
    operands, blocks, losses, _ = others
    labels = operands.column_labels
    if possible is not None:
        labels = labels[possible]
        if operands.variables is not None:
            values = operands.variables.at(None, torch.nonzero(possible).flatten())
            operands = replace(operands, variables=values)
    for panel in against_ranks(blocks, operands.unit.shape[0], engine.class_block, possible):
        tiles_of_panel = _panel_tiles(call, engine, operands, panel, labels, both=possible is None)
        for tile, rows, columns, _ in tiles_of_panel:
            yield tile, shifted(rows, losses.start), columns


# --- gradients ------------------------------------------------------------------------------------


def gradients_of_pairs(
    call: Call,
    engine: Engine,
    prepared: Prepared,
    factors: PairWeights,
    scale: Tensor | None,
    by_variables: Sequence[Tensor] = (),
) -> Gradients:
    """Gradients from factors of the rows.

    Args:
        call, engine, prepared: of the pass.
        factors: without the common ``scale``.
        scale: (), or None.
        by_variables: (num_losses,) weighted derivatives of the losses by each of
            :meth:`Variables.of_rows`, beside those through the pairs.
    """
    operands, inverse_norms, values = prepared
    if operands.variables is not None and variables.needed(call):
        operands.d_variables = variables.zeros_like(operands.variables, engine.stat_dtype)
    d_rows = None
    if call.need_rows:
        d_rows = zeros(call.rows, *call.rows.shape)
    d_columns = None
    # Their first vectors travel while the own tiles are computed.
    others = others_of(call, engine, prepared)
    if call.columns is None:
        _gradients_in_batch(engine, operands, factors, d_rows)
    else:
        d_columns = _gradients_against_columns(call, engine, operands, factors, d_rows, scale)
    _gradients_against_ranks(call, engine, others, factors, [d_rows, d_columns])
    if len(others) > 1:
        towers.finish(call, engine, others[1].inverse_norms, d_columns, scale)
    if d_rows is not None:
        engine.unit_rows_backward(call, d_rows, inverse_norms, scale)
    if values is None:
        return Gradients(d_rows, d_columns)
    of_rows = variables.by_rows(call, values, by_variables) if by_variables else None
    tiles_of = operands.d_variables and operands.d_variables.times(scale)
    found = variables.joined(call, values, of_rows, tiles_of)
    if d_rows is not None:
        variables.add_norms(call, found, d_rows, operands.unit, inverse_norms, None)
    if d_columns is not None:
        add_column_norms(call, engine, variables.column_norm_slopes(call, found), d_columns, None)
    of_given = variables.of_given(call, found, None) if call.need_variables else None
    return Gradients(d_rows, d_columns, None, of_given)


def _gradients_in_batch(
    engine: Engine, operands: Operands, factors: PairWeights, d_rows: Tensor | None
) -> None:
    if d_rows is None and operands.d_variables is None:
        return
    for tile, rows, columns in _batch_tiles(engine, operands):
        gradient = engine.pair_gradient_tile(tile, part(factors, rows), part(factors, columns))
        if d_rows is None:
            continue
        if tile.symmetric:
            engine.addmm(d_rows[rows], gradient, tile.b)
        else:
            engine.both_products(gradient, tile.a, tile.b, d_rows[rows], d_rows[columns])


def _gradients_against_ranks(
    call: Call,
    engine: Engine,
    others: list[Others],
    factors: PairWeights,
    d_units: list[Tensor | None],
) -> None:
    """``d_units``: gradients of the own unit rows and columns, which are added to; or None."""
    if not others:
        return
    given = torch.stack([vector for vector in factors if vector is not None], dim=1)
    if call.towers is None:
        assert call.ranks is not None
        gathered = [call.ranks.gather(given)]
    else:
        # Rows meet columns, and columns rows.
        gathered = towers.gathered(call, given)[::-1]
    for side, values, d_unit in zip(others, gathered, d_units, strict=False):
        everyone = PairWeights(*values.T.contiguous())
        for tile, own, columns in remote_tiles(call, engine, side):
            gradient = engine.pair_gradient_tile(tile, part(factors, own), part(everyone, columns))
            if d_unit is not None:
                engine.addmm(d_unit[shifted(own, -side.losses.start)], gradient, tile.b)


def _gradients_against_columns(
    call: Call,
    engine: Engine,
    operands: Operands,
    factors: PairWeights,
    d_rows: Tensor | None,
    scale: Tensor | None,
) -> Tensor | None:
    assert call.columns is not None
    count, size = operands.unit.shape
    d_columns = None
    if call.need_columns:
        d_columns = call.rows.new_zeros((call.num_columns, size), dtype=torch.float32)
    for tile, rows, columns, norms in _memory_tiles(call, engine, operands):
        back = other_side(call, tile, factors, columns)
        gradient = engine.pair_gradient_tile(tile, part(factors, rows), back)
        d_unit = None if d_columns is None else d_columns[columns]
        d_some = None if d_rows is None else d_rows[rows]
        add_to_both(engine, gradient, tile.a, tile.b, d_some, d_unit, d_unit is not None)
        if d_unit is not None and rows.stop == count and call.towers is None:
            engine.normalize_rows_backward(
                d_unit, call.columns, columns.start, norms, d_unit, scale
            )
            clear_ignored_columns(call, tile.b_labels, d_unit)
    return d_columns
