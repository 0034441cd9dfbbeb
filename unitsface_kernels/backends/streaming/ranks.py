"""Batches of other ranks, as the drivers of pair losses see them: one block after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Blocks, Call
from .engine import Engine


def remote_blocks(call: Call) -> Blocks:
    """Features of other ranks that a batch is compared with; none without other ranks."""
    return iter(()) if call.ranks is None or call.columns is not None else call.ranks.blocks()


def remote_tiles(
    engine: Engine, unit: Tensor, blocks: Blocks, wanted: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Own rows, places among the rows of all ranks, and unit rows of the latter.

    Args:
        engine: of the call.
        unit: own unit rows.
        blocks: of the other ranks.
        wanted: (T,) bool; the other rows are left out, and places are among these. Waits for the
            device.
    """
    row_block, column_block = engine.class_block
    for place, features in blocks:
        index, before, count = None, place.start, features.shape[0]
        if wanted is not None:
            index = torch.nonzero(wanted[place]).flatten()
            before, count = int(wanted[: place.start].sum()), len(index)
        for first in range(0, count, column_block):
            last = min(first + column_block, count)
            unit_columns, _ = engine.normalize_rows(features, first, last, index, reuse=True)
            columns = slice(before + first, before + last)
            for start in range(0, unit.shape[0], row_block):
                yield slice(start, min(start + row_block, unit.shape[0])), columns, unit_columns
