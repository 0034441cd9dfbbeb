"""The nearest columns of every row: search in a gallery without the N x M matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import validate
from .tiles import Scores


@dataclass(frozen=True)
class Nearest:
    """See :func:`nearest`.

    Attributes:
        scores: (N, k) float32 cosines, largest first.
        index: (N, k) int64 rows of ``other`` that they belong to.
    """

    scores: Tensor
    index: Tensor


def nearest(feats: Tensor, other: Tensor, k: int, *, backend: str = "auto") -> Nearest:
    """The k largest scores of each row of ``feats`` with all rows of ``other``, exactly.

    A score is the float32 cosine of a pair as the backend computes it. Of equal scores those with
    lower rows of ``other`` come first. One pass over all pairs, in memory O(N k + M); rows of
    ``other`` are read in blocks, so on the CPU they may be a file mapped into memory.

    Args:
        feats: (N, D) raw features; normalized inside.
        other: (M, D) raw features of a gallery.
        k: from 1 to M.
        backend: "auto", "native" or "reference".

    Returns:
        Scores and rows, on the device of ``feats``.

    Raises:
        ValueError, TypeError: wrong arguments, or a cosine that is NaN.
    """
    validate.features("feats", feats)
    validate.features("other", other, feats)
    validate.positive_int("k", k)
    if k > len(other):
        raise ValueError(f"k must be <= {len(other)}, the rows of other, got {k}")
    # Every pair counts: there are no labels.
    labels, other_labels = (torch.zeros(len(x), device=feats.device) for x in (feats, other))
    scores = feats.new_full((len(feats), k), -math.inf, dtype=torch.float32)
    index = feats.new_full((len(feats), k), -1, dtype=torch.int64)
    undefined = 0
    for tile in Scores(feats, labels, other, other_labels, backend).tiles():
        largest = tile.cosines.amax(dim=1)  # NaN if any is
        undefined += int(largest.isnan().sum())
        # Once a few tiles have passed, most rows have no nearer column in one.
        rows = (largest > scores[tile.start : tile.stop, -1]).nonzero()[:, 0]
        if not len(rows):
            continue
        place = tile.start + rows
        columns = torch.arange(tile.other, tile.end, device=feats.device).expand(len(rows), -1)
        both = torch.cat([scores[place], tile.cosines[rows]], dim=1)
        both, order = both.sort(dim=1, descending=True, stable=True)
        scores[place] = both[:, :k]
        index[place] = torch.cat([index[place], columns], dim=1).gather(1, order[:, :k])
    validate.no_nan_scores(undefined)
    return Nearest(scores, index)
