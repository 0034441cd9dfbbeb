"""NPT and its class weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional, validate


class NPTLoss(nn.Module):
    """Class weights and the nearest proxies triplet; see :func:`fused_npt_loss`.

    A row needs its own target's cosine: sharded over processes, a row counts only in the shard
    that holds its class, against the wrong classes of that shard.

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
        super().__init__()
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("num_classes", num_classes)
        self.margin = margin
        self.k = k
        self.reduction = reduction
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

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
