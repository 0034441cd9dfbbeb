"""Histograms of the scores of all pairs, and the curves that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import validate
from ..backends.histogram import Binning, score_of_key
from .tiles import Scores

LARGEST_BINS = 2**20


@dataclass(frozen=True)
class PairHistogram:
    """Counts of the scores of positive and of negative pairs; see :func:`pair_histogram`.

    Attributes:
        edges: (bins + 1,) float32: the smallest score that is counted in bin k or above, and, last,
            the smallest one above the bins. Uniform in [-1, 1] up to the rounding of float32, and
            exact: a score is at least ``edges[k]`` if and only if it is counted there or above.
        positives: (bins + 2,) int64 pairs of one identity: below ``edges[0]``, in
            [edges[k], edges[k + 1]), and from ``edges[-1]`` on.
        negatives: (bins + 2,) int64 pairs of two identities.
    """

    edges: Tensor
    positives: Tensor
    negatives: Tensor

    @property
    def num_positives(self) -> int:
        return int(self.positives.sum())

    @property
    def num_negatives(self) -> int:
        return int(self.negatives.sum())


@dataclass(frozen=True)
class ROC:
    """Rates of the pairs with a score of at least ``thresholds``; see :func:`roc`.

    Attributes:
        thresholds: (T,) float32, ascending, from -inf on.
        far: (T,) float64 share of the negative pairs that are accepted.
        tar: (T,) float64 share of the positive pairs that are accepted.
    """

    thresholds: Tensor
    far: Tensor
    tar: Tensor


def pair_histogram(
    feats: Tensor,
    labels: Tensor,
    *,
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    bins: int = 4096,
    backend: str = "auto",
) -> PairHistogram:
    """Counts the cosines of all positive and of all negative pairs in uniform bins over [-1, 1].

    One pass over all pairs, in memory that does not depend on N.

    Args:
        feats: (N, D) raw features; normalized inside.
        labels: (N,) identities; -1 is ignored.
        other: (M, D) columns to compare with; None: every unordered pair of rows once.
        other_labels: (M,) their identities.
        bins: their number, up to 2^20.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: wrong arguments, or a pair whose cosine is NaN.
    """
    validate.scored_pairs(feats, labels, other, other_labels)
    validate.positive_int("bins", bins)
    validate.at_most("bins", bins, LARGEST_BINS)
    binning = Binning(bins)
    counts = Scores(feats, labels, other, other_labels, backend).count(binning)
    validate.no_nan_scores(int(counts[:, -1].sum()))
    return PairHistogram(score_of_key(binning.edge_keys), counts[0, :-1], counts[1, :-1])


def roc(histogram: PairHistogram) -> ROC:
    """The curve of true over false accept rates, exact at the edges of the bins.

    A pair is accepted as "same identity" if its score is at least the threshold.

    Raises:
        ValueError: the histogram has no positive or no negative pair.
    """
    validate.both_kinds(histogram.num_positives, histogram.num_negatives)
    rates = []
    for counts in (histogram.negatives, histogram.positives):
        above = counts.flip(0).cumsum(0).flip(0)
        rates.append(above.to(torch.float64) / above[0])
    thresholds = torch.cat([torch.tensor([-torch.inf]), histogram.edges])
    return ROC(thresholds, *rates)
