"""Driver of ``nearest`` losses over samples: a row's hardest positive and k nearest negatives.

A search over all tiles keeps, per row, the smallest cosine with a positive and the k largest with
negatives, and where they are. Everything after it has N (k + 1) numbers. In-batch each tile on or
above the diagonal serves both directions of its pairs: 0.5 GEMMs of N x N x D in all. Tiles of
cosines are searched by operations of Torch, whatever the engine that multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...losses import LossSpec
from . import variables
from .call import Call, Gradients, Result, clear_ignored, not_finite
from .columns import columns_of, remote_blocks, unit_columns
from .engine import Engine
from .nearest import per_row, scored, slopes_of, triplet_of, variables_of_terms
from .scattered import add_pairs, add_rows
from .tiles import Panel, against_columns, against_ranks, in_batch


@dataclass
class _Hardest:
    """What the search found for each row: ``nearest`` (N, k), the largest cosines with negatives in
    descending order, and ``farthest`` (N, 1), minus the smallest with a positive; -inf where there
    are fewer.

    ``negatives`` and ``positives`` are their int64 positions among the columns, or -1. Of equal
    cosines the first that is visited is taken, and NaN before every number.
    """

    nearest: Tensor
    negatives: Tensor
    farthest: Tensor
    positives: Tensor

    def fold(self, rows: slice, cosine: Tensor, same: Tensor, valid: Tensor, start: int) -> None:
        """Folds in a tile (n, m) of new columns, which begin at ``start``."""
        for best, place, values in (
            (self.nearest, self.negatives, cosine.masked_fill(~valid | same, -torch.inf)),
            (self.farthest, self.positives, (-cosine).masked_fill_(~(valid & same), -torch.inf)),
        ):
            some, index = _largest(values, best.shape[1])
            both = torch.cat([best[rows], some], dim=1)
            places = torch.cat([place[rows], index + start], dim=1)
            best[rows], index = _largest(both, best.shape[1])
            place[rows] = places.gather(1, index).masked_fill(best[rows] == -torch.inf, -1)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row and their places, which may be overwritten."""
    found, places = [], []
    for left in reversed(range(count)):
        # The first of equal ones.
        best, place = values.max(dim=1, keepdim=True)
        found.append(best)
        places.append(place)
        if left:
            values.scatter_(1, place, -torch.inf)
    return torch.cat(found, dim=1), torch.cat(places, dim=1)


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Cosines with the k nearest negatives and the hardest positive, and where they are."""
    return 2 * triplet_of(spec).count(params) + 2


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (2 k + 2, N) state; int32 positions are kept as the floats of their bits."""
    unit, inverse_norms = engine.unit_rows(call)
    values = variables.of_call(call, engine, unit, inverse_norms)
    found = _search(call, engine, unit)
    farthest = torch.where(found.positives < 0, 0.0, -found.farthest)
    terms = scored(call, found.negatives >= 0, found.positives >= 0)
    of_rows = variables_of_terms(call, values)
    loss = per_row(call, terms, found.nearest, farthest, of_rows)
    loss = torch.where(call.valid_rows, loss, 0.0) + not_finite(call, inverse_norms)
    if values is not None:
        loss = loss + variables.not_finite(call, values)
    clear_ignored(call, loss)
    places = torch.cat([found.negatives, found.positives], dim=1).to(torch.int32)
    # The bits of -1, no place, would be those of a NaN.
    places = (places + 1).T.contiguous().view(torch.float32)
    state = torch.cat([found.nearest.T, farthest.T, places])
    return Result(engine.reduced(call, loss), state, Gradients())


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses."""
    count = triplet_of(call.spec).count(call.params)
    best, farthest, places = state.split([count, 1, count + 1])
    places = places.contiguous().view(torch.int32).to(torch.int64) - 1
    terms = scored(call, places[:count].T >= 0, places[count:].T >= 0)
    unit, inverse_norms = engine.unit_rows(call)
    values = variables.of_call(call, engine, unit, inverse_norms)
    of_rows = variables_of_terms(call, values)
    of_nearest, of_farthest, *by_variables = slopes_of(call, terms, best.T, farthest.T, of_rows)
    both = torch.cat([of_nearest.T, of_farthest[None]]) * weights
    both = torch.where(weights * (places >= 0) == 0, 0.0, both)
    d_rows, d_columns = _gradients(call, engine, unit, places, both)
    if d_rows is not None:
        engine.unit_rows_backward(call, d_rows, inverse_norms, None)
    if values is None:
        return Gradients(d_rows, d_columns)
    by_variables = [torch.where(call.valid_rows, weights * by, 0.0) for by in by_variables]
    of_terms = variables.by_rows(call, values, by_variables)
    d_values = variables.joined(call, values, of_terms, None)
    if d_rows is not None:
        variables.add_norms(call, d_values, d_rows, unit, inverse_norms, None)
    d_variables = variables.of_given(call, d_values, None) if call.need_variables else None
    return Gradients(d_rows, d_columns, None, d_variables)


# --- search ---------------------------------------------------------------------------------------


def _search(call: Call, engine: Engine, unit: Tensor) -> _Hardest:
    size, count = unit.shape[0], triplet_of(call.spec).count(call.params)
    found = _Hardest(
        nearest=unit.new_full((size, count), -torch.inf, dtype=torch.float32),
        negatives=unit.new_full((size, count), -1, dtype=torch.int64),
        farthest=unit.new_full((size, 1), -torch.inf, dtype=torch.float32),
        positives=unit.new_full((size, 1), -1, dtype=torch.int64),
    )
    labels = call.row_labels
    others = labels if call.column_labels is None else call.column_labels
    if call.columns is None:
        # Remote rows of smaller ranks come first.
        blocks = remote_blocks(call)
        _search_batch(call, engine, unit, found)
        panels: Iterator[Panel] = against_ranks(blocks, size, engine.class_block)
    else:
        panels = iter(against_columns(columns_of(call), size, engine.class_block))
    for panel in panels:
        b, _ = unit_columns(engine, panel)
        for rows in panel.rows:
            cosine = engine.matmul(unit[rows], b.T)
            same, valid = _masks(labels[rows], others[panel.columns])
            if call.columns is not None and call.self_offset is not None:
                _leave_out(valid, rows.start + call.self_offset - panel.columns.start)
            found.fold(rows, cosine, same, valid, panel.columns.start)
    return found


def _search_batch(call: Call, engine: Engine, unit: Tensor, found: _Hardest) -> None:
    own, labels = call.self_offset or 0, call.row_labels
    for place in in_batch(unit.shape[0], engine.sum_block[0]):
        rows, columns = place
        cosine = engine.matmul(unit[rows], unit[columns].T)
        same, valid = _masks(labels[rows], labels[columns])
        if place.symmetric:
            _leave_out(valid, place.diagonal)
        found.fold(rows, cosine, same, valid, columns.start + own)
        if not place.symmetric:
            found.fold(columns, cosine.T, same.T, valid.T, rows.start + own)


def _masks(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) pairs of one identity, and those that take part."""
    return rows[:, None] == columns, (rows >= 0)[:, None] & (columns >= 0)


def _leave_out(valid: Tensor, diagonal: int) -> None:
    if -valid.shape[0] < diagonal < valid.shape[1]:
        valid.diagonal(diagonal).fill_(False)


# --- gradients ------------------------------------------------------------------------------------


def _gradients(
    call: Call, engine: Engine, unit: Tensor, places: Tensor, slopes: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of unit rows and of columns, from d loss / d cosine ``slopes`` (k + 1, N) of every
    row with the columns at ``places``.
    """
    rows = call.rows
    d_rows = rows.new_zeros(rows.shape, dtype=torch.float32) if call.need_rows else None
    d_columns = None
    if call.columns is None:
        if d_rows is not None:
            _in_batch(call, engine, unit, places, slopes, d_rows)
    else:
        if call.need_columns:
            shape = (call.num_columns, rows.shape[1])
            d_columns = rows.new_zeros(shape, dtype=torch.float32)
        for place, slope in zip(places, slopes, strict=True):
            add_pairs(call, engine, unit, place, slope, d_rows, d_columns)
    return d_rows, d_columns


def _in_batch(
    call: Call, engine: Engine, unit: Tensor, places: Tensor, slopes: Tensor, d_rows: Tensor
) -> None:
    """Both sides of every pair; of one with another rank's row each rank has that of its own."""
    start, size = call.self_offset or 0, unit.shape[0]
    own = slice(start, start + size)
    for place, slope in zip(places, slopes, strict=True):
        _add(d_rows, unit, place, slope, own, unit)
        _add_back(d_rows, unit, place, slope, own)
    if call.ranks is None:
        return
    all_places = call.ranks.gather(places.T.contiguous()).T
    all_slopes = call.ranks.gather(slopes.T.contiguous()).T
    for panel in against_ranks(remote_blocks(call), size, engine.class_block):
        b, _ = unit_columns(engine, panel)
        there = panel.columns
        for place, slope in zip(places, slopes, strict=True):
            _add(d_rows, b, place, slope, there, unit)
        for place, slope in zip(all_places[:, there], all_slopes[:, there], strict=True):
            _add_back(d_rows, b, place, slope, own)


def _inside(place: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Whether places lie in a part of the columns, and the places within it."""
    inside = (place >= part.start) & (place < part.stop)
    return inside, (place - part.start).clamp(0, max(part.stop - part.start - 1, 0))


def _add(
    d_rows: Tensor, columns: Tensor, place: Tensor, slope: Tensor, part: slice, like: Tensor
) -> None:
    """Adds to the rows' gradient (N, D) the share of ``columns``, a ``part`` of all columns."""
    inside, index = _inside(place, part)
    taken = (inside & (slope != 0.0))[:, None]
    if len(columns):
        d_rows += torch.where(taken, slope[:, None] * columns[index].to(torch.float32), 0.0)


def _add_back(d_rows: Tensor, others: Tensor, place: Tensor, slope: Tensor, own: slice) -> None:
    """Adds to rows, as columns, the share of ``others`` (n, D), whose columns are at ``place``."""
    inside, index = _inside(place, own)
    taken = (inside & (slope != 0.0))[:, None]
    if len(d_rows):
        share = torch.where(taken, slope[:, None] * others.to(torch.float32), 0.0)
        add_rows(d_rows, index, share)
