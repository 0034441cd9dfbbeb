"""What the passes of a call leave to each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ForwardCache:
    """Data that a forward pass may leave to the backward passes of its call, beside its state.

    Attributes:
        cosines: as the columns, float32, in whose memory lie cosines until the first backward pass
            takes it for the gradient of the columns.
        tile_sums: (tiles, N) float32 sums of every tile of columns, as maximum and total.
        blocks: rows and columns of the tiles of both.
        inverse_norms: (M,) float32 of the columns, where tiles multiply these as they are.
        num_norms: how many of them, from the first, are known.
        num_valid_rows: of ``Call.num_valid_rows``, once it is known.
        pair_counts: of ``Call.pair_counts``, once they are known.
        unit_rows: the rows at unit length and their inverse norms, if they are few.
        unit_columns: the same of the columns, where tiles multiply a copy of them that is small.
        num_units: how many of these, from the first, are there.
        streamed: the gradient of the columns goes to a sink: its memory holds no cosines, and no
            tile is left out of it.
    """

    blocks: tuple[int, int] = (0, 0)
    cosines: Tensor | None = None
    tile_sums: tuple[Tensor, Tensor] | None = None
    inverse_norms: Tensor | None = None
    num_norms: int = 0
    num_valid_rows: Tensor | None = None
    pair_counts: tuple[Tensor, Tensor] | None = None
    unit_rows: tuple[Tensor, Tensor] | None = None
    unit_columns: tuple[Tensor, Tensor] | None = None
    num_units: int = 0
    streamed: bool = False
    _workspace: Tensor | None = None

    def workspace(self, size: int, like: Tensor) -> Tensor:
        """(size,) float32 that the next caller overwrites."""
        if self._workspace is None or self._workspace.numel() < size:
            self._workspace = like.new_empty(size)
        return self._workspace[:size]

    def take_cosines(self) -> Tensor | None:
        cosines, self.cosines = self.cosines, None
        return cosines
