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
        margin, k, hinges, reduction, backend: as the function's.
        init_std: standard deviation of the initial weights; None: 0.01. The code published for the
            loss draws them uniformly by Xavier's rule, of deviation (2 / (C + D)) ** 0.5.

    Attributes:
        weight: (C, D) parameter.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.
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
        hinges: str = "mean",
        init_std: float | None = None,
    ) -> None:
        super().__init__(embedding_size, num_classes, reduction, backend, 0.01, init_std)
        self.margin = margin
        self.k = k
        self.hinges = hinges
        self.reset_parameters()

    def comparisons(self) -> list[Comparison]:
        values: dict[str, float | str] = {
            "margin": self.margin,
            "k": self.k,
            "hinges": self.hinges,
        }
        return [Comparison(REGISTRY[self.loss], values, self.weight, None)]

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        return functional.fused_npt_loss(
            feats,
            self.weight,
            labels,
            margin=self.margin,
            k=self.k,
            hinges=self.hinges,
            class_index=class_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        return (
            f"embedding_size={size}, num_classes={classes}, margin={self.margin}, k={self.k}, "
            f"hinges={self.hinges!r}, reduction={self.reduction!r}, backend={self.backend!r}"
        )
