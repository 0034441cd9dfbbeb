"""A threshold for every identity: how unified a unified threshold can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import validate
from ..backends.histogram import Binning, score_of_key
from ..backends.streaming.tiles import blocks
from .tiles import Scores

LARGEST_BINS = 2**12
# Rows whose histograms are held at a time: 17 MB with 1024 bins.
ROWS = 1024


@dataclass(frozen=True)
class IdentityThresholds:
    """See :func:`identity_thresholds`; identities with a positive and a negative pair.

    Attributes:
        identities: (K,) int64 labels, ascending.
        thresholds: (K,) float64 cosines.
        accuracies: (K,) float64 balanced accuracy of each threshold on its identity's pairs.
        mean, std, smallest, largest: of ``thresholds``; the standard deviation is that of the
            population. NaN without an identity.
    """

    identities: Tensor
    thresholds: Tensor
    accuracies: Tensor

    @property
    def mean(self) -> float:
        return float(self.thresholds.mean())

    @property
    def std(self) -> float:
        return float(self.thresholds.std(correction=0)) if len(self.thresholds) else float("nan")

    @property
    def smallest(self) -> float:
        return float(self.thresholds.min()) if len(self.thresholds) else float("nan")

    @property
    def largest(self) -> float:
        return float(self.thresholds.max()) if len(self.thresholds) else float("nan")


def _histograms(
    scores: Scores, labels: Tensor, binning: Binning
) -> Iterator[tuple[Tensor, Tensor]]:
    """Identities and their (K, 2, slots) counts, for rows sorted by label, from 0 up.

    The last identity of a block of rows goes on in the next block.
    """
    carried: tuple[Tensor, Tensor] | None = None
    for part in blocks(0, len(labels), ROWS):
        rows = range(part.start, part.stop)
        identities, place = labels[part].unique_consecutive(return_inverse=True)
        counts = torch.zeros(
            (len(identities), 2, binning.slots), dtype=torch.int64, device=labels.device
        )
        counts.index_add_(0, place, scores.count_rows(rows, binning))
        if carried is not None:
            if bool(carried[0][0] == identities[0]):
                counts[0] += carried[1][0]
            else:
                yield carried
        yield identities[:-1], counts[:-1]
        carried = identities[-1:], counts[-1:]
    if carried is not None:
        yield carried


def _separate(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """(K, 2, bins + 2) counts to the (K,) best thresholds and their balanced accuracies.

    Between well separated pairs many edges are equally good: the middle of the first such run.
    """
    above = counts.flip(2).cumsum(2).flip(2).to(torch.float64)
    rates = above[:, :, 1:] / above[:, :, :1]
    accuracy = (rates[:, 0] + 1.0 - rates[:, 1]) / 2.0
    is_best = accuracy == accuracy.amax(dim=1, keepdim=True)
    first = is_best.to(torch.int8).argmax(dim=1)
    place = torch.arange(accuracy.shape[1], device=counts.device)
    ended = ~is_best & (place > first[:, None])
    stop = torch.where(ended.any(dim=1), ended.to(torch.int8).argmax(dim=1), len(place))
    thresholds = (edges[first] + edges[stop - 1]).to(torch.float64) / 2.0
    return thresholds, accuracy.gather(1, first[:, None])[:, 0]


def identity_thresholds(
    feats: Tensor,
    labels: Tensor,
    *,
    other: Tensor | None = None,
    other_labels: Tensor | None = None,
    bins: int = 1024,
    backend: str = "auto",
) -> IdentityThresholds:
    """Per identity, the cosine threshold that best separates its positive from its negative pairs.

    The pairs of an identity are those of its rows with all columns. Where the thresholds of the
    identities differ, no unified threshold suits all (UniTSFace, NeurIPS 2023, figure 1). "Best" is
    ours: the highest balanced accuracy, (TAR + 1 - FAR) / 2, over the edges of uniform bins. The
    resolution is therefore a bin's width, 2 / bins.

    One pass over all ordered pairs, twice the work of the other figures, in memory that depends
    neither on N nor on the number of identities.

    Args:
        feats: (N, D) raw features; normalized inside.
        labels: (N,) identities; -1 is ignored.
        other: (M, D) columns to compare with; None: the rows themselves, without each row's pair
            with itself.
        other_labels: (M,) their identities.
        bins: over [-1, 1], up to 4096.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: wrong arguments, or a pair whose cosine is NaN.
    """
    validate.scored_pairs(feats, labels, other, other_labels)
    validate.positive_int("bins", bins)
    validate.at_most("bins", bins, LARGEST_BINS)
    binning = Binning(bins)
    edges = score_of_key(binning.edge_keys).to(torch.float64).to(feats.device)
    # One block of rows then holds whole identities, and no histogram outlives its block.
    order = labels.to(torch.int64).argsort(stable=True)
    order = order[labels[order] >= 0]
    ordered = labels.to(torch.int64)[order]
    scores = Scores(feats, ordered, other, other_labels, backend, index=order)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for identities, counts in _histograms(scores, ordered, binning):
        validate.no_nan_scores(int(counts[:, :, -1].sum()))
        pairs = (counts.sum(dim=2) > 0).all(dim=1)
        found.append((identities[pairs], *_separate(counts[pairs, :, :-1], edges)))
    none = (ordered[:0], edges[:0], edges[:0])
    columns = zip(*found, strict=True) if found else [(t,) for t in none]
    return IdentityThresholds(*(torch.cat(list(parts)).cpu() for parts in columns))
