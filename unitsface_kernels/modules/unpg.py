"""UNPG: negative pairs of the batch beside the wrong classes of a margin softmax."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from .. import validate
from ..distributed.batch import Batch
from ..functional.unpg import check_whisker, fused_unpg_loss, log_of_pairs
from ..losses import EMPTY
from ..losses.unpg import SPEC
from .class_loss import Comparison
from .composed import ComposedLoss
from .margin_softmax import ArcFaceLoss, CosFaceLoss, MarginSoftmaxLoss


class UNPGLoss(ComposedLoss):
    """Class weights and unified negative pair generation; see :func:`fused_unpg_loss`.

    The pairs are those of the rank's own batch, in :class:`PartialFC` those of all ranks together.

    Args:
        embedding_size: D.
        num_classes: C.
        base: "cosface" or "arcface".
        scale: s > 0.
        margin: of the head.
        whisker: w >= 0, as published 1.5; None keeps every negative pair.
        reduction, backend, margin_gradient, skip_tolerance: as the function's.
        init_std: standard deviation of the initial class weights; None: 0.01. The published code
            draws them uniformly by Xavier's rule, of deviation (2 / (C + D)) ** 0.5.

    Attributes:
        head: the base's module with its (C, D) class weights.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1 -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_std or options; from a call, as the function.
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
        check_whisker(whisker)
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
        return fused_unpg_loss(
            feats,
            self.weight,
            labels,
            **self._values(),
            whisker=self.whisker,
            reduction=self.reduction,
            backend=self.head.backend,
            skip_tolerance=self.head.skip_tolerance,
        )

    def comparisons(self) -> list[Comparison]:
        (block,) = self.head.comparisons()
        # Before a batch there are no pairs.
        none = {"log_pairs": EMPTY}
        return [replace(block, spec=SPEC, values=self._values(), variables=none)]

    def batch_variables(self, batch: Batch) -> dict[str, Tensor]:
        return {"log_pairs": log_of_pairs(batch, self.scale, self.whisker, self.head.backend)}

    def _values(self) -> dict[str, Any]:
        values = self.head.values()
        return {name: values[name] for name in SPEC.defaults()}
