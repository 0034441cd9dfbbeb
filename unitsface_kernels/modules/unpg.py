"""UNPG: negative pairs of the batch beside the wrong classes of a margin softmax."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .. import functional, validate
from ..backends.reference import normalize_rows
from ..compiling import never_compiled
from ..functional.call import matmul_dtype
from ..functional.numbers import apart
from .composed import ComposedLoss
from .margin_softmax import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss

COSINE_ERROR = 1e-6


class UNPGLoss(ComposedLoss):
    r"""Unified negative pair generation over CosFace or ArcFace.

    Every row's denominator also holds the negative pairs of the whole batch, each unordered pair
    once: with :math:`z_{iy}` the target's logit of the head,

    .. math:: L_i = -\log \frac{e^{z_{iy}}}{e^{z_{iy}} + \sum_{c \neq y} e^{s c_{ic}}
                  + \sum_{n \in N'} e^{s n}}

    N' are the cosines within the box-and-whisker bounds
    :math:`[Q_1 - w\,(Q_3 - Q_1),\; Q_3 + w\,(Q_3 - Q_1)]` of all l negative pairs; the quartiles
    are the scores at places floor(l / 4) and floor(3 l / 4) of their ascending order, exactly,
    without storing them. The bounds have no gradient.

    Source: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature Space
    for Face Recognition", BMVC 2022, and its published code. As there, the pairs are those of the
    rank's own batch.

    Args:
        embedding_size: D.
        num_classes: C.
        base: "cosface" or "arcface".
        scale: s > 0.
        margin: of the head.
        whisker: w >= 0, as published 1.5; None keeps every negative pair.
        reduction, backend, margin_gradient, skip_tolerance: as the head's function's. Finding the
            quartiles synchronizes with the device.
        init_std: standard deviation of the initial class weights; None: 0.01. The published code
            draws them uniformly by Xavier's rule, of deviation (2 / (C + D)) ** 0.5.

    Attributes:
        head: the base's module with its (C, D) class weights.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1 -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_std or options; from a call, as the head.
    """

    loss = "unpg"
    _heads: ClassVar = {"cosface": CosFaceLoss, "arcface": ArcFaceLoss}
    _shown = ("base", "whisker", "reduction")
    head: MarginSoftmaxLoss

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        base: str = "cosface",
        scale: float | Tensor = 64.0,
        margin: float | Tensor = 0.5,
        whisker: float | None = 1.5,
        reduction: str = "mean",
        backend: str = "auto",
        margin_gradient: str = "exact",
        init_std: float | None = None,
        skip_tolerance: float = 0.0,
    ) -> None:
        validate.choice("reduction", reduction, validate.REDUCTIONS)
        if whisker is not None:
            validate.number("whisker", whisker, at_least=0.0)
        super().__init__(
            base,
            embedding_size,
            num_classes,
            scale=scale,
            margin=margin,
            reduction="none",
            backend=backend,
            margin_gradient=margin_gradient,
            init_std=init_std,
            skip_tolerance=skip_tolerance,
        )
        self.whisker = whisker
        self.reduction = reduction

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        per_row = self.head(feats, labels)
        valid = labels != -1
        # log(e^L_i + e^(U - z_iy)): both divided by the target's e^z_iy.
        pairs = self._log_pairs(feats, labels) - self._target_logit(feats, labels)
        per_row = torch.where(valid, torch.logaddexp(per_row, pairs), 0.0)
        if self.reduction == "none":
            return per_row
        total = per_row.sum()
        return total if self.reduction == "sum" else total / valid.sum().clamp(min=1)

    def _target_logit(self, feats: Tensor, labels: Tensor) -> Tensor:
        """(N,) logit of the row's own class, margin included: N dot products."""
        head = self.head
        dtype = torch.promote_types(feats.dtype, torch.float32)
        with torch.autocast(feats.device.type, enabled=False):
            own = head.weight[labels.to(torch.int64).clamp(min=0)].to(dtype)
            unit = [normalize_rows(t) for t in (feats.to(dtype), own)]
            cosine = (unit[0] * unit[1]).sum(dim=1)
        spec, values, given = apart(head.spec, head.values(), None, feats)
        scalars = tuple((given or {})[v.name] for v in spec.variables)
        assert spec.positive is not None
        return spec.positive(cosine, None, spec.pack(values), scalars)

    def _log_pairs(self, feats: Tensor, labels: Tensor) -> Tensor:
        """() log of the sum over the batch's negative pairs; very low if there are none."""
        lower, upper = -2.0, 2.0
        if self.whisker is not None:
            lower, upper = self._bounds(feats, labels)
        per_row = functional.fused_pair_logsumexp(
            feats,
            labels,
            scale=self.head.scale,
            lower=lower,
            upper=upper,
            reduction="none",
            backend=self.head.backend,
        )
        # A row has negatives if the batch has two identities, and is then not ignored itself.
        valid = labels != -1
        largest = torch.iinfo(torch.int64).max
        wide = labels.to(torch.int64)
        lowest_label = torch.where(valid, wide, largest)
        different = (wide.max() > lowest_label.min()) if labels.numel() else valid.any()
        lowest = torch.finfo(per_row.dtype).min / 4
        per_row = torch.where(valid & different, per_row, lowest)
        if labels.numel() == 0:
            return per_row.new_full((), lowest)
        return torch.logsumexp(per_row, dim=0) - math.log(2.0)

    @never_compiled
    @torch.no_grad()
    def _bounds(self, feats: Tensor, labels: Tensor) -> tuple[float, float]:
        from ..metrics.order_statistics import ScorePartition
        from ..metrics.tiles import Scores

        # Features that are not finite have no order, and must reach the loss.
        if feats.shape[0] < 2 or not bool(feats.isfinite().all()):
            return -2.0, 2.0
        partition = ScorePartition(Scores(feats, labels, None, None, "auto"))
        count = partition.num_negatives
        if count == 0:
            return -2.0, 2.0
        # Places in ascending order, as ranks from the largest.
        ranks = [count - place // 4 for place in (count, 3 * count)]
        index = partition.kth_largest(ranks, negative=True)
        first, third = partition.thresholds()[index].tolist()
        assert self.whisker is not None
        # The bounds are inclusive, and the loss rounds a cosine differently. Without this slack
        # half precision would drop pairs at random where all cosines are nearly the same.
        rounding = torch.finfo(matmul_dtype(feats)).eps
        reach = max(self.whisker * (third - first), rounding) + COSINE_ERROR
        return first - reach, third + reach
