"""Driver of ``nearest`` losses over classes: each row against its k nearest wrong columns.

One GEMM: a search streams the columns once and keeps, per row, the k largest cosines with wrong
columns, where they are, and the target's cosine. Everything after it has N x k numbers, and the
backward pass touches the N (k + 1) unit columns that it found, not all M.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import LossSpec, Triplet
from . import variables
from .call import Call, Gradients, Result, clear_ignored, not_finite
from .columns import columns_of, tile_columns
from .engine import ClassTile, Engine, Nearest, part
from .scattered import add_pairs, stream_pairs
from .shards import NONE
from .tiles import against_columns
from .values import Variables


def triplet_of(spec: LossSpec) -> Triplet:
    assert spec.triplet is not None
    return spec.triplet


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Cosines and positions of the k nearest, and the target's cosine."""
    return 2 * triplet_of(spec).count(params) + 1


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (2 k + 1, N) state; the int32 positions are kept as the floats of their bits."""
    count = triplet_of(call.spec).count(call.params)
    unit, inverse_norms = engine.normalize_rows(call.rows, 0, call.rows.shape[0])
    values = variables.of_call(call, engine, unit, inverse_norms)
    best, position, target_cosine = search(call, engine, count, unit)
    if call.shards is not None:
        best, position = call.shards.nearest(best, position)
        target_cosine = call.shards.sum(target_cosine)
    terms = _scored(call, position)
    of_rows = variables_of_terms(call, values)
    loss = per_row(call, terms, best, target_cosine[:, None], of_rows)
    loss = loss + not_finite(call, inverse_norms)
    if values is not None:
        loss = loss + variables.not_finite(call, values)
    loss = loss + target_cosine * 0.0  # NaN without any wrong column, too
    clear_ignored(call, loss)
    # The bits of -1, no position, would be those of a NaN.
    places = (position + 1).view(torch.float32)
    state = torch.cat([best.T, places.T, target_cosine[None]])
    return Result(engine.reduced(call, loss), state, Gradients())


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses."""
    count = triplet_of(call.spec).count(call.params)
    best, position, target_cosine = state.split([count, count, 1])
    position = position.view(torch.int32) - 1
    unit, inverse_norms = engine.normalize_rows(call.rows, 0, call.rows.shape[0])
    values = variables.of_call(call, engine, unit, inverse_norms)
    terms = _scored(call, position.T)
    of_rows = variables_of_terms(call, values)
    of_nearest, of_target, *by_variables = slopes_of(call, terms, best.T, target_cosine.T, of_rows)
    # Without shards, places beyond the number of columns are never filled.
    filled = count if call.shards is not None else min(count, call.num_columns)
    places = torch.cat([position[:filled], call.row_labels[None].to(torch.int32)])
    slopes = torch.cat([of_nearest.T[:filled], of_target[None]]) * weights
    slopes = torch.where(weights * (places >= 0) == 0, 0.0, slopes)
    d_values = None
    if values is not None:
        # Only the shard with the row's target has its part.
        here = torch.where(call.row_labels >= 0, weights, 0.0)
        by_variables = [torch.where(here == 0.0, 0.0, here * by) for by in by_variables]
        of_terms = variables.by_rows(call, values, by_variables)
        d_values = variables.joined(call, values, of_terms, None)
    return _gradients(call, engine, unit, inverse_norms, places, slopes, d_values)


def search(call: Call, engine: Engine, count: int, unit: Tensor | None = None) -> Nearest:
    """The ``count`` largest cosines of each row with columns that are not its target.

    Positions are -1 where there are fewer; a row without a target has 0 as the target's cosine.
    """
    rows = call.rows
    size = rows.shape[0]
    if unit is None:
        unit, _ = engine.normalize_rows(rows, 0, size)
    found = Nearest(
        best=rows.new_full((size, count), -torch.inf, dtype=torch.float32),
        position=rows.new_full((size, count), -1, dtype=torch.int32),
        target_cosine=rows.new_zeros(size, dtype=torch.float32),
    )
    for panel in against_columns(columns_of(call), size, engine.class_block):
        columns = tile_columns(engine, panel)
        for block in panel.rows:
            tile = ClassTile(
                unit[block],
                columns.matrix,
                call.row_labels[block],
                panel.columns.start,
                b_factors=columns.factors,
            )
            engine.nearest_tile(tile, part(found, block))
    return found


class Scored(NamedTuple):
    """(N, k) bool, which of the nearest have a term, and (N, 1) what their sum is divided by."""

    taken: Tensor
    divisor: Tensor | int


def scored(call: Call, found: Tensor, has_target: Tensor) -> Scored:
    """``found`` (N, k): whether there are so many; a row without a target, (N, 1), has no term."""
    adds = triplet_of(call.spec).adds(call.params)
    divisor = 1 if adds else found.sum(dim=1, keepdim=True).clamp(min=1)
    return Scored(found & has_target, divisor)


def _scored(call: Call, position: Tensor) -> Scored:
    """The terms of a call; with shards, a target may be in another one."""
    has_target = call.row_labels >= 0 if call.shards is None else call.row_labels != -1
    return scored(call, position != NONE, has_target[:, None])


def variables_of_terms(call: Call, values: Variables | None) -> list[Tensor]:
    """Variables that terms read: () of scalars and (N, 1)."""
    found = [] if values is None else values.of_rows(call)
    return [value if value.dim() == 0 else value[:, None] for value in found]


def per_row(
    call: Call, terms: Scored, nearest: Tensor, target: Tensor, of_rows: list[Tensor]
) -> Tensor:
    """(N,) losses from cosines of the nearest (N, k) and of the targets (N, 1)."""
    taken, divisor = terms
    nearest = torch.where(taken, nearest, 0.0)
    values = triplet_of(call.spec).value(nearest, target, call.params, of_rows)
    return (torch.where(taken, values, 0.0) / divisor).sum(dim=1)


def slopes_of(
    call: Call, terms: Scored, nearest: Tensor, target: Tensor, of_rows: list[Tensor]
) -> list[Tensor]:
    """d row loss / d cosine of the nearest (N, k), of the target (N,), and by variables (N,)."""
    taken, divisor = terms
    nearest = torch.where(taken, nearest, 0.0)
    slopes = triplet_of(call.spec).slopes(nearest, target, call.params, of_rows)
    of_nearest, *others = (torch.where(taken, slope, 0.0) / divisor for slope in slopes)
    return [of_nearest, *(slope.sum(dim=1) for slope in others)]


def _gradients(
    call: Call,
    engine: Engine,
    unit: Tensor,
    inverse_norms: Tensor,
    places: Tensor,
    slopes: Tensor,
    d_values: Variables | None,
) -> Gradients:
    """From d loss / d cosine ``slopes`` of every row with the columns at ``places``, (k + 1, N),
    and gradients of all variables.

    One column per row at a time: N x D of memory whatever k is.
    """
    rows, columns = call.rows, call.columns
    assert columns is not None
    size, width = rows.shape
    d_rows = rows.new_zeros((size, width), dtype=torch.float32) if call.need_rows else None
    d_columns = None
    if call.need_columns and call.sink is None:
        d_columns = rows.new_zeros((call.num_vectors, width), dtype=torch.float32)
    for place, slope in zip(places, slopes, strict=True):
        add_pairs(call, engine, unit, place, slope, d_rows, d_columns)
    if call.sink is not None:
        stream_pairs(call, engine, unit, places, slopes)
    if d_rows is not None:
        engine.normalize_rows_backward(d_rows, rows, 0, inverse_norms, d_rows)
        if d_values is not None:
            variables.add_norms(call, d_values, d_rows, unit, inverse_norms, None)
        clear_ignored(call, d_rows)
    d_variables = None
    if d_values is not None and call.need_variables:
        d_variables = variables.of_given(call, d_values, None)
    if d_columns is not None:
        d_columns = call.as_columns(d_columns)
    return Gradients(d_rows, d_columns, None, d_variables)
