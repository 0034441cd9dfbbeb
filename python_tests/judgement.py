"""A backend's loss and gradients against the float64 reference: the rule of tolerances.py."""

from __future__ import annotations

import torch
from cases import Problem
from helpers import Target, eager_precision
from tolerances import check_gradient, check_loss
from torch import Tensor


def judge(
    target: Target, problem: Problem, dtype: torch.dtype, cancels: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Checks them and returns them. ``cancels``: as of a :class:`Case`."""
    want_loss, want = problem.converted(torch.float64).evaluate("reference")
    with eager_precision(target, dtype):
        eager_loss, eager = problem.evaluate("reference")
    loss, gradients = problem.evaluate(target.backend)

    assert loss.dtype == torch.float32
    check_loss(loss, want_loss, eager_loss, dtype)
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == getattr(problem, name).dtype
        size = problem.gross()[name] if cancels else 0.0
        if name == "b":
            # Positives and negatives pull in opposite directions. A term is w sigmoid(z), which
            # is below w softplus(z): together they are below the loss.
            size = float(want_loss.abs().sum())
        check_gradient(name, gradient, want[name], eager[name], dtype, size)
    return loss, gradients
