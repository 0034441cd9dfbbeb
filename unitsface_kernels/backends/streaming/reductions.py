"""What drivers do with numbers per row, by Torch operators.

Each method is a step between tiles that an engine may make in one launch instead of several: of a
small call on a GPU these are most of the launches.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .call import Call, clear_ignored, not_finite


class ClassSums(NamedTuple):
    """``maximum`` and ``total`` as of :class:`NegativeSums`, and the targets' cosines."""

    maximum: Tensor
    total: Tensor
    target_cosine: Tensor


class RowFactors(NamedTuple):
    """(N,) each: d loss / d logits of all negatives, / d logit and / d cosine of the target."""

    negative: Tensor
    target: Tensor
    target_cosine: Tensor


class Reductions(Protocol):
    """Parts of :class:`Engine` that every engine has, if it does not have its own."""

    def class_sums(self, call: Call, panels: int) -> ClassSums:
        """Sums (panels, N), (panels, N), (N,) that no tile has been folded into."""
        rows, count = call.rows, call.rows.shape[0]
        return ClassSums(
            rows.new_full((panels, count), -torch.inf, dtype=torch.float32),
            rows.new_zeros((panels, count), dtype=torch.float32),
            rows.new_zeros(count, dtype=torch.float32),
        )

    def reduced(self, call: Call, losses: Tensor) -> Tensor:
        """The loss from those of the rows (num_losses,)."""
        if call.reduction == "none":
            return losses
        total = losses.sum()
        return total / call.num_valid_rows() if call.reduction == "mean" else total

    def mean_factor(self, call: Call) -> Tensor:
        """() one over the number of rows that have a loss."""
        return call.num_valid_rows().reciprocal()

    def finish_totals(
        self,
        call: Call,
        inverse_norms: Tensor,
        loss: Tensor,
        d_threshold: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss () and the threshold's gradient (1,), times ``scale`` (), of their parts.

        Args:
            call: one whose tiles have totals, see :class:`SumTile`.
            inverse_norms: (num_losses,) of what has losses; see ``not_finite``.
            loss, d_threshold: (``total_slots``,).
            scale: None: 1.
        """
        doubtful = not_finite(call, inverse_norms)
        clear_ignored(call, doubtful)
        total = torch.cat((loss, doubtful)).sum()
        if d_threshold is not None:
            d_threshold = d_threshold.sum(0, keepdim=True)
        if scale is not None:
            total = total * scale
            d_threshold = None if d_threshold is None else d_threshold * scale
        return total, d_threshold

    def row_factors(self, call: Call, state: Tensor, weights: Tensor) -> RowFactors:
        """Factors of the gradients of a ``logsumexp`` loss over classes without ``finish``.

        Args:
            call: the call.
            state: of ``finish_rows``.
            weights: (N,) upstream gradients of the rows' losses.
        """
        negative = weights * state[1]
        if call.may_have_ignored:
            negative.masked_fill_(call.ignored, 0.0)
        target = -negative
        # Exact even where the probability underflows: 0 times a finite slope.
        return RowFactors(negative, target, target * state[2])
