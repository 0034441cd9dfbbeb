"""Driver of ``logsumexp`` losses over classes: one positive per row, every other column negative.

Pass 1 streams the columns once and keeps, per row, the negatives' log-sum-exp and the target's
cosine. Pass 2 turns the cosines of each tile into both gradients. Where it gets them from: from the
memory of the columns' gradient, in which pass 1 may leave the cosines of the first D rows, since a
tile of the gradient is finished after the tile of cosines has been used; three GEMMs instead of
four. Else they are multiplied again. Tiles that contribute nothing can be left out of pass 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import CUSTOM, EMPTY, LossSpec
from ..dense import zeros
from . import row_formulas, variables
from .call import Call, Gradients, Result, split_weights
from .columns import columns_of, finish_columns, tile_columns
from .computed import add_column_norms
from .engine import (
    ClassSums,
    ClassTile,
    ClassWeights,
    Engine,
    TileColumns,
    part,
)
from .filtering import (
    add_to_both,
    heavy_rows,
    needed_rows,
    negligible,
    selections,
    worth_taking,
)
from .logsumexps import split_factors
from .scattered import DeviceTargets, Targets, add_pairs
from .selection import RowSelection
from .shards import Shards
from .tiles import against_columns, blocks
from .values import TargetWeights, Variables

#: Cosines of targets -> their logits and d logit / d cosine, all (N,).
Positive = Callable[[Tensor], tuple[Tensor, Tensor]]


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Log-sum-exp of the negatives, their probability, slope of the target's logit; with ``finish``
    its derivative by the target's logit, with variables the target's cosine, by which those of the
    logit are computed again.
    """
    return 3 + (spec.finish is not None) + bool(spec.variables)


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and state of :func:`state_rows`."""
    unit, inverse_norms = engine.unit_rows(call)
    values = variables.of_call(call, engine, unit, inverse_norms)
    sums = _statistics(call, engine, unit, values)
    if call.shards is not None:
        sums = _of_all_shards(call.shards, sums)
    per_row, state = engine.finish_rows(call, sums, values)
    return Result(engine.reduced(call, per_row), state, Gradients())


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses."""
    log_negatives, negative_prob, slope = state[:3].unbind(0)
    if call.spec.finish is None:
        weights, scale = split_weights(call, weights)
        negative_weight, target_weight, targets = engine.row_factors(call, state, weights)
    else:
        both = torch.where(call.ignored, 0.0, weights * torch.stack([negative_prob, state[3]]))
        both, scale = split_factors(call, both)
        weights = weights if scale is None else weights / scale
        negative_weight, target_weight = both.unbind(0)
        targets = target_weight * slope
    if call.spec.name in CUSTOM and call.spec.tiles is None:
        # Where the logits of all negatives are -inf: exp(-inf - inf) is 0.
        log_negatives = log_negatives.masked_fill(log_negatives == -torch.inf, torch.inf)
    masses = None
    of_variables = None
    if call.spec.variables:
        of_variables = TargetWeights(target_weight, state[-1], weights, state[0])
    if call.cache is not None and call.cache.tile_sums is not None:
        maximum, total = call.cache.tile_sums
        share = negative_prob if call.spec.finish is None else negative_prob.abs()
        masses = share * total * torch.exp(maximum - log_negatives)
        masses = torch.where((total == 0.0) | (negative_weight == 0.0), 0.0, masses)
    rows = ClassWeights(log_negatives, negative_weight, targets)
    return _gradients(call, engine, rows, scale, masses, of_variables)


def _kept(cosines: Tensor, columns: slice, rows: slice) -> Tensor | None:
    """(n, m) part of the memory of the columns' gradient for a tile's cosines, if it fits."""
    if rows.stop > cosines.shape[1]:
        return None
    width = columns.stop - columns.start
    first = columns.start * cosines.shape[1] + rows.start * width
    return cosines.as_strided((rows.stop - rows.start, width), (width, 1), first)


def _keeps(call: Call, engine: Engine) -> bool:
    cache = call.cache
    if cache is None or cache.streamed or not call.need_columns or not engine.keeps_cosines:
        return False
    assert call.columns is not None
    return call.columns.dtype == torch.float32


def _statistics(call: Call, engine: Engine, unit: Tensor, values: Variables | None) -> ClassSums:
    """(panels, N) maxima and totals, and (N,) cosines of the targets."""
    rows = call.rows
    count = rows.shape[0]
    streamed = None if values is None else values.streamed(call.spec)
    panels = against_columns(columns_of(call), count, engine.class_block)
    # One sum per tile, so that it is known how little each contributes.
    maximum, total, target_cosine = every = engine.class_sums(call, len(panels))
    cosines = None
    if _keeps(call, engine):
        cosines = rows.new_empty((call.num_vectors, rows.shape[1]), dtype=torch.float32)
    operands = {
        b.start: (unit[b], call.row_labels[b]) for b in blocks(0, count, engine.class_block[0])
    }
    for panel, panel_maximum, panel_total in zip(panels, maximum, total, strict=True):
        columns = tile_columns(engine, panel)
        sums = ClassSums(panel_maximum, panel_total, target_cosine)
        for block in panel.rows:
            tile = _tile(*operands[block.start], columns, panel.columns)
            if cosines is not None:
                tile.cosines = _kept(cosines, panel.part, block)
            if streamed is not None:
                tile.variables = streamed.tile(block, panel.columns)
            engine.logsumexp_tile(tile, part(sums, block))
    if call.cache is not None:
        call.cache.blocks = engine.class_block
        call.cache.cosines = cosines
        filters = call.filters and not call.cache.streamed
        call.cache.tile_sums = (maximum, total) if filters else None
    return every


def _tile(unit: Tensor, targets: Tensor, columns: TileColumns, place: slice) -> ClassTile:
    return ClassTile(unit, columns.matrix, targets, place.start, b_factors=columns.factors)


def _of_all_shards(shards: Shards, sums: ClassSums) -> ClassSums:
    """The sums of all ranks, as those of one panel."""
    own = _log_of_sums(sums.maximum, sums.total)
    log_negatives, target_cosine = shards.log_of_sums(own, sums.target_cosine)
    some = (log_negatives != -torch.inf).to(torch.float32)
    return ClassSums(log_negatives[None], some[None], target_cosine)


def _log_of_sums(maximum: Tensor, total: Tensor) -> Tensor:
    """(N,) log of the tiles' sums together; -inf, not NaN, for a row without negatives."""
    if maximum.shape[0] == 0:
        return maximum.new_full(maximum.shape[1:], -torch.inf)
    highest = maximum.amax(dim=0)
    total = torch.where(total == 0.0, 0.0, total * torch.exp(maximum - highest)).sum(dim=0)
    return torch.where(total == 0.0, -torch.inf, highest + torch.log(total))


def finish_rows(
    call: Call,
    sums: ClassSums,
    positive: Positive | None = None,
    values: Variables | None = None,
) -> tuple[Tensor, Tensor]:
    """:meth:`Engine.finish_rows` in operations of Torch.

    Args:
        call, sums, values: as there.
        positive: a kernel for the targets' logits, for a formula without variables and ``finish``.
    """
    cosine = sums.target_cosine
    if positive is None or values is not None or call.spec.finish is not None:
        of_target = row_formulas.target(call, values, cosine)
    else:
        of_target = positive(cosine)
    if values is None:
        return _finished(call, sums, *of_target, ())
    per_row, state = _finished(call, sums, *of_target, values.of_rows(call))
    more = variables.not_finite(call, values)
    term = row_formulas.regularizer(call, values)
    more = more if term is None else more + term
    return per_row + torch.where(call.ignored, 0.0, more), torch.cat([state, cosine[None]])


def _finished(
    call: Call, sums: ClassSums, logits: Tensor, slope: Tensor, of_rows: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses and state by the targets' logits and d logit / d cosine.

    With N = log sum of the negatives and z the target's logit, the loss is softplus(N - z) and
    q = sigmoid(N - z), or ``finish`` of z and N and its derivatives. A row whose target is
    elsewhere has loss N and q = 1.
    """
    log_negatives = _log_of_sums(sums.maximum, sums.total)
    # All shards together have the target of every row that takes part.
    has_target = call.row_labels >= 0 if call.shards is None else call.row_labels != -1
    finish = call.spec.finish
    if finish is not None:
        target = torch.where(has_target, logits, EMPTY)
        negatives = torch.where(log_negatives == -torch.inf, EMPTY, log_negatives)
        # Also NaN without negatives.
        per_row = finish.value(target, negatives, call.params, of_rows) + logits * 0.0
        per_row = torch.where(has_target, per_row, log_negatives).masked_fill(call.ignored, 0.0)
        by_target, by_negatives, *_ = finish.slopes(target, negatives, call.params, of_rows)
        by_target = torch.where(has_target, by_target, 0.0)
        # Without negatives there is nothing to weigh.
        by_negatives = torch.where(negatives == EMPTY, 0.0, by_negatives)
        by_negatives = torch.where(has_target, by_negatives, 1.0)
        return per_row, torch.stack([log_negatives, by_negatives, slope, by_target])
    gap = log_negatives - logits
    per_row, negative_prob = -F.logsigmoid(-gap), torch.sigmoid(gap)
    if not call.all_labeled:
        per_row = torch.where(has_target, per_row, log_negatives)
        negative_prob = torch.where(has_target, negative_prob, 1.0)
        per_row = torch.where(call.ignored, 0.0, per_row)
    return per_row, torch.stack([log_negatives, negative_prob, slope])


class _Rows(NamedTuple):
    """Inputs of the second pass, by row.

    Attributes:
        taken: (n,) places of these among all rows; None: they are all rows.
        variables, d_variables: that tiles read, and their gradients: those of scalars by row,
            (S, N).
    """

    unit: Tensor
    labels: Tensor
    weights: ClassWeights
    taken: Tensor | None = None
    variables: Variables | None = None
    d_variables: Variables | None = None

    def block(self, place: slice) -> tuple[Tensor, Tensor, ClassWeights]:
        return self.unit[place], self.labels[place], part(self.weights, place)


class _Filter(NamedTuple):
    """Gradient filtering, decided from masses (panels, n), see ``filtering.py``.

    Attributes:
        targets: the columns' side of them, apart: scattered over all tiles, they would keep every
            tile. None: not needed.
        left_out: for a block of rows, which of the panels do without it; None: the device decides.
        selected: for a block of rows, those that each panel needs; None: all.
    """

    targets: Targets | DeviceTargets | None
    left_out: Callable[[slice], list[bool]] | None = None
    selected: Callable[[slice], list[RowSelection]] | None = None


def _gradients(
    call: Call,
    engine: Engine,
    weights: ClassWeights,
    scale: Tensor | None,
    masses: Tensor | None,
    of_variables: TargetWeights | None,
) -> Gradients:
    columns = call.columns
    assert columns is not None
    count, size = call.rows.shape
    unit, inverse_norms = engine.unit_rows(call)
    rows = _Rows(unit, call.row_labels, weights)
    values = d_streamed = factor = None
    if row_formulas.needed_again(call):
        values = variables.of_call(call, engine, unit, inverse_norms)
    if values is not None:
        streamed = values.streamed(call.spec)
        d_streamed = streamed and variables.zeros_by_row(call, streamed, engine.stat_dtype)
        factor = variables.factor(call)
        # All that the gradient of a factor of the logits needs is in that of the rows.
        in_tiles = d_streamed if factor is None else None
        rows = rows._replace(variables=streamed, d_variables=in_tiles)
    d_rows = zeros(unit, count, size) if call.need_rows else None
    cosines = None if call.cache is None else call.cache.take_cosines()
    d_columns = cosines
    if call.need_columns and d_columns is None and call.sink is None:
        # Every tile writes its columns; zeroing all C x D first costs time.
        d_columns = columns.new_empty((call.num_vectors, size))
    if masses is None:
        _stream(call, engine, rows, None, scale, cosines, d_rows, d_columns)
    else:
        slopes = torch.where(call.row_labels >= 0, weights.target, 0.0)
        rows = rows._replace(weights=weights._replace(target=torch.zeros_like(slopes)))
        stream = _stream_by_host if engine.device_filter is None else _stream_by_device
        stream(call, engine, rows, masses, slopes, scale, cosines, d_rows, d_columns)
        add_pairs(call, engine, unit, call.row_labels, slopes, d_rows, None)
    if factor is not None and d_rows is not None:
        assert values is not None
        assert d_streamed is not None
        assert of_variables is not None
        products = torch.linalg.vecdot(d_rows, unit)
        here = torch.where(call.row_labels >= 0, weights.target * of_variables.cosine, 0.0)
        products = torch.where(weights.negative == 0.0, 0.0, products - here)
        d_streamed.scalars.add_(products / values.scalars[factor])
    if d_rows is not None:
        engine.unit_rows_backward(call, d_rows, inverse_norms, scale)
    d_variables = None
    if values is not None and of_variables is not None and row_formulas.need_gradients(call):
        slopes = engine.row_slopes(call, values, of_variables)
        of_targets = variables.of_targets(call, values, slopes)
        d_values = variables.joined(call, values, of_targets, d_streamed)
        if d_columns is not None:
            add_column_norms(
                call, engine, variables.column_norm_slopes(call, d_values), d_columns, scale
            )
        if d_rows is not None:
            variables.add_norms(call, d_values, d_rows, unit, inverse_norms, scale)
        if call.need_variables:
            d_variables = variables.of_given(call, d_values, scale)
    if d_columns is not None:
        d_columns = call.as_columns(d_columns)
    return Gradients(d_rows, d_columns, None, d_variables)


def _stream_by_host(
    call: Call,
    engine: Engine,
    rows: _Rows,
    masses: Tensor,
    slopes: Tensor,
    scale: Tensor | None,
    cosines: Tensor | None,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
) -> None:
    """:func:`_stream` without rows and tiles of small ``masses``; ``slopes``: of targets."""
    count, unit = len(rows.labels), rows.unit
    targets = None
    if call.need_columns:
        targets = Targets(call, engine, unit, call.row_labels, slopes)
    wanted = heavy_rows(masses, call.skip_tolerance)
    if not worth_taking(len(wanted), count):
        wanted = torch.arange(count, device=unit.device)
    else:
        # The engine may pad unit rows in memory: those are its own, not a copy.
        unit, _ = engine.normalize_rows(call.rows, 0, len(wanted), wanted)
    rows = _Rows(unit, rows.labels[wanted], part(rows.weights, wanted), wanted)
    d_some = None if d_rows is None else d_rows.new_zeros((len(wanted), unit.shape[1]))
    some = masses[:, wanted]
    left_out = lambda block: negligible(some[:, block], call.skip_tolerance)  # noqa: E731
    _stream(call, engine, rows, _Filter(targets, left_out), scale, cosines, d_some, d_columns)
    if d_rows is not None and d_some is not None:
        d_rows[wanted] = d_some


def _stream_by_device(
    call: Call,
    engine: Engine,
    rows: _Rows,
    masses: Tensor,
    slopes: Tensor,
    scale: Tensor | None,
    cosines: Tensor | None,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
) -> None:
    """:func:`_stream_by_host` with all tiles launched, of which selected rows take part."""
    targets = None
    if call.need_columns:
        targets = DeviceTargets(engine, rows.unit, rows.labels, slopes)
    needed = needed_rows(masses, call.skip_tolerance)
    selected = lambda block: selections(needed[:, block])  # noqa: E731
    filtering = _Filter(targets, selected=selected)
    _stream(call, engine, rows, filtering, scale, cosines, d_rows, d_columns)


def _stream(
    call: Call,
    engine: Engine,
    rows: _Rows,
    filtering: _Filter | None,
    scale: Tensor | None,
    cosines: Tensor | None,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
) -> None:
    """Gradients of ``rows`` into (n, D) and (M, D)."""
    size, (targets, left_out, selected) = engine.class_block, filtering or _Filter(None)
    if call.cache is not None and (cosines is not None or filtering is not None):
        size = call.cache.blocks
    panels = against_columns(columns_of(call), rows.unit.shape[0], size, left_out)
    found = [slice(0, 0)] * len(panels)
    if targets is not None:
        found = targets.parts([panel.columns for panel in panels])
    # Made once, not for every panel.
    row_blocks = blocks(0, rows.unit.shape[0], size[0])
    operands = {b.start: rows.block(b) for b in row_blocks}
    sums = {b.start: None if d_rows is None else d_rows[b] for b in row_blocks}
    selection: dict[int, list[RowSelection]] = {}
    if selected is not None:
        selection = {b.start: selected(b) for b in row_blocks}
    for number, (panel, own) in enumerate(zip(panels, found, strict=True)):
        place = panel.columns
        if not panel.rows:
            finish_columns(call, engine, panel.part, None, None, d_columns, scale)
            if targets is not None and d_columns is not None:
                targets.write(own, d_columns, scale)
            continue
        columns = tile_columns(engine, panel)
        d_unit = None
        for block in panel.rows:
            unit, labels, weights = operands[block.start]
            tile = _tile(unit, labels, columns, place)
            if cosines is not None:
                tile.cosines = _taken(cosines, panel.part, block, rows.taken, call)
            if rows.variables is not None:
                tile.variables = rows.variables.tile(block, place)
                tile.d_variables = rows.d_variables and rows.d_variables.by_row(block, place)
            if selected is not None:
                tile.selection = selection[block.start][number]
            gradient = engine.logsumexp_gradient_tile(tile, weights)
            given = gradient, unit, columns.matrix, sums[block.start], d_unit
            d_unit = add_to_both(engine, *given, call.need_columns, (tile.selection,) * 2)
        if targets is not None and d_unit is not None:
            targets.add(own, place, d_unit, columns.factors)
        norms, raw = columns.inverse_norms, columns.raw
        finish_columns(call, engine, panel.part, d_unit, norms, d_columns, scale, raw)


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
    # Not over the cosines of rows that another block may need.
    assert call.cache is not None
    workspace = call.cache.workspace(len(rows) * width, cosines)
    return torch.index_select(everything, 0, rows, out=workspace.view(-1, width))
