"""Accuracy: an implementation's loss and gradients against float64, on a small shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .implementations import Implementation
from .inputs import make_inputs
from .workloads import SCALE, Workload, step

ROWS, COLUMNS = 256, 4096
# Far above rounding, far below another loss. Eager code in bfloat16 rounds logits of 45 to 1/8.
LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.5)}
# Rounding of a probability near 1; its difference from 1 is the gradient of a well-learned row.
PROBABILITY = 1e-6


def limits(workload: Workload, device: str) -> tuple[float, float]:
    """Largest accepted relative errors of the loss and of the gradients."""
    half = workload.autocast or workload.dtype(device) != torch.float32
    return LIMITS[torch.bfloat16 if half else torch.float32]


def _gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.grad.double() for name, t in tensors.items() if t.grad is not None}


def _allowance(name: str, fraction: float, inputs: dict[str, Tensor]) -> float:
    """Largest norm of an error of ``fraction`` of the largest gradient a pair can have, per row."""
    tensor = inputs[name].detach().double()
    if tensor.dim() == 0:
        return fraction
    per_row = SCALE * fraction / float(tensor.norm(dim=1).min())
    # For the mean of N rows: in-batch as row and as column; a column may collect all rows' errors.
    return per_row * (2.0 / math.sqrt(len(tensor)) if name == "feats" else 1.0)


def errors(workload: Workload, implementation: Implementation, device: str) -> dict[str, float]:
    """Relative errors of the loss and of each gradient as a vector.

    Raises:
        ArithmeticError: they are too large for the same work.
    """
    small = workload.shrunk(ROWS, COLUMNS)
    inputs = make_inputs(small, device)
    wide = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    want = step(implementation.formula, wide)
    got = step(implementation, inputs)
    size = abs(float(want.detach()))
    found = {"loss": abs(float(got.detach()) - float(want.detach())) / size}
    loss_limit, gradient_limit = limits(workload, device)
    # A loss near 0 is the small difference of logits.
    allowed = {"loss": loss_limit * max(1.0, 1.0 / size)}
    wanted = _gradients(wide)
    for name, gradient in _gradients(inputs).items():
        length = float(wanted[name].norm())
        if gradient.dim() == 0:
            # Its terms cancel at the optimum; the sum of their absolute values is at most the loss.
            length = max(length, size)
        found[name] = float((gradient - wanted[name]).norm()) / length
        fraction = implementation.skip_tolerance + PROBABILITY
        allowed[name] = gradient_limit + _allowance(name, fraction, inputs) / length
    if missing := wanted.keys() - found.keys():
        raise ArithmeticError(f"no gradient of {', '.join(sorted(missing))}")
    for name, error in found.items():
        if not error < allowed[name]:
            raise ArithmeticError(f"{name} is off by {error:.1e} from float64")
    return found
