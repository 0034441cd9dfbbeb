"""Sums of a class loss and a pair loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class UniTSFaceLoss(nn.Module):
    """Sum of a sample-to-class and a sample-to-sample loss (UniTSFace, section 3.3).

    The paper's model is ``UniTSFaceLoss(CosFaceLoss(...), USSLoss(...))``.

    Args:
        class_loss: module called with (feats, labels).
        pair_loss: module called with (feats, labels) and the keywords given to ``forward``.
    """

    def __init__(self, class_loss: nn.Module, pair_loss: nn.Module) -> None:
        super().__init__()
        self.class_loss = class_loss
        self.pair_loss = pair_loss

    def forward(self, feats: Tensor, labels: Tensor, **pair_arguments: Any) -> Tensor:
        return self.class_loss(feats, labels) + self.pair_loss(feats, labels, **pair_arguments)
