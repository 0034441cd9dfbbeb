"""The other ranks of a process group, as the drivers see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

#: Slices of the rows of all ranks, which lie in rank order, and their features.
Blocks = Iterator[tuple[slice, Tensor]]


class Ranks(Protocol):
    """The other ranks of a process group.

    Every rank makes the same calls in the same order and exhausts the blocks that it requests.

    Attributes:
        num_valid_rows: () float32 number of rows of all ranks that have a loss, at least 1.
        weights: (T,) float32 upstream gradients of the losses of the T rows of all ranks; None:
            columns are a memory, or the pass has no weights.
    """

    @property
    def num_valid_rows(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor | None: ...

    def blocks(self) -> Blocks:
        """Begins to exchange features; a block is valid until the next one is requested."""

    def gather(self, own: Tensor) -> Tensor:
        """(T, ...) concatenation of every rank's ``own`` rows."""

    def own_sums(self, everyone: Tensor) -> Tensor:
        """(N, ...) own rows of the sum of every rank's (T, ...)."""

    def total(self, own: Tensor) -> Tensor:
        """The sum of every rank's ``own``."""


class Towers(NamedTuple):
    """The other ranks of a call with ``both``, of which each has rows and columns of its own.

    Attributes:
        rows, columns: the exchanges of either; ``rows`` has the number of all losses.
        row_labels, column_labels: (T,), (U,) of those of all ranks.
    """

    rows: Ranks
    columns: Ranks
    row_labels: Tensor
    column_labels: Tensor

    def weights(self) -> list[Tensor]:
        """Upstream gradients of the losses of all ranks' rows, and of their columns."""
        found = [side.weights for side in (self.rows, self.columns)]
        assert found[0] is not None
        assert found[1] is not None
        return [found[0], found[1]]
