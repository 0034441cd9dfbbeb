"""UNPG: negative pairs of the batch beside the wrong classes of a margin softmax."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..compiling import never_compiled
from ..distributed.batch import Batch
from ..distributed.collectives import own_rank, sum_over_ranks
from ..distributed.pairs import gathered, replicated
from ..losses import EMPTY, unpg
from .call import class_loss, matmul_dtype
from .pair import fused_pair_logsumexp

_UNPG = unpg.SPEC.default
#: Cosines that backends round differently.
_COSINE_ERROR = 1e-6
#: Bounds that leave out no cosine.
_UNBOUNDED = -2.0, 2.0


def fused_unpg_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = _UNPG.scale,
    m1: float | Tensor = _UNPG.m1,
    m2: float | Tensor = _UNPG.m2,
    m3: float | Tensor = _UNPG.m3,
    margin_gradient: str = _UNPG.margin_gradient,
    adaptive_margin: float | Tensor = _UNPG.adaptive_margin,
    whisker: float | None = 1.5,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
) -> Tensor:
    r"""Margin softmax whose denominators also hold the negative pairs of the batch.

    With :math:`z_{iy}` the target's logit, margins included, and every unordered pair of different
    classes once:

    .. math:: L_i = -\log \frac{e^{z_{iy}}}{e^{z_{iy}} + \sum_{c \neq y} e^{s c_{ic}}
                  + \sum_{n \in N'} e^{s n}}

    N' are the cosines within the box-and-whisker bounds
    :math:`[Q_1 - w\,(Q_3 - Q_1),\; Q_3 + w\,(Q_3 - Q_1)]` of all l negative pairs; the quartiles
    are the scores at places floor(l / 4) and floor(3 l / 4) of their ascending order, exactly,
    without storing them. The bounds have no gradient.

    Source: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature Space
    for Face Recognition", BMVC 2022, and its published code. As there, the pairs are those of the
    rank's own batch; :class:`PartialFC` takes those of all ranks together.

    Args:
        feats, weight, labels: as of :func:`fused_margin_softmax_loss`.
        scale: s > 0. Each of these numbers may be a tensor of one element, which may need a
            gradient.
        m1, m2, m3, margin_gradient, adaptive_margin: as of :func:`fused_margin_softmax_loss`.
        whisker: w >= 0, as published 1.5; None keeps every negative pair.
        class_index, reduction, backend, skip_tolerance: as of :func:`fused_margin_softmax_loss`.
            Finding the quartiles synchronizes with the device.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    validate.features("feats", feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    check_whisker(whisker)
    return class_loss(
        unpg.SPEC,
        {
            "scale": scale,
            "m1": m1,
            "m2": m2,
            "m3": m3,
            "margin_gradient": margin_gradient,
            "adaptive_margin": adaptive_margin,
        },
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        {"log_pairs": log_of_pairs(Batch.alone(feats, labels), scale, whisker, backend)},
    )


def check_whisker(whisker: float | None) -> None:
    if whisker is not None:
        validate.number("whisker", whisker, at_least=0.0)


def log_of_pairs(
    batch: Batch, scale: float | Tensor, whisker: float | None, backend: str
) -> Tensor:
    """() log of the sum over the negative pairs of all ranks' samples; very low if there are none.

    Of the graph every rank has the part of its own features.
    """
    feats, columns = batch.feats, dict[str, Any]()
    if batch.across_ranks:
        # Columns of a memory have to be finite, whether they take part or not.
        ignored, every_feats = (batch.every_labels == -1)[:, None], batch.every_feats
        columns = {
            "memory": torch.where(ignored, 0.0, every_feats).to(every_feats.dtype),
            "memory_labels": batch.every_labels,
            "batch_offset": batch.start,
        }
        # A pair is in the sums of both of its rows, with the same derivative. That of the other
        # row, a rank's own or not, is a constant here: twice the gradient, at the same value.
        feats = feats + (feats - feats.detach())
        scale = replicated(scale, batch.group) if isinstance(scale, Tensor) else scale
    lower, upper = _UNBOUNDED if whisker is None else _bounds(batch, whisker)
    per_row = fused_pair_logsumexp(
        feats,
        batch.labels,
        scale=scale,
        lower=lower,
        upper=upper,
        reduction="none",
        backend=backend,
        **columns,
    )
    # A row has negatives if the batch has two identities, and is then not ignored itself.
    every_labels = batch.every_labels.to(torch.int64)
    if not every_labels.numel():
        return per_row.new_full((), EMPTY)
    lowest_label = torch.where(every_labels == -1, torch.iinfo(torch.int64).max, every_labels).min()
    has_negatives = (batch.labels != -1) & (every_labels.max() > lowest_label)
    per_row = torch.where(has_negatives, per_row, EMPTY)
    if batch.across_ranks:
        per_row = gathered(per_row, batch.counts, batch.group)
    return torch.logsumexp(per_row, dim=0) - math.log(2.0)


@never_compiled
@torch.no_grad()
def _bounds(batch: Batch, whisker: float) -> tuple[float, float]:
    from ..metrics.order_statistics import ScorePartition
    from ..metrics.tiles import Scores, Share

    feats, labels = batch.every_feats, batch.every_labels
    # Features that are not finite have no order, and must reach the loss.
    if feats.shape[0] < 2 or not bool((feats.isfinite().all(dim=1) | (labels == -1)).all()):
        return _UNBOUNDED
    share = None
    if batch.across_ranks:
        total = partial(sum_over_ranks, group=batch.group)
        share = Share(own_rank(batch.group), len(batch.counts), total)
    partition = ScorePartition(Scores(feats, labels, None, None, "auto", share=share))
    count = partition.num_negatives
    if count == 0:
        return _UNBOUNDED
    # Places in ascending order, as ranks from the largest.
    places = [count - place // 4 for place in (count, 3 * count)]
    index = partition.kth_largest(places, negative=True)
    first, third = partition.thresholds()[index].tolist()
    # The bounds are inclusive, and the loss rounds a cosine differently. Without this slack half
    # precision would drop pairs at random where all cosines are nearly the same.
    rounding = torch.finfo(matmul_dtype(batch.feats)).eps
    reach = max(whisker * (third - first), rounding) + _COSINE_ERROR
    return first - reach, third + reach
