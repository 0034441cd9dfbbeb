"""AdaFace, with the moving statistics of its norms."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import dispatch, validate
from ..backends import norms
from ..distributed.collectives import sum_over_ranks, world_size
from ..losses.adaface import NORMS, SPEC, AdaFace
from .class_loss import Total
from .moving import MovingLoss

_DEFAULT = SPEC.default


class AdaFaceLoss(MovingLoss):
    r"""Class weights and AdaFace; see :func:`fused_adaface_loss`.

    Mean and standard deviation of the norms, clipped to [0.001, 100], move by ``t_alpha`` towards
    those of every training batch, of all ranks together, before its loss is computed. Calls in
    ``eval()`` or without gradients do not move them, nor do those that raise, batches with features
    that are not finite, and for the deviation batches of one row.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, h, reduction, backend, skip_tolerance, centers: as the function's.
        t_alpha: share of a batch in the statistics, in (0, 1]. The published training takes 0.01;
            1 takes the statistics of each batch alone.
        init_std: standard deviation of the initial weights; None: 0.01. Published: directions
            uniform in a cube.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        batch_mean, batch_std: () buffers, first 20 and 100.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, t_alpha or init_std; from a call, as the function.
    """

    loss = "adaface"
    scale: float | Tensor
    batch_mean: Tensor
    batch_std: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        margin: float | Tensor = _DEFAULT.margin,
        h: float | Tensor = _DEFAULT.h,
        t_alpha: float = 0.01,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        validate.number("t_alpha", t_alpha, above=0.0, at_most=1.0)
        super().__init__(locals())
        self.t_alpha = t_alpha

    def _make_parameters(self, embedding_size: int, num_classes: int) -> None:
        super()._make_parameters(embedding_size, num_classes)
        self.register_buffer("batch_mean", torch.empty(()))
        self.register_buffer("batch_std", torch.empty(()))

    def reset_thresholds(self) -> None:
        """The statistics, too."""
        super().reset_thresholds()
        self.batch_mean.fill_(AdaFace.mean)
        self.batch_std.fill_(AdaFace.std)

    def variables(self) -> dict[str, float | Tensor]:
        return {"mean": self.batch_mean, "std": self.batch_std}

    def _check(self, feats: Tensor, labels: Tensor, class_index: Tensor | None) -> None:
        # Classes play no part in the statistics.
        validate.features("feats", feats)
        validate.labels("labels", labels, feats.shape[0], feats)

    def after_batch(
        self, feats: Tensor, labels: Tensor, class_index: Tensor | None
    ) -> dict[str, Tensor]:
        kernels = _kernels(feats)
        sums = kernels.norm_sums(feats, labels, *NORMS)
        if world_size() > 1:
            sums = sum_over_ranks(sums.sum(dim=0, keepdim=True))
        return self._moved_by(kernels, sums)

    def after_step(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        # The sums are over the rows of all ranks.
        kernels = _kernels(feats)
        return self._moved_by(kernels, kernels.norm_sums(feats, labels, *NORMS))

    def _moved_by(self, kernels: ModuleType, sums: Tensor) -> dict[str, Tensor]:
        moved = kernels.moved_statistics(sums, self.batch_mean, self.batch_std, self.t_alpha)
        return dict(zip(("mean", "std"), moved.unbind(), strict=True))


def _kernels(feats: Tensor) -> ModuleType:
    return dispatch.norm_kernels(feats.device, feats.dtype) or norms
