"""Steps between tiles in one launch each, see ``streaming/reductions.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streaming import Call, ClassSums, Reductions, RowFactors
from . import launch
from .configs import RANGE, VECTOR
from .kernels import reductions
from .workspace import Workspace, padded

#: Rows that a single program takes. Beyond, the operators' many programs are faster.
MOST_ROWS = 1 << 16


class TritonReductions(Reductions):
    """For a call of the :class:`Workspace` ``_space``."""

    _space: Workspace

    def class_sums(self, call: Call, panels: int) -> ClassSums:
        # Tiles write the sums. Targets elsewhere are left out by all of them.
        count = call.rows.shape[0]
        maximum, total = (self._space.empty((panels, count)) for _ in range(2))
        return ClassSums(maximum, total, call.rows.new_zeros(count, dtype=torch.float32))

    def reduced(self, call: Call, losses: Tensor) -> Tensor:
        if call.reduction != "mean" or not _counts_labels(call):
            return super().reduced(call, losses)
        return self._mean(call, losses)

    def mean_factor(self, call: Call) -> Tensor:
        return self._mean(call, None) if _counts_labels(call) else super().mean_factor(call)

    def _mean(self, call: Call, losses: Tensor | None) -> Tensor:
        number, mean = self._space.empty(()), self._space.empty(())
        labels = call.labels_of_losses
        _run(reductions.mean_kernel, labels, losses, number, mean, labels.shape[0])
        if call.cache is not None:
            call.cache.num_valid_rows = number
        return mean

    def finish_totals(
        self,
        call: Call,
        inverse_norms: Tensor,
        loss: Tensor,
        d_threshold: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        total, slope = self._space.empty(()), None
        if d_threshold is not None:
            slope = self._space.empty(1)
        _run(
            reductions.finish_totals_kernel,
            loss,
            d_threshold,
            inverse_norms,
            call.labels_of_losses,
            call.threshold,
            scale,
            total,
            slope,
            inverse_norms.shape[0],
            loss.shape[0],
        )
        return total, slope

    def row_factors(self, call: Call, state: Tensor, weights: Tensor) -> RowFactors:
        count = weights.shape[0]
        # Kernels want each of them aligned.
        out = self._space.empty((3, padded(count, 4)))
        launch.run(
            reductions.row_factors_kernel,
            -(-count // VECTOR.block),
            weights,
            state,
            call.row_labels,
            out,
            count,
            out.stride(0),
            BLOCK=VECTOR.block,
            num_warps=VECTOR.num_warps,
        )
        return RowFactors(*out[:, :count].unbind(0))


def _counts_labels(call: Call) -> bool:
    """Whether the rows that have a loss are those with a label, not counted yet, and few."""
    known = call.cache is not None and call.cache.num_valid_rows is not None
    elsewhere = call.ranks is not None or call.towers is not None
    few = call.num_losses <= MOST_ROWS
    return call.spec.valid_rows == "labeled" and few and not (known or elsewhere)


def _run(kernel, *arguments: Tensor | int | None) -> None:
    launch.run(kernel, 1, *arguments, BLOCK=RANGE.block, num_warps=RANGE.num_warps)
