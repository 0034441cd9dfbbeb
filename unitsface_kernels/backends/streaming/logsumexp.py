"""Driver of ``logsumexp`` losses over classes: one positive per row, every other column negative.

Pass 1 streams the columns once and keeps, per row, the negatives' log-sum-exp and the target's
cosine. Pass 2 turns the cosines of each tile into both gradients. Where it gets them from: from the
memory of the columns' gradient, in which pass 1 may leave the cosines of the first D rows, since a
tile of the gradient is finished after the tile of cosines has been used; three products instead of
four. Else they are multiplied again. Tiles that contribute nothing can be left out of pass 2.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import LossSpec
from .call import Call, Gradients, Result, clear_ignored, split_weights
from .columns import finish_columns
from .engine import Engine
from .scattered import Targets, add_pairs
from .skipping import heavy_rows, negligible, worth_taking


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Log-sum-exp of the negatives, their share in the softmax, slope of the target's logit."""
    return 3


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (3, N) state."""
    log_negatives, target_cosine = _statistics(call, engine)
    if call.shards is not None:
        log_negatives, target_cosine = call.shards.log_of_sums(log_negatives, target_cosine)
    per_row, share, slope = _finish_rows(call, engine, log_negatives, target_cosine)
    loss = per_row
    if call.reduction != "none":
        loss = per_row.sum()
        if call.reduction == "mean":
            loss = loss / call.counted()
    return Result(loss, torch.stack([log_negatives, share, slope]), (None, None, None))


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses."""
    log_negatives, share, slope = state.unbind(0)
    weights, scale = split_weights(call, weights)
    negative_weight = torch.where(call.ignored, 0.0, weights * share)
    # An exact product even where the share underflows: 0 times a finite slope.
    target_gradient = -negative_weight * slope
    masses = None
    if call.cache is not None and call.cache.tile_sums is not None:
        maximum, total = call.cache.tile_sums
        masses = share * total * torch.exp(maximum - log_negatives)
        masses = torch.where((total == 0.0) | (negative_weight == 0.0), 0.0, masses)
    return _gradients(call, engine, log_negatives, negative_weight, target_gradient, scale, masses)


def _tiles(count: int, block: int) -> list[slice]:
    return [slice(first, min(first + block, count)) for first in range(0, count, block)]


def _kept(cosines: Tensor, columns: slice, rows: slice) -> Tensor | None:
    """(n, m) part of the memory of the columns' gradient for a tile's cosines, if it fits."""
    if rows.stop > cosines.shape[1]:
        return None
    tile = cosines[columns]
    width = tile.shape[0]
    return tile.view(-1)[rows.start * width : rows.stop * width].view(-1, width)


def _keeps(call: Call, engine: Engine) -> bool:
    if call.cache is None or not call.need_columns or not engine.keeps_cosines:
        return False
    assert call.columns is not None
    return call.columns.dtype == torch.float32


def _statistics(call: Call, engine: Engine) -> tuple[Tensor, Tensor]:
    rows = call.rows
    count = rows.shape[0]
    unit, _ = engine.normalize_rows(rows, 0, count)
    clear_ignored(call, unit)
    assert call.columns is not None
    row_block, column_block = engine.class_block
    tiles, blocks = _tiles(call.num_columns, column_block), _tiles(count, row_block)
    # One sum per tile, so that it is known how little each contributes.
    maximum = rows.new_full((len(tiles), count), -torch.inf, dtype=torch.float32)
    total = rows.new_zeros((len(tiles), count), dtype=torch.float32)
    target_cosine = rows.new_zeros(count, dtype=torch.float32)
    cosines = None
    if _keeps(call, engine):
        cosines = rows.new_empty((call.num_columns, rows.shape[1]), dtype=torch.float32)
    for tile_maximum, tile_total, tile in zip(maximum, total, tiles, strict=True):
        columns, _ = engine.normalize_rows(
            call.columns, tile.start, tile.stop, call.column_index, reuse=True
        )
        for block in blocks:
            engine.logsumexp_tile(
                unit[block],
                columns,
                call.row_labels[block],
                tile.start,
                tile_maximum[block],
                tile_total[block],
                target_cosine[block],
                None if cosines is None else _kept(cosines, tile, block),
            )
    if call.cache is not None:
        call.cache.blocks = (row_block, column_block)
        call.cache.cosines = cosines
        call.cache.tile_sums = (maximum, total) if call.filters else None
    return _log_of_sums(maximum, total), target_cosine


def _log_of_sums(maximum: Tensor, total: Tensor) -> Tensor:
    """(N,) log of the tiles' sums together; -inf, not NaN, for a row without negatives."""
    if maximum.shape[0] == 0:
        return maximum.new_full(maximum.shape[1:], -torch.inf)
    highest = maximum.amax(dim=0)
    total = torch.where(total == 0.0, 0.0, total * torch.exp(maximum - highest)).sum(dim=0)
    return torch.where(total == 0.0, -torch.inf, highest + torch.log(total))


def _finish_rows(
    call: Call, engine: Engine, log_negatives: Tensor, target_cosine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: loss, share q of the negatives in the softmax, and d logit / d cosine.

    With N = log sum of the negatives and z the target's logit, the loss is softplus(N - z) and
    q = sigmoid(N - z). A row whose target is elsewhere has loss N and q = 1.
    """
    logits, slope = engine.positive_rows(target_cosine)
    # Of shards together every row that takes part has its target.
    has_target = call.row_labels >= 0 if call.shards is None else call.row_labels != -1
    gap = log_negatives - logits
    per_row = torch.where(has_target, -F.logsigmoid(-gap), log_negatives)
    share = torch.where(has_target, torch.sigmoid(gap), 1.0)
    per_row = torch.where(call.ignored, 0.0, per_row)
    return per_row, share, slope


@dataclass
class _Rows:
    """What the second pass needs of its rows."""

    unit: Tensor
    labels: Tensor
    log_negatives: Tensor
    negative_weight: Tensor
    target_gradient: Tensor

    def part(self, rows: slice) -> _Rows:
        return _Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def chosen(self, index: Tensor, unit: Tensor) -> _Rows:
        """Some rows; ``unit``: theirs, from the engine, which may pad rows in memory."""
        others = (getattr(self, field.name)[index] for field in fields(self)[1:])
        return _Rows(unit, *others)


def _gradients(
    call: Call,
    engine: Engine,
    log_negatives: Tensor,
    negative_weight: Tensor,
    target_gradient: Tensor,
    scale: Tensor | None,
    masses: Tensor | None,
) -> Gradients:
    columns = call.columns
    assert columns is not None
    count, size = call.rows.shape
    unit, inverse_norms = engine.normalize_rows(call.rows, 0, count)
    clear_ignored(call, unit)
    rows = _Rows(unit, call.row_labels, log_negatives, negative_weight, target_gradient)
    d_rows = unit.new_zeros((count, size), dtype=torch.float32) if call.need_rows else None
    cosines = None if call.cache is None else call.cache.take_cosines()
    d_columns = cosines
    if call.need_columns and d_columns is None and call.sink is None:
        # Every tile writes its columns; zeroing all C x D first costs time.
        d_columns = columns.new_empty((call.num_columns, size))
    if masses is None:
        _stream(call, engine, rows, None, scale, cosines, None, None, d_rows, d_columns)
    else:
        # Targets lie scattered over all tiles: on their own, they are in none's way.
        rows.target_gradient = torch.zeros_like(target_gradient)
        slopes = torch.where(call.row_labels >= 0, target_gradient, 0.0)
        targets = None
        if call.need_columns:
            targets = Targets(call, engine, unit, call.row_labels, slopes)
        wanted = heavy_rows(masses, call.skip_tolerance)
        if not worth_taking(len(wanted), count):
            wanted = torch.arange(count, device=unit.device)
            some = unit
        else:
            some, _ = engine.normalize_rows(call.rows, 0, len(wanted), wanted)
        part = None if d_rows is None else d_rows.new_zeros((len(wanted), size))
        _stream(
            call,
            engine,
            rows.chosen(wanted, some),
            wanted,
            scale,
            cosines,
            masses[:, wanted],
            targets,
            part,
            d_columns,
        )
        if d_rows is not None and part is not None:
            d_rows[wanted] = part
        add_pairs(call, engine, unit, call.row_labels, slopes, d_rows, None)
    if d_rows is not None:
        engine.normalize_rows_backward(d_rows, call.rows, 0, inverse_norms, d_rows, scale)
        clear_ignored(call, d_rows)
    return d_rows, d_columns, None


def _stream(
    call: Call,
    engine: Engine,
    rows: _Rows,
    taken: Tensor | None,
    scale: Tensor | None,
    cosines: Tensor | None,
    masses: Tensor | None,
    targets: Targets | None,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
) -> None:
    """Gradients of ``rows`` (n of N, the ones at ``taken``) into (n, D) and (M, D).

    ``targets``: what to add to the columns' gradient.
    """
    assert call.columns is not None
    row_block, column_block = engine.class_block
    if call.cache is not None and (cosines is not None or masses is not None):
        row_block, column_block = call.cache.blocks
    count = rows.unit.shape[0]
    tiles, blocks = _tiles(call.num_columns, column_block), _tiles(count, row_block)
    skipped = [[False] * len(tiles) for _ in blocks]
    if masses is not None:
        skipped = [negligible(masses[:, block], call.skip_tolerance) for block in blocks]
    found = [slice(0, 0)] * len(tiles) if targets is None else targets.parts(tiles)
    for number, tile in enumerate(tiles):
        wanted = [block for block, skip in zip(blocks, skipped, strict=True) if not skip[number]]
        if not wanted:
            finish_columns(call, engine, tile, None, None, d_columns, scale)
            if targets is not None and d_columns is not None:
                targets.write(found[number], d_columns, scale)
            continue
        unit_columns, column_norms = engine.normalize_rows(
            call.columns, tile.start, tile.stop, call.column_index, reuse=True
        )
        d_unit = None
        for block in wanted:
            part = rows.part(block)
            gradient = engine.logsumexp_gradient_tile(
                part.unit,
                unit_columns,
                part.labels,
                tile.start,
                part.log_negatives,
                part.negative_weight,
                part.target_gradient,
                None if cosines is None else _taken(cosines, tile, block, taken, call),
            )
            if d_rows is not None:
                engine.accumulate(d_rows[block], gradient, unit_columns)
            if call.need_columns:
                if d_unit is None:
                    d_unit = engine.overwrite(gradient.T, part.unit)
                else:
                    engine.accumulate(d_unit, gradient.T, part.unit)
        if targets is not None and d_unit is not None:
            targets.add(found[number], tile, d_unit)
        finish_columns(call, engine, tile, d_unit, column_norms, d_columns, scale)


def _taken(
    cosines: Tensor, tile: slice, block: slice, taken: Tensor | None, call: Call
) -> Tensor | None:
    """A tile's cosines as the first pass left them, or a copy of the rows that are taken."""
    if taken is None or len(taken) == call.rows.shape[0]:
        return _kept(cosines, tile, block)
    everything = _kept(cosines, tile, slice(0, call.rows.shape[0]))
    if everything is None:
        return None
    width = everything.shape[1]
    rows = taken[block]
    # Not over the cosines of rows that another block may want.
    assert call.cache is not None
    workspace = call.cache.workspace(len(rows) * width, cosines)
    return torch.index_select(everything, 0, rows, out=workspace.view(-1, width))
