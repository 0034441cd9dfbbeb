"""Driver of ``sum`` losses: loss and gradients from one GEMM per tile.

A pair's gradient needs only that pair, so the tile that yields the loss yields the gradient.
In-batch, cosine (i, j) serves rows i and j: only tiles on and above the diagonal are visited,
1.5 GEMMs of N x N x D for loss and gradients instead of 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...losses import LossSpec
from ..dense import zeros
from . import towers, variables
from .call import (
    Call,
    Gradients,
    Result,
    clear_ignored,
    clear_ignored_columns,
    not_finite,
    split_weights,
)
from .columns import (
    columns_of,
    finish_columns,
    norms_of_losses,
    remote_blocks,
    unit_columns,
)
from .engine import Engine, SumTile
from .filtering import Positives, RowFilter, add_to_both, selections
from .other_ranks import Blocks, Ranks
from .scattered import add_pairs
from .tiles import against_columns, against_ranks, in_batch, shifted
from .values import Variables


@dataclass
class _Pass:
    """Inputs and accumulators of a pass over tiles.

    Attributes:
        a_labels, b_labels: of the rows, and of all columns; in-batch those of all ranks.
        own: place of the rows among the columns, in-batch.
        weights: (num_losses,) upstream gradients; None: ones.
        scale: () factor of the gradients, or None.
        gradient: whether any gradient of rows or columns is kept.
        total: see :class:`SumTile`.
        loss: (num_losses,), or of the total.
        d_rows: (N, D), of the unit rows.
        threshold: (1,), or (M,) per column.
        d_threshold: the same, or of the total.
        variables, d_variables: of the formula, if it reads any.
    """

    call: Call
    engine: Engine
    unit: Tensor
    a_labels: Tensor
    b_labels: Tensor
    own: int
    weights: Tensor | None
    scale: Tensor | None
    gradient: bool
    total: bool
    loss: Tensor
    d_rows: Tensor | None
    threshold: Tensor
    d_threshold: Tensor | None
    row_filter: RowFilter | None
    variables: Variables | None = None
    d_variables: Variables | None = None

    def tile(
        self,
        rows: slice,
        columns: slice,
        b: Tensor,
        mirrored: bool,
        diagonal: int | None = None,
        b_weights: Tensor | None = None,
        both: slice | None = None,
    ) -> SumTile:
        """Arguments of a tile; ``b``: the unit columns at the places ``columns``.

        ``both``: rows that the columns are, whose losses the tile serves as well.
        """
        threshold = self.threshold
        if diagonal is not None and not rows.start - rows.stop < diagonal < b.shape[0]:
            diagonal = None  # the tile is beside it
        per_column, place = self.call.spec.threshold == "per_column", shifted(rows, self.own)
        a_threshold = threshold[place] if per_column else threshold
        tile = SumTile(
            a=self.unit[rows],
            b=b,
            a_labels=self.a_labels[rows],
            b_labels=self.b_labels[columns],
            a_threshold=a_threshold if mirrored else None,
            b_threshold=threshold[columns] if per_column else threshold,
            a_weights=None if self.weights is None else self.weights[rows],
            b_weights=b_weights,
            a_loss=self._loss_of(rows),
            b_loss=None if both is None else self._loss_of(both),
            d_threshold=self.d_threshold,
            a_start=place.start,
            b_start=columns.start,
            diagonal=diagonal,
            mirrored=mirrored,
            gradient=self.gradient,
            total=self.total,
        )
        if self.variables is None:
            return tile
        places = rows, columns, self.own, mirrored
        found = [v and v.tile(*places) for v in (self.variables, self.d_variables)]
        return replace(tile, variables=found[0], d_variables=found[1])

    def _loss_of(self, rows: slice) -> Tensor:
        return self.loss if self.total else self.loss[rows]


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """No state: a pair's gradient needs only that pair."""
    return 0


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and with ``gradients`` every needed gradient for an upstream gradient of one."""
    scale = engine.mean_factor(call) if call.reduction == "mean" else None
    loss, found = _stream(call, engine, None, scale, gradients and call.need_any)
    whole = loss.dim() == 0
    if not whole and call.reduction != "none":
        loss = loss.sum()
    if call.shards is not None:
        loss = call.shards.sum(loss)
    if scale is not None and not whole:
        loss = loss * scale
    return Result(loss.to(torch.float32), None, found)


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (num_losses,) upstream gradients, by recomputing the tiles."""
    return _stream(call, engine, *split_weights(call, weights), True)[1]


def _stream(
    call: Call,
    engine: Engine,
    weights: Tensor | None,
    scale: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Gradients]:
    """(num_losses,) losses, or () their total times ``scale`` if that is all that is wanted, and
    the gradients, weighted per row by ``weights`` and all by ``scale``.
    """
    rows = call.rows
    unit, inverse_norms = engine.unit_rows(call)
    column_labels = call.column_labels
    if call.columns is None and column_labels is None:
        column_labels = call.row_labels
    a_labels, b_labels = engine.prepare_labels(call.row_labels, column_labels)
    per_column = call.spec.threshold == "per_column"
    need_rows, need_columns = gradients and call.need_rows, gradients and call.need_columns
    norms = norms_of_losses(call, engine, inverse_norms)
    values, d_values = variables.of_call(call, engine, unit, inverse_norms), None
    total = weights is None and call.reduction != "none" and not per_column and values is None
    slots = engine.total_slots if total else 0
    need_threshold, d_threshold = gradients and call.need_threshold, None
    if slots:
        parts = rows.new_zeros((1 + need_threshold, slots), dtype=engine.stat_dtype)
        loss, d_threshold = parts[0], parts[1] if need_threshold else None
    else:
        loss = not_finite(call, norms).to(engine.stat_dtype)
        if values is not None:
            loss += variables.not_finite(call, values)
        if need_threshold:
            size = call.num_columns if per_column else 1
            d_threshold = rows.new_zeros(size, dtype=engine.stat_dtype)
    if values is not None and gradients and variables.needed(call):
        d_values = variables.zeros_like(values, engine.stat_dtype)
    state = _Pass(
        call=call,
        engine=engine,
        unit=unit,
        a_labels=a_labels,
        b_labels=b_labels,
        own=(call.self_offset or 0) if call.columns is None else 0,
        weights=weights,
        scale=scale,
        gradient=need_rows or (need_columns and call.columns is not None),
        total=slots > 0,
        loss=loss,
        d_rows=zeros(rows, *rows.shape) if need_rows else None,
        threshold=zeros(rows, 1) if call.threshold is None else call.threshold,
        d_threshold=d_threshold,
        row_filter=RowFilter(call, engine, weights) if call.filters and len(rows) else None,
        variables=values,
        d_variables=d_values,
    )
    d_rows, d_columns = state.d_rows, None
    if call.columns is None:
        # Their first rows travel while the own block is computed.
        blocks = remote_blocks(call)
        _in_batch(state)
        if call.ranks is not None:
            _against_ranks(state, blocks, call.ranks)
    else:
        others = towers.sides(call, engine, unit, inverse_norms)
        d_columns = _against_columns(state, need_columns)
        for side, d_unit in zip(others, (d_rows, d_columns), strict=False):
            _against_ranks(_of_side(state, side, d_unit), side.blocks, side.ranks)
        if others:
            towers.finish(call, engine, others[1].inverse_norms, d_columns, scale)
    if slots:
        loss, d_threshold = engine.finish_totals(call, norms, loss, d_threshold, scale)
    else:
        # With a threshold of NaN, terms of pairs that are left out are NaN as well.
        clear_ignored(call, loss)
        if d_threshold is not None and scale is not None:
            d_threshold = d_threshold * scale
    if d_rows is not None:
        engine.unit_rows_backward(call, d_rows, inverse_norms, scale)
    d_variables = None
    if d_values is not None:
        if d_rows is not None:
            variables.add_norms(call, d_values, d_rows, unit, inverse_norms, scale)
        if call.need_variables:
            d_variables = variables.of_given(call, d_values, scale)
    if d_threshold is not None:
        d_threshold = d_threshold.to(torch.float32)
    return loss, Gradients(d_rows, d_columns, d_threshold, d_variables)


def _in_batch(state: _Pass) -> None:
    unit, weights, d_rows = state.unit, state.weights, state.d_rows
    engine, row_filter = state.engine, state.row_filter
    for place in in_batch(unit.shape[0], engine.sum_block[0]):
        rows, columns = place
        arguments = state.tile(
            rows,
            shifted(columns, state.own),
            unit[columns],
            mirrored=True,
            diagonal=place.diagonal,
            b_weights=None if weights is None else weights[columns],
            both=None if place.symmetric else columns,
        )
        tile = engine.sum_tile(arguments)
        if tile is None or d_rows is None:
            continue
        for_rows = for_columns = None
        if row_filter is not None and engine.device_filter is not None:
            for_rows = selections(~row_filter.fits(tile, rows)[None])[0]
            if not place.symmetric:
                for_columns = row_filter.needs_columns(tile, columns)
        elif row_filter is not None and row_filter.skips_tile(tile, rows, columns):
            continue
        both = not place.symmetric
        add_to_both(
            *(engine, tile, arguments.a, arguments.b, d_rows[rows]),
            *(d_rows[columns] if both else None, both, (for_rows, for_columns)),
        )


def _of_side(state: _Pass, side: towers.Side, d_unit: Tensor | None) -> _Pass:
    """The same pass for own rows, or own columns, against other ranks."""
    return replace(
        state,
        unit=side.unit,
        a_labels=side.labels,
        b_labels=side.other_labels,
        weights=None if state.weights is None else state.weights[side.losses],
        loss=state.loss if state.total else state.loss[side.losses],
        d_rows=d_unit,
    )


def _against_ranks(state: _Pass, blocks: Blocks, ranks: Ranks | None) -> None:
    """Own rows against those of other ranks, which take the same pairs in the other direction.

    A cosine's derivative in both directions needs the remote row's label, threshold and weight
    alone: a tile yields the own rows' whole gradient, and none travels back.
    """
    engine, d_rows = state.engine, state.d_rows
    everyone = None
    if state.weights is not None and ranks is not None:
        everyone = ranks.weights
        assert everyone is not None
        everyone = everyone if state.scale is None else everyone / state.scale
    for panel in against_ranks(blocks, state.unit.shape[0], engine.class_block):
        b, _ = unit_columns(engine, panel)
        clear_ignored_columns(state.call, state.b_labels[panel.columns], b)
        b_weights = None if everyone is None else everyone[panel.columns]
        for rows in panel.rows:
            tile = engine.sum_tile(
                state.tile(rows, panel.columns, b, mirrored=True, b_weights=b_weights)
            )
            if tile is not None and d_rows is not None:
                engine.addmm(d_rows[rows], tile, b)


def _against_columns(state: _Pass, need_columns: bool) -> Tensor | None:
    call, engine, unit, d_rows = state.call, state.engine, state.unit, state.d_rows
    columns, row_filter, scale = columns_of(call), state.row_filter, state.scale
    on_device = engine.device_filter is not None
    positives = None if row_filter is None else Positives(call, on_device)
    of_norms = variables.column_norm_slopes(call, state.d_variables)
    d_columns = None
    if need_columns and call.sink is None:
        # Every tile writes its columns; zeroing all M x D first costs time.
        shape = (call.num_vectors, unit.shape[1])
        d_columns = columns.source.new_empty(shape, dtype=torch.float32)
    for panel in against_columns(columns, unit.shape[0], engine.class_block):
        b, column_norms = unit_columns(engine, panel)
        clear_ignored_columns(call, state.b_labels[panel.columns], b)
        both = shifted(panel.columns, len(unit)) if call.both else None
        b_weights = None if both is None or state.weights is None else state.weights[both]
        d_unit = None
        for place in panel.tiles:
            rows, kept, selection = place.rows, None, None
            diagonal = None if call.self_offset is None else place.diagonal + call.self_offset
            arguments = state.tile(
                rows, panel.columns, b, call.both, diagonal, b_weights=b_weights, both=both
            )
            tile = engine.sum_tile(arguments)
            if tile is None:
                continue
            if row_filter is not None and positives is not None:
                choice = row_filter, engine, tile, rows, panel.columns.start
                if on_device:
                    selection = positives.selection(*choice)
                else:
                    kept = positives.rows_to_keep(*choice)
            a, d_a = arguments.a, None if d_rows is None else d_rows[rows]
            d_some = d_a
            if kept is not None:
                if len(kept) == 0:
                    continue
                tile, a, d_some = tile[kept], a[kept], None if d_a is None else d_a[kept]
            d_unit = add_to_both(engine, tile, a, b, d_some, d_unit, need_columns, (selection,) * 2)
            if kept is not None and d_a is not None and d_some is not None:
                d_a[kept] = d_some
        if need_columns:
            own = panel.columns
            along = None if of_norms is None else of_norms[own]
            finish_columns(
                call, engine, panel.part, d_unit, column_norms, d_columns, scale, along=along
            )
    if positives is not None:
        for at, slope in zip(positives.places, positives.slopes, strict=True):
            add_pairs(call, engine, unit, at, slope, d_rows, d_columns, scale)
    return None if d_columns is None else call.as_columns(d_columns)
