"""The samples of a rank among those of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .collectives import Group, own_rank


@dataclass(frozen=True)
class Batch:
    """Samples that ranks have gathered, or those of one process.

    Attributes:
        feats: (n, D) features of this rank, with their graph.
        labels: (n,) their labels.
        every_feats: (N, D) features of all ranks, without graph.
        every_labels: (N,) their labels.
        counts: every rank's n; of one process its own.
        group: the ranks.
    """

    feats: Tensor
    labels: Tensor
    every_feats: Tensor
    every_labels: Tensor
    counts: Sequence[int]
    group: Group = None

    @classmethod
    def alone(cls, feats: Tensor, labels: Tensor) -> Batch:
        """The batch of this process, whatever other ranks have."""
        return cls(feats, labels, feats.detach(), labels, [len(labels)])

    @property
    def across_ranks(self) -> bool:
        return len(self.counts) > 1

    @property
    def start(self) -> int:
        """Place of the own samples among all."""
        return sum(self.counts[: own_rank(self.group)]) if self.across_ranks else 0
