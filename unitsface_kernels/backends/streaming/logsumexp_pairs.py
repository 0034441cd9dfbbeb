"""Driver of ``logsumexp`` losses over samples: any number of positives per row, also none.

With z the logits and N_i the log-sum-exp of row i's negatives, a row's loss is the mean over its
positives p of softplus(N_i - z_ip), or N_i itself if positives take no part in the loss. Every pass
streams all tiles: negatives for N, positives for the loss and for Q_i = mean_p sigmoid(N_i - z_ip),
and the gradient. In-batch each tile on or above the diagonal serves both directions of its pairs:
0.5 GEMMs of N x N x D for each pass and 1 for what consumes the gradient. Where reading a label
does not stall a device, the positives' pass visits only pairs that may be positive. Against the
batches of other ranks a tile serves its rows, which get the gradient of both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...losses import LossSpec
from ..dense import zeros
from .call import Blocks, Call, Gradients, Result, clear_ignored, not_finite, split_weights
from .columns import remote_blocks, unit_columns
from .engine import Engine, NegativeSums, PairTile, PairWeights, PositiveSums, part
from .tiles import Columns, Panel, Tile, against_columns, against_ranks, in_batch


@dataclass
class _Operands:
    """Rows and their labels, and those of the columns, which may be the rows.

    Attributes:
        unit: unit rows.
        column_index: the columns that take part; None: all.
        sorted: rows of a batch are in the order of their labels, none of which is ignored.
    """

    unit: Tensor
    labels: Tensor
    column_labels: Tensor
    column_index: Tensor | None = None
    sorted: bool = False


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Log-sum-exp of the negatives, and their mean probability Q."""
    return 2


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (2, N) state: log-sum-exp N of the negatives and probability Q."""
    operands, inverse_norms = _operands(call, engine)
    log_negatives = _log_negatives(call, engine, operands)
    if call.spec.positive is None:
        per_row, negative_prob = log_negatives, torch.ones_like(log_negatives)
    else:
        per_row, negative_prob = _positives(call, engine, operands, log_negatives)
    per_row = torch.where(call.valid_rows, per_row, not_finite(call, inverse_norms))
    clear_ignored(call, per_row)
    loss = per_row
    if call.reduction != "none":
        loss = per_row.sum()
        if call.reduction == "mean":
            loss = loss / call.num_valid_rows()
    return Result(loss, torch.stack([log_negatives, negative_prob]), Gradients())


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses."""
    log_negatives, negative_prob = state.unbind(0)
    weights, scale = split_weights(call, weights)
    # A row without negatives has a constant loss: 0, or -inf.
    live = call.valid_rows & (log_negatives != -torch.inf)
    factors = PairWeights(
        log_negatives=torch.where(live, log_negatives, torch.inf),
        negative=torch.where(live, weights * negative_prob, 0.0),
        positive=torch.where(live, weights / call.pair_counts[0].clamp(min=1), 0.0),
    )
    operands, inverse_norms = _operands(call, engine)
    d_rows = None
    if call.need_rows:
        d_rows = zeros(call.rows, *call.rows.shape)
    d_columns = None
    if call.columns is None:
        _gradients_in_batch(call, engine, operands, factors, d_rows)
    else:
        d_columns = _gradients_against_columns(call, engine, operands, factors, d_rows, scale)
    if d_rows is not None:
        engine.unit_rows_backward(call, d_rows, inverse_norms, scale)
    return Gradients(d_rows, d_columns)


def _operands(call: Call, engine: Engine) -> tuple[_Operands, Tensor]:
    unit, inverse_norms = engine.unit_rows(call)
    if call.columns is None:
        everyone = call.row_labels if call.column_labels is None else call.column_labels
        labels = engine.prepare_labels(call.row_labels, everyone)
    else:
        # An invalid row counts as ignored here, but remains a column of the others.
        labels_of_valid = torch.where(call.valid_rows, call.row_labels, -1)
        labels = engine.prepare_labels(labels_of_valid, call.column_labels)
    return _Operands(unit, *labels), inverse_norms


# --- statistics -----------------------------------------------------------------------------------


def _log_negatives(call: Call, engine: Engine, operands: _Operands) -> Tensor:
    count = call.rows.shape[0]
    sums = NegativeSums(
        maximum=call.rows.new_full((count,), -torch.inf, dtype=torch.float32),
        total=call.rows.new_zeros(count, dtype=torch.float32),
    )
    blocks = remote_blocks(call)
    for tile, rows, columns in _tiles(call, engine, operands):
        engine.pair_negatives_tile(tile, part(sums, rows), _other_side(call, tile, sums, columns))
    for tile, rows, _ in _remote_tiles(engine, operands, blocks):
        engine.pair_negatives_tile(tile, part(sums, rows), None)
    # -inf, not NaN, for a row without negatives.
    return torch.where(sums.total == 0, -torch.inf, sums.maximum + torch.log(sums.total))


def _positives(
    call: Call, engine: Engine, operands: _Operands, log_negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """(N,) means over the positives of softplus(N - z) and of sigmoid(N - z)."""
    blocks = remote_blocks(call)
    own, chosen = operands, None
    if not call.rows.is_cuda:
        own, chosen = _possible_positives(call, engine, operands)
    some = log_negatives if chosen is None else log_negatives[chosen]
    sums = PositiveSums(some, torch.zeros_like(some), torch.zeros_like(some))
    for tile, rows, columns in _tiles(call, engine, own):
        engine.pair_positives_tile(tile, part(sums, rows), _other_side(call, tile, sums, columns))
    if chosen is not None:
        totals = (torch.zeros_like(log_negatives).index_copy(0, chosen, t) for t in sums[1:])
        sums = PositiveSums(log_negatives, *totals)
    possible = None
    if call.ranks is not None and call.columns is None and not call.rows.is_cuda:
        possible = torch.isin(operands.column_labels, operands.labels)
    for tile, rows, _ in _remote_tiles(engine, operands, blocks, possible):
        engine.pair_positives_tile(tile, part(sums, rows), None)
    count = call.pair_counts[0].clamp(min=1)
    return sums.loss / count, sums.negative_prob / count


def _possible_positives(
    call: Call, engine: Engine, operands: _Operands
) -> tuple[_Operands, Tensor | None]:
    """Rows and columns visited by the positives' pass, and the places of its rows; None: all.

    In-batch rows that have a positive, those of one identity next to each other: all but the
    tiles around the diagonal are free of positives. Against a memory the columns of identities
    that occur among the rows: often one in thousands.
    """
    labels, column_labels = operands.labels, operands.column_labels
    if call.columns is None:
        some = torch.nonzero(call.valid_rows).flatten()
        order = some[labels[some].argsort(stable=True)]
        unit, _ = engine.normalize_rows(call.rows, 0, len(order), order)
        return _Operands(unit, labels[order], labels[order], sorted=True), order
    if call.self_offset is not None:
        # The pair that is left out is known by its place.
        return operands, None
    index = torch.nonzero((column_labels >= 0) & torch.isin(column_labels, labels)).flatten()
    return _Operands(operands.unit, labels, column_labels[index], index), None


# --- tiles ----------------------------------------------------------------------------------------


_Sums = TypeVar("_Sums", NegativeSums, PositiveSums)
_Placed = tuple[PairTile, slice, slice]


def _other_side(call: Call, tile: PairTile, sums: _Sums, columns: slice) -> _Sums | None:
    """Statistics of the columns, where a tile serves them as well."""
    return None if call.columns is not None or tile.symmetric else part(sums, columns)


def _tiles(call: Call, engine: Engine, operands: _Operands) -> Iterator[_Placed]:
    """Tiles with the rows of the call, and the places of their rows and columns."""
    if call.columns is None:
        yield from _batch_tiles(engine, operands)
        return
    for tile, rows, columns, _ in _memory_tiles(call, engine, operands):
        yield tile, rows, columns


def _batch_tiles(engine: Engine, operands: _Operands) -> Iterator[_Placed]:
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
        yield tile, rows, columns


def _panel_tiles(
    engine: Engine, operands: _Operands, panel: Panel, labels: Tensor, offset: int | None = None
) -> Iterator[tuple[PairTile, slice, slice, Tensor]]:
    """Also yields the inverse norms of a tile's columns."""
    b, norms = unit_columns(engine, panel)
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
        yield tile, rows, columns, norms


def _memory_tiles(
    call: Call, engine: Engine, operands: _Operands
) -> Iterator[tuple[PairTile, slice, slice, Tensor]]:
    assert call.columns is not None
    labels = operands.column_labels
    columns = Columns(call.columns, operands.column_index, labels.shape[0])
    for panel in against_columns(columns, operands.unit.shape[0], engine.class_block):
        yield from _panel_tiles(engine, operands, panel, labels, call.self_offset)


def _remote_tiles(
    engine: Engine, operands: _Operands, blocks: Blocks, possible: Tensor | None = None
) -> Iterator[_Placed]:
    """Own rows against those of other ranks, of these only the ``possible`` (T,), if given."""
    labels = operands.column_labels if possible is None else operands.column_labels[possible]
    for panel in against_ranks(blocks, operands.unit.shape[0], engine.class_block, possible):
        for tile, rows, columns, _ in _panel_tiles(engine, operands, panel, labels):
            yield tile, rows, columns


# --- gradients ------------------------------------------------------------------------------------


def _gradients_in_batch(
    call: Call, engine: Engine, operands: _Operands, factors: PairWeights, d_rows: Tensor | None
) -> None:
    if d_rows is None:
        return
    everyone = factors
    if call.ranks is not None:
        gathered = call.ranks.gather(torch.stack(factors, dim=1))
        everyone = PairWeights(*gathered.T.contiguous())
    blocks = remote_blocks(call)
    for tile, rows, columns in _batch_tiles(engine, operands):
        gradient = engine.pair_gradient_tile(tile, part(factors, rows), part(factors, columns))
        engine.addmm(d_rows[rows], gradient, tile.b)
        if not tile.symmetric:
            engine.addmm(d_rows[columns], gradient.T, tile.a)
    for tile, rows, columns in _remote_tiles(engine, operands, blocks):
        gradient = engine.pair_gradient_tile(tile, part(factors, rows), part(everyone, columns))
        engine.addmm(d_rows[rows], gradient, tile.b)


def _gradients_against_columns(
    call: Call,
    engine: Engine,
    operands: _Operands,
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
        gradient = engine.pair_gradient_tile(tile, part(factors, rows), None)
        if d_rows is not None:
            engine.addmm(d_rows[rows], gradient, tile.b)
        if d_columns is not None:
            d_unit = d_columns[columns]
            engine.addmm(d_unit, gradient.T, tile.a)
            if rows.stop == count:
                engine.normalize_rows_backward(
                    d_unit, call.columns, columns.start, norms, d_unit, scale
                )
    return d_columns
