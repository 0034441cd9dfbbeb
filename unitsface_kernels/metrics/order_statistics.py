"""Exact order statistics of the scores of all pairs, in a few passes and without storing scores.

A pass counts scores in intervals of float32 values. An interval that matters is cut in the next
pass, down to single values: a threshold is then exact, ties included, whatever the bins were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import validate
from ..backends.histogram import Binning, score_key, score_of_key
from .tiles import Scores

# Cosines of unrelated features crowd around 0 with a deviation of D^-1/2: their bins have to be
# narrow there, and the counters in use still fit a core's cache.
FIRST_BINS = Binning(2**14)
# Sub-bins of one pass over all its intervals: 16 MB of counters.
SUB_BINS = 2**20
MOST_RANGES = 256


class ScorePartition:
    """Counts of positive and negative scores in disjoint intervals of float32 values.

    Intervals ascend; those without a score are dropped. An interval is ``size`` neighboring
    values, the lowest of which has the key ``low``.
    """

    def __init__(self, scores: Scores, binning: Binning = FIRST_BINS) -> None:
        counts = scores.count(binning)
        validate.no_nan_scores(int(counts[:, -1].sum()))
        self.scores, self.binning = scores, binning
        infinity = int(score_key(torch.tensor(torch.inf)))
        ends = torch.cat(
            [torch.tensor([-infinity]), binning.edge_keys, torch.tensor([infinity + 1])]
        )
        self._keep(ends[:-1], ends.diff(), torch.arange(binning.slots - 1), counts[:, :-1])
        self.num_positives, self.num_negatives = (int(n) for n in self.counts.sum(dim=1))

    def _keep(self, low: Tensor, size: Tensor, bins: Tensor, counts: Tensor) -> None:
        order = low.argsort()
        order = order[counts.sum(dim=0)[order] > 0]
        self.low, self.size, self.bins = low[order], size[order], bins[order]
        self.counts = counts[:, order]

    def at_or_above(self) -> Tensor:
        """(2, E + 1) int64: positives and negatives in each interval and those above it; 0."""
        sums = self.counts.flip(1).cumsum(1).flip(1)
        return torch.cat([sums, sums.new_zeros(2, 1)], dim=1)

    def thresholds(self) -> Tensor:
        """(E + 1,) float32 that accept what :meth:`at_or_above` counts: lowest values; inf."""
        return torch.cat([score_of_key(self.low), torch.tensor([torch.inf])])

    def resolve(self, wanted: Tensor) -> bool:
        """Cuts the intervals of these indices, best first, in one pass; False: all single values.

        One interval of a bin and 256 in all at a time; the others are left for the next pass.
        """
        wanted = wanted[self.size[wanted] > 1]
        if not len(wanted):
            return False
        first_of_bin: dict[int, int] = {}
        for index, place in zip(wanted.tolist(), self.bins[wanted].tolist(), strict=True):
            first_of_bin.setdefault(place, index)
        chosen = torch.tensor(list(first_of_bin.values())[:MOST_RANGES])
        self._cut(chosen)
        return True

    def _cut(self, chosen: Tensor) -> None:
        low, size, bins = self.low[chosen], self.size[chosen], self.bins[chosen]
        budget = (SUB_BINS // len(chosen)).bit_length() - 1
        shift = torch.tensor([max(0, (int(s) - 1).bit_length() - budget) for s in size])
        sub_bins = ((size - 1) >> shift) + 1
        first = sub_bins.cumsum(0) - sub_bins
        range_of_bin = torch.full((self.binning.slots,), -1, dtype=torch.int32)
        range_of_bin[bins] = torch.arange(len(chosen), dtype=torch.int32)
        ranges = torch.stack([low, size, shift, first], dim=1)
        counts = self.scores.count(self.binning, int(sub_bins.sum()), range_of_bin, ranges)
        if not torch.equal(counts.sum(dim=1), self.counts[:, chosen].sum(dim=1)):
            raise RuntimeError("two passes over the same features gave different scores")
        of_range = torch.arange(len(chosen)).repeat_interleave(sub_bins)
        offset = (torch.arange(len(of_range)) - first[of_range]) << shift[of_range]
        width = torch.minimum(torch.ones_like(offset) << shift[of_range], size[of_range] - offset)
        others = torch.ones(len(self.low), dtype=torch.bool)
        others[chosen] = False
        self._keep(
            torch.cat([self.low[others], low[of_range] + offset]),
            torch.cat([self.size[others], width]),
            torch.cat([self.bins[others], bins[of_range]]),
            torch.cat([self.counts[:, others], counts], dim=1),
        )

    def kth_largest(self, ranks: Sequence[int], negative: bool) -> Tensor:
        """(len(ranks),) indices of the single-valued intervals of the scores of these ranks.

        Rank 1 is the largest. All ranks share the passes.
        """
        while True:
            above = self.at_or_above()[int(negative)]
            # The last interval with at least so many scores in it and above.
            index = torch.searchsorted(-above, -torch.tensor(ranks), right=True) - 1
            if not self.resolve(index):
                return index


def kth_largest_score(
    feats: Tensor,
    labels: Tensor,
    ranks: int | Sequence[int],
    *,
    of: str = "negative",
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The scores with these ranks among all positive or all negative pairs, exactly.

    A score is the float32 cosine of a pair as the backend computes it. Equal scores have
    neighboring ranks. Two to four passes over all pairs find any number of ranks.

    Args:
        feats: (N, D) raw features; normalized inside.
        labels: (N,) identities; -1 is ignored.
        ranks: from 1, the largest score, to the number of pairs; several share the passes.
        of: "negative" (different identities) or "positive".
        other: (M, D) columns to compare with; None: every unordered pair of rows once.
        other_labels: (M,) their identities.
        backend: "auto", "native" or "reference".

    Returns:
        (R,) float32 on the CPU, one score per rank.

    Raises:
        ValueError, TypeError: wrong arguments, ranks without a score, a pair whose cosine is NaN.
    """
    validate.scored_pairs(feats, labels, other, other_labels)
    validate.choice("of", of, ("negative", "positive"))
    wanted = [ranks] if isinstance(ranks, int) else list(ranks)
    partition = ScorePartition(Scores(feats, labels, other, other_labels, backend))
    negative = of == "negative"
    count = partition.num_negatives if negative else partition.num_positives
    for rank in wanted:
        validate.positive_int("ranks", rank)
        if rank > count:
            raise ValueError(f"ranks must be <= {count}, the number of {of} pairs, got {rank}")
    if not wanted:
        return torch.empty(0)
    index = partition.kth_largest(wanted, negative)
    return partition.thresholds()[index]
