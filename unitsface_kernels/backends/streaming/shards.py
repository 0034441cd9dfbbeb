"""Row statistics exchanged by ranks that hold different columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...distributed.collectives import (
    Group,
    maximum_over_ranks,
    own_rank,
    start_gather_rows,
    sum_over_ranks,
)
from ...distributed.collectives import world_size as size_of

#: Positions of columns among all ranks': none, and one that another rank holds.
NONE, ELSEWHERE = -1, -2


@dataclass(frozen=True)
class Shards:
    """The columns of a call are this rank's part; every rank has the same rows.

    Statistics of the rows, a few numbers for each, are merged between the passes; the results are
    the same on every rank.
    """

    group: Group

    def sum(self, value: Tensor) -> Tensor:
        return sum_over_ranks(value, self.group)

    def log_of_sums(self, parts: Tensor, target_cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the ranks' sums together, -inf without any, and the targets' cosines, (N,) each.

        Args:
            parts: (N,) log of this rank's sum.
            target_cosine: (N,), 0 on the ranks that do not hold the target.
        """
        highest = maximum_over_ranks(parts, self.group)
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        total, target_cosine = self.sum(
            torch.stack([torch.exp(parts - highest), target_cosine])
        ).unbind(0)
        return torch.where(total == 0.0, -torch.inf, highest + torch.log(total)), target_cosine

    def nearest(self, best: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of all ranks' cosines, as :meth:`Engine.nearest_tile` orders them.

        Args:
            best: (N, k) float32 cosines, descending, -inf where there are fewer columns.
            position: (N, k) int32 among this rank's columns, or NONE.

        Returns:
            The same of all ranks' columns; positions on other ranks are ELSEWHERE.
        """
        count, k = best.shape
        ranks = size_of(self.group)
        pending = [
            start_gather_rows(t, [count] * ranks, self.group)
            for t in (best, (position != NONE).to(torch.int8))
        ]
        # (ranks, N, k) -> (N, ranks * k): smaller ranks hold the smaller classes and come first.
        everyone, found = (
            finish().view(ranks, count, k).transpose(0, 1).reshape(count, ranks * k)
            for finish in pending
        )
        mine = slice(own_rank(self.group) * k, (own_rank(self.group) + 1) * k)
        places = torch.where(found.bool(), ELSEWHERE, NONE).to(torch.int32)
        places[:, mine] = position
        # Stable: of equal cosines the smaller class. NaN is the largest.
        order = everyone.argsort(dim=1, descending=True, stable=True)[:, :k]
        return everyone.gather(1, order), places.gather(1, order)
