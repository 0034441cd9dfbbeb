"""What modules that compose a class loss with something else have in common."""

from __future__ import annotations

from torch import Tensor

from .bce import UCELoss
from .class_loss import ShardableLoss
from .margin_softmax import MarginSoftmaxLoss


class ComposedLoss(ShardableLoss):
    """A module over a class loss ``head``, whose scale and class weights are its own too."""

    head: MarginSoftmaxLoss | UCELoss

    @property
    def scale(self) -> float:
        return self.head.scale

    @property
    def weight(self) -> Tensor:
        return self.head.weight
