"""NPT and its class weights."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..losses import REGISTRY
from .class_loss import ClassLoss, Comparison


class NPTLoss(ClassLoss):
    """Class weights and the nearest proxies triplet; see :func:`fused_npt_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        margin, k, reduction, backend: as the function's.

    Attributes:
        weight: (C, D) parameter, initialised N(0, 0.01).

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1 -> () float32.
    """

    #: Name in the registry of losses.
    loss = "npt"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: float = 1.0,
        k: int = 1,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(embedding_size, num_classes, reduction, backend, 0.01)
        self.margin = margin
        self.k = k
        self.reset_parameters()

    def comparisons(self) -> list[Comparison]:
        values: dict[str, float | str] = {"margin": self.margin, "k": self.k}
        return [Comparison(REGISTRY[self.loss], values, self.weight, None)]

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        return functional.fused_npt_loss(
            feats,
            self.weight,
            labels,
            margin=self.margin,
            k=self.k,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        return (
            f"embedding_size={size}, num_classes={classes}, margin={self.margin}, k={self.k}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
