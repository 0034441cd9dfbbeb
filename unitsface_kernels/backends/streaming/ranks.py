"""Batches of other ranks, as the drivers of pair losses see them: one block after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .call import Call
    from .engine import Engine

#: Places of rows among those of all ranks, which lie in rank order, and their features.
Blocks = Iterator[tuple[slice, Tensor]]


class Ranks(Protocol):
    """The other ranks of a process group.

    Every rank makes the same calls in the same order, and exhausts the blocks that it asks for.

    Attributes:
        counted: () float32 number of rows of all ranks that have a loss, at least 1.
        weights: (T,) float32 upstream gradients of the losses of the T rows of all ranks; None:
            columns are a memory, or the pass has no weights.
    """

    @property
    def counted(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor | None: ...

    def blocks(self) -> Blocks:
        """Begins to exchange features; a block is valid until the next one is asked for."""

    def gather(self, own: Tensor) -> Tensor:
        """(T, ...) what every rank has of its own rows."""


def remote_blocks(call: Call) -> Blocks:
    """What else than itself a batch is compared with; nothing without other ranks."""
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
