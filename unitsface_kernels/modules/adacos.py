"""AdaCos with its class weights and its scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..backends.streaming import CallTensors
from ..distributed.collectives import gather_rows, sum_over_ranks
from ..functional.statistics import log_negatives
from .class_loss import Total
from .moving import MovingLoss


class AdaCosLoss(MovingLoss):
    r"""Class weights and AdaCos; see :func:`fused_adacos_loss`.

    The scale is :math:`\sqrt 2 \log(C - 1)`. With ``dynamic``, every training batch, in calls with
    gradients, first replaces it, a constant of the gradient, by

    .. math:: s \leftarrow \frac{\log B}{\cos(\min(\pi / 4, \theta))}, \qquad
              B = \frac1N \sum_i \sum_{j \neq y_i} e^{s c_{ij}}

    with the median :math:`\theta` of the angles between rows and their classes, of the rows of all
    ranks and of the classes that take part. B comes from a forward pass over tiles: one more GEMM.
    A batch that is not finite, or whose scale would not be positive, or whose loss is an error,
    leaves it as it is.

    Source: Zhang et al., "AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep
    Face Representations", CVPR 2019.

    Args:
        embedding_size: D.
        num_classes: C, at least 3.
        dynamic: whether the scale follows the batches.
        reduction, backend, skip_tolerance, centers: as the function's.
        init_std: standard deviation of the initial weights; None: 0.01.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        scale: () float32 buffer s.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, dynamic or init_std; from a call, as the function.
    """

    loss = "adacos"
    scale: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        dynamic: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        validate.instance("dynamic", dynamic, bool, "a bool")
        super().__init__(locals())
        self.dynamic = dynamic

    def _make_parameters(self, embedding_size: int, num_classes: int) -> None:
        if num_classes < 3:
            raise ValueError(
                f"num_classes must be >= 3 for a scale of log(C - 1), got {num_classes}"
            )
        super()._make_parameters(embedding_size, num_classes)
        self.register_buffer("scale", torch.zeros(()))

    def reset_thresholds(self) -> None:
        """The scale."""
        super().reset_thresholds()
        self.scale.fill_(math.sqrt(2.0) * math.log(self.num_classes - 1.0))

    def variables(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def _moves(self) -> bool:
        return self.dynamic and super()._moves()

    def after_batch(
        self, feats: Tensor, labels: Tensor, class_index: Tensor | None
    ) -> dict[str, Tensor]:
        sums, cosines = self._statistics(feats, labels, class_index)
        return self._after(sum_over_ranks(sums), *gather_rows(cosines, labels.to(torch.int64)))

    def after_step(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        places = labels
        if self.drawn is not None:
            places = torch.where(labels >= 0, torch.searchsorted(self.drawn, labels), labels)
        sums, cosines = self._statistics(feats, places, self.drawn)
        both = total(torch.cat([sums[:1], cosines.to(sums)]))
        return self._after(torch.stack([both[0], sums[1]]), both[1:], labels)

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "dynamic": self.dynamic}

    def _statistics(
        self, feats: Tensor, labels: Tensor, class_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(2,) float64: the sum of the exponentials of all negatives' logits, and the number of
        rows; (N,) cosines of targets.
        """
        tensors = CallTensors(
            feats.detach(), labels, self.weight.detach(), column_index=class_index
        )
        found, cosines = log_negatives(self.spec, self.variables(), tensors, self.backend)
        takes_part = labels != -1
        exponentials = torch.where(takes_part, found.to(torch.float64).exp(), 0.0)
        return torch.stack([exponentials.sum(), takes_part.sum()]), cosines

    @torch.no_grad()
    def _after(self, sums: Tensor, cosines: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The scale after a batch.

        Args:
            sums: of :meth:`_statistics`, of all ranks.
            cosines, labels: (T,) of the rows of all ranks.
        """
        # The lower median of the angles, as published: the upper one of their cosines.
        cosines = torch.where(labels == -1, torch.nan, cosines)
        middle = -torch.nanmedian(-cosines)
        moved = torch.log(sums[0] / sums[1]) / middle.clamp_min(math.sqrt(0.5))
        moved = moved.to(self.scale)
        return {"scale": torch.where(moved.isfinite() & (moved > 0.0), moved, self.scale)}
