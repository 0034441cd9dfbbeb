"""The columns of a call: where they come from, and where the gradient of a tile of them goes."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call, clear_ignored_columns
from .engine import Engine, TileColumns
from .other_ranks import Blocks
from .tiles import Columns, Panel, against_columns


def columns_of(call: Call) -> Columns:
    """All columns of a call that has any of its own."""
    assert call.columns is not None
    return Columns(call.columns, call.vector_index, call.num_columns, call.centers)


def unit_columns(engine: Engine, panel: Panel) -> tuple[Tensor, Tensor]:
    """Unit columns and inverse norms of a panel, valid until those of the next one."""
    return engine.normalize_rows(
        panel.source, panel.part.start, panel.part.stop, panel.index, reuse=True
    )


def norms_of_losses(call: Call, engine: Engine, inverse_norms: Tensor) -> Tensor:
    """(num_losses,) inverse norms of what has losses; ``inverse_norms``: (N,) of the rows."""
    if not call.both:
        return inverse_norms
    panels = against_columns(columns_of(call), 0, engine.class_block)
    # Each overwrites the last.
    return torch.cat([inverse_norms, *(unit_columns(engine, p)[1].clone() for p in panels)])


def tile_columns(engine: Engine, panel: Panel) -> TileColumns:
    """Columns of a panel for tiles against classes, valid until those of the next one."""
    return engine.tile_columns(panel.source, panel.part.start, panel.part.stop, panel.index)


def remote_blocks(call: Call) -> Blocks:
    """Blocks of other ranks' rows that a batch is compared with; empty without other ranks."""
    return iter(()) if call.ranks is None or call.columns is not None else call.ranks.blocks()


def finish_columns(
    call: Call,
    engine: Engine,
    part: slice,
    d_unit: Tensor | None,
    norms: Tensor | None,
    d_columns: Tensor | None,
    scale: Tensor | None,
    raw: bool = False,
    along: Tensor | None = None,
) -> None:
    """Takes the gradient of a tile's unit columns to the columns themselves, and to its place.

    Args:
        part: place of the columns, or of their vectors: :attr:`Panel.part`.
        d_unit: (m, D) float32, overwritten; None: zero.
        norms: (m,) of :meth:`Engine.normalize_rows`, with ``d_unit``.
        d_columns: (M or K, D) gradient of all columns (vectors), unless the call has a sink. Of
            unit columns, as it is, if other ranks' rows have a part of it.
        scale: () factor, or None.
        raw: ``d_unit`` is times ``norms``, see :class:`TileColumns`.
        along: (m,) gradient of the columns' norms.
    """
    if not call.need_columns:
        return
    assert call.columns is not None
    if call.sink is None:
        assert d_columns is not None
        out = d_columns[part]
    else:
        # Without any, a step with zero still decays the weights.
        shape = (part.stop - part.start, call.rows.shape[1])
        out = call.rows.new_empty(shape, dtype=torch.float32) if d_unit is None else d_unit
    if d_unit is None:
        out.zero_()
    elif call.towers is not None:
        out.copy_(d_unit)
    else:
        assert norms is not None
        alone = along is None and call.column_labels is None
        if alone and engine.update_columns(call, part, d_unit, norms, scale, raw):
            return
        engine.normalize_rows_backward(
            d_unit, call.columns, part.start, norms, out, scale, call.vector_index, raw
        )
        if along is not None:
            add_norms_of_columns(call, part, norms, out, along if scale is None else along * scale)
        labels = call.column_labels
        clear_ignored_columns(call, None if labels is None else labels[part], out)
    if call.sink is not None:
        whole = slice(part.start // call.centers, part.stop // call.centers)
        call.sink(whole, call.as_columns(out))


def add_norms_of_columns(
    call: Call, tile: slice, norms: Tensor, out: Tensor, slope: Tensor
) -> None:
    """Adds what the gradient ``slope`` (m,) of the columns' norms is by the columns."""
    assert call.columns is not None
    index = call.column_index
    columns = call.columns[tile] if index is None else call.columns[index[tile]]
    # A clamped norm is constant.
    slope = torch.where(norms >= 1e5, 0.0, slope.to(torch.float32) * norms)
    out.addcmul_(slope[:, None], columns.to(torch.float32))
