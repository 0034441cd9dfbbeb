"""Class losses whose formula reads numbers that follow the batches of training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.statistics import check_batch
from .class_loss import RegisteredClassLoss, Total


class MovingLoss(RegisteredClassLoss):
    """A loss with buffers, its :meth:`variables`, that every training batch moves before its loss.

    Calls in ``eval()`` or without gradients do not move them, nor do those that raise.
    """

    #: Values that the present step of a shard has, and the buffers do not have yet.
    _moved: dict[str, Tensor]

    def after_batch(
        self, feats: Tensor, labels: Tensor, class_index: Tensor | None
    ) -> dict[str, Tensor]:
        """Values of the buffers after a batch of this rank and those of all others, by variable."""
        raise NotImplementedError

    def after_step(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        """The same of a shard's step; arguments as of :meth:`step_variables`."""
        raise NotImplementedError

    def _moves(self) -> bool:
        return torch.is_grad_enabled()

    def reset_thresholds(self) -> None:
        super().reset_thresholds()
        self._moved = {}

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        if not (self.training and self._moves()):
            return super().forward(feats, labels, class_index)
        self._check(feats, labels, class_index)
        moved = self.after_batch(feats, labels, class_index)
        loss = self.compare(feats, self.weight, labels, class_index=class_index, **moved)
        self._keep_moved(moved)
        return loss

    def _check(self, feats: Tensor, labels: Tensor, class_index: Tensor | None) -> None:
        """Arguments that :meth:`after_batch` reads."""
        check_batch(feats, self.weight, labels, class_index, self.centers)

    def step_variables(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        self._moved = self.after_step(feats, labels, total) if self._moves() else {}
        return self._moved

    def end_step(self, feats: Tensor, labels: Tensor) -> None:
        self._keep_moved(self._moved)
        self._moved = {}

    @torch.no_grad()
    def _keep_moved(self, moved: dict[str, Tensor]) -> None:
        buffers = self.variables()
        if moved:
            torch._foreach_copy_([buffers[name] for name in moved], list(moved.values()))
