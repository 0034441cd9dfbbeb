"""Verification over all pairs: true accept rates at false accept rates, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import validate
from ..backends.histogram import Binning
from .order_statistics import ScorePartition
from .tiles import Scores

DEFAULT_FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class TarAtFar:
    """See :func:`tar_at_far`; one entry per requested rate.

    Attributes:
        far: (F,) float64, the requested rates.
        threshold: (F,) float32; a pair is accepted if its score is at least this.
        tar: (F,) float64 share of the positive pairs that are accepted.
        achieved_far: (F,) float64 share of the negative pairs that are accepted, at most ``far``.
        num_positives, num_negatives: pairs of one and of two identities.
    """

    far: Tensor
    threshold: Tensor
    tar: Tensor
    achieved_far: Tensor
    num_positives: int
    num_negatives: int


def _accepted_at_most(far: float, negatives: int) -> int:
    """The largest count with count / negatives <= far in double precision: 29 of 100 for 0.29."""
    count = min(math.floor(far * negatives) + 1, negatives)
    while count / negatives > far:
        count -= 1
    return count


def tar_at_far(
    feats: Tensor,
    labels: Tensor,
    far: float | Sequence[float] = DEFAULT_FARS,
    *,
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    backend: str = "auto",
) -> TarAtFar:
    """True accept rates at given false accept rates over all pairs, exactly.

    A pair is accepted if its score, the float32 cosine that the backend computes, is at least the
    threshold. The threshold is the smallest float32 number that accepts at most ``far`` of the
    negative pairs: with k = the largest count whose share is at most ``far``, the number next above
    the (k + 1)-th largest negative score. So

    - no other threshold within ``far`` accepts more positives;
    - negatives that tie with the (k + 1)-th are all rejected;
    - for ``far`` below one over the number of negatives no negative is accepted;
    - for ``far`` = 1 the threshold is -inf.

    Two to four passes over all pairs serve all rates.

    Args:
        feats: (N, D) raw features; normalized inside.
        labels: (N,) identities; -1 is ignored.
        far: rates in [0, 1].
        other: (M, D) columns to compare with; None: every unordered pair of rows once.
        other_labels: (M,) their identities.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: wrong arguments, no positive or no negative pair, or a pair whose
            cosine is NaN.
    """
    validate.scored_pairs(feats, labels, other, other_labels)
    rates = [far] if isinstance(far, (int, float)) else list(far)
    if not rates:
        raise ValueError("far must have at least one rate, got none")
    for rate in rates:
        validate.number("far", rate)
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"far must be in [0, 1], got {rate}")
    partition = ScorePartition(Scores(feats, labels, other, other_labels, backend))
    positives, negatives = partition.num_positives, partition.num_negatives
    validate.both_kinds(positives, negatives)
    ranks = [_accepted_at_most(rate, negatives) + 1 for rate in rates]
    # A rank beyond the last negative: all are accepted, and the index is not used.
    index = partition.kth_largest([min(r, negatives) for r in ranks], negative=True)
    everything = torch.tensor(ranks) > negatives
    above = partition.at_or_above()
    accepted = torch.where(everything, above[:, :1], above[:, index + 1])
    rejected = partition.thresholds()[index]
    threshold = torch.nextafter(rejected, torch.tensor(torch.inf))
    return TarAtFar(
        far=torch.tensor(rates, dtype=torch.float64),
        threshold=threshold.masked_fill(everything, -torch.inf),
        tar=accepted[0].to(torch.float64) / positives,
        achieved_far=accepted[1].to(torch.float64) / negatives,
        num_positives=positives,
        num_negatives=negatives,
    )


def accepted_pairs(scores: Scores, threshold: float) -> tuple[Tensor, Tensor]:
    """(2,) int64 pairs with a score of at least ``threshold`` and (2,) all; positives first."""
    low = torch.tensor(threshold, dtype=torch.float64).to(torch.float32)
    if float(low) < threshold:  # a float32 score reaches the threshold if it reaches this
        low = torch.nextafter(low, torch.tensor(torch.inf))
    value = float(low.clamp(-2.0, 2.0))  # beyond every cosine
    counts = scores.count(Binning(1, value, value + 1.0))
    validate.no_nan_scores(int(counts[:, -1].sum()))
    return counts[:, 1:].sum(dim=1), counts.sum(dim=1)
