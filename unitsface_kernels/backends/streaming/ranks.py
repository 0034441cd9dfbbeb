"""Batches of other ranks, as the drivers of pair losses see them: one block after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

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
