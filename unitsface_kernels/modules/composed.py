"""What modules that compose a class loss with something else have in common."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .bce import UCELoss
from .margin_softmax import MarginSoftmaxLoss

NORM_EPS = 1e-5


def unit_rows(x: Tensor) -> Tensor:
    """(N, D) rows at unit length, norms clamped from below at 1e-5 as in every loss."""
    return F.normalize(x, dim=1, eps=NORM_EPS)


class ComposedLoss(nn.Module):
    """A module over a class loss ``head``, whose scale and class weights are its own too."""

    head: MarginSoftmaxLoss | UCELoss

    @property
    def scale(self) -> float:
        return self.head.scale

    @property
    def weight(self) -> Tensor:
        return self.head.weight
