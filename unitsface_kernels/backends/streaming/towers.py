"""Two towers across ranks: own rows meet the columns of other ranks, and own columns their rows.

A tile of own vectors against those of another rank yields their losses and, of the gradient of both
directions, their part: the other rank has the same pairs for its own. No gradient travels back.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .call import Call, clear_ignored_columns
from .engine import Engine
from .other_ranks import Blocks, Ranks


class Side(NamedTuple):
    """The own vectors of one tower, and the other ranks' of the other tower.

    Attributes:
        unit, inverse_norms: (n, D), (n,) of the own ones.
        labels, other_labels: (n,) and, of all ranks, (U,), as tiles take them.
        losses: place of the own ones among the losses of the call.
        ranks, blocks: the exchange of the others, which has begun.
    """

    unit: Tensor
    inverse_norms: Tensor
    labels: Tensor
    other_labels: Tensor
    losses: slice
    ranks: Ranks
    blocks: Blocks


def sides(call: Call, engine: Engine, unit: Tensor, inverse_norms: Tensor) -> list[Side]:
    """The side of the rows and that of the columns; none without other ranks.

    Args:
        call, engine: of the pass.
        unit, inverse_norms: of :meth:`Engine.unit_rows`.
    """
    if call.towers is None:
        return []
    rows, columns, row_labels, column_labels = call.towers
    assert call.columns is not None
    assert call.column_labels is not None
    count = call.columns.shape[0]
    of_columns, norms_of_columns = engine.normalize_rows(call.columns, 0, count)
    clear_ignored_columns(call, call.column_labels, of_columns)
    own = slice(0, call.rows.shape[0])
    # In the same order on every rank.
    labels = engine.prepare_labels(call.row_labels, column_labels)
    first = Side(unit, inverse_norms, *labels, own, columns, columns.blocks())
    labels = engine.prepare_labels(call.column_labels, row_labels)
    place = call.column_losses
    return [first, Side(of_columns, norms_of_columns, *labels, place, rows, rows.blocks())]


def finish(
    call: Call,
    engine: Engine,
    inverse_norms: Tensor,
    d_columns: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Takes the gradient (M, D) of the unit columns to the columns themselves."""
    if d_columns is None:
        return
    assert call.columns is not None
    engine.normalize_rows_backward(d_columns, call.columns, 0, inverse_norms, d_columns, scale)
    clear_ignored_columns(call, call.column_labels, d_columns)


def gathered(call: Call, vectors: Tensor) -> list[Tensor]:
    """(num_losses, k) numbers of the own losses as those of all ranks: of rows, and of columns."""
    assert call.towers is not None
    parts = vectors.split([call.rows.shape[0], call.num_columns])
    return [side.gather(p.contiguous()) for side, p in zip(call.towers[:2], parts, strict=True)]
