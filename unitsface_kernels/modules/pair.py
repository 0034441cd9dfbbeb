"""Sample-to-sample losses with their thresholds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional


class USSLoss(nn.Module):
    """USS with its learnable threshold; see :func:`fused_uss_loss`.

    Args:
        scale, margin, reduction, backend: as the function's.
        init_threshold: first value of b, in logit units.

    Attributes:
        threshold: () parameter b; the unified cosine threshold is ``threshold / scale``.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) -> () float32.
    """

    #: Name in the registry of losses.
    loss = "uss"

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.1,
        init_threshold: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.init_threshold = init_threshold
        self.reduction = reduction
        self.backend = backend
        self.threshold = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.threshold, self.init_threshold)

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
    ) -> Tensor:
        return functional.fused_uss_loss(
            feats,
            labels,
            self.threshold,
            memory=memory,
            memory_labels=memory_labels,
            scale=self.scale,
            margin=self.margin,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, margin={self.margin}, init_threshold={self.init_threshold}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
