"""Variables that follow from features and labels: norms, targets' cosines, numbers of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...policy.variable import COLUMN_NORM, NEGATIVES, POSITIVES, ROW_NORM, WITH_POSITIVES
from .call import Call
from .columns import add_norms_of_columns, columns_of, unit_columns
from .engine import Engine
from .scattered import cosines_at
from .tiles import against_columns
from .values import across_ranks


def column_norms(call: Call, engine: Engine) -> Tensor:
    """(M,) of the columns, 1 of those that take no part; they are read once more for them."""
    found = call.rows.new_ones(call.num_columns, dtype=torch.float32)
    for panel in against_columns(columns_of(call), 0, engine.class_block):
        _, inverse_norms = unit_columns(engine, panel)
        found[panel.columns] = 1.0 / inverse_norms
    return found if call.column_labels is None else torch.where(call.column_labels < 0, 1.0, found)


def per_row(call: Call) -> Tensor:
    """(3,) numbers of positive and of negative pairs, and of rows with a positive, of all ranks, at
    least 1, over that of the rows that a mean is taken of.
    """
    counts = torch.stack(call.pair_counts)
    if call.shards is not None:
        counts = call.shards.sum(counts)
    counts = torch.cat([counts, counts[:1].clamp(max=1)])
    totals = counts.sum(dim=1)
    if call.ranks is not None:
        # Each rank's own rows, wherever the columns come from.
        totals = call.ranks.total(totals)
    return totals.clamp(min=1).to(torch.float32) / call.num_valid_rows()


def add_column_norms(
    call: Call, engine: Engine, slopes: Tensor | None, d_columns: Tensor, scale: Tensor | None
) -> None:
    """Adds ``slopes`` by the norms of columns, which are no rows, to their gradient (M, D)."""
    if slopes is None:
        return
    slopes = slopes if scale is None else slopes * scale
    for panel in against_columns(columns_of(call), 0, engine.class_block):
        _, inverse_norms = unit_columns(engine, panel)
        own = panel.columns
        add_norms_of_columns(call, own, inverse_norms, d_columns[own], slopes[own])


_COUNTS = POSITIVES, NEGATIVES, WITH_POSITIVES


def _norms(call: Call, inverse_norms: Tensor) -> Tensor:
    norms = inverse_norms.reciprocal().masked_fill_(call.ignored, 1.0)
    if not across_ranks(call):
        return norms
    assert call.ranks is not None
    return call.ranks.gather(norms)


def computed_value(
    name: str, call: Call, engine: Engine, unit: Tensor, inverse_norms: Tensor
) -> Tensor:
    """A variable that is not given: (N,), (M,) or ()."""
    if name == ROW_NORM or (name == COLUMN_NORM and call.columns is None):
        return _norms(call, inverse_norms)
    if name == COLUMN_NORM:
        return column_norms(call, engine)
    if name in _COUNTS:
        return per_row(call)[_COUNTS.index(name)]
    return target_cosines(call, engine, unit)


def target_cosines(call: Call, engine: Engine, unit: Tensor) -> Tensor:
    """(N,) float32 cosines of the rows with their classes, 0 without one; of all shards."""
    cosines = unit.new_zeros(unit.shape[0], dtype=torch.float32)
    if call.num_columns:
        products = cosines_at(call, engine, unit, target_places(call))
        cosines = torch.where(call.row_labels >= 0, products, cosines)
    return cosines if call.shards is None else call.shards.sum(cosines)


def target_places(call: Call) -> Tensor:
    """(N,) positions of the targets among the columns, 0 without one."""
    return call.row_labels.clamp(0, max(call.num_columns - 1, 0))
