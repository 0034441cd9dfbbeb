"""The only place with numeric tolerances.

Rule: a kernel's error against the float64 reference is at most ``FACTOR`` times the error of an
eager computation of the same precision, plus a floor. The eager error carries what depends on the
case (scale, number of pairs, cancellation); the floor is for cases where eager happens to be
exact. Gradients are judged as vectors (relative Euclidean norm) and elementwise (largest error
relative to the largest element).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Floor:
    """Relative errors that are always allowed."""

    loss: float
    norm: float
    element: float


# float32: a cosine is good to about 1e-7, which the scale (up to 256) multiplies in the logits.
# Half precision: inputs are the same rounded numbers for all; one rounding of the result.
FLOORS = {
    torch.float32: Floor(loss=1e-6, norm=1e-6, element=2e-6),
    torch.bfloat16: Floor(loss=1e-6, norm=1e-3, element=2e-3),
    torch.float16: Floor(loss=1e-6, norm=1.3e-4, element=2.6e-4),
}

# Below these a number counts as zero: kernels clamp exponents where float32 would underflow.
TINY_LOSS = 1e-30
TINY_GRADIENT = 1e-28

# Published values are float32 themselves.
REFERENCE_LOSS = 1e-5
REFERENCE_GRADIENT = 1e-4

# Two float32 computations of the same quantity in another order (ignored rows removed, a memory
# instead of the batch, compiled instead of eager, averaged over processes).
SAME_LOSS = 4e-6
SAME_GRADIENT = 2e-5

# float64, against itself.
EXACT = 1e-10

# Central differences of the float64 reference, with this step, along random directions.
DIFFERENCE_STEP = 1e-6
DIFFERENCE = 2e-5

# Mixed precision against float32: the products of the model before the loss are in bfloat16.
AUTOCAST_LOSS = 2e-2
AUTOCAST_GRADIENT = 6e-2

# Scalar functions of the kernels: exp to 2 ulp, softplus and its derivative of it. ``SATURATED``
# is where the exponent is clamped and a value counts as zero.
SCALAR = 3e-7
SATURATED = 87.0


def relative_norm(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; 0 for two zero tensors, infinite if only ``want`` is zero."""
    error = (got.double() - want.double()).norm().item()
    size = want.double().norm().item()
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def check_same(name: str, got: Tensor, want: Tensor, allowed: float) -> None:
    """Relative norm of the difference; written so that NaN fails."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} not {tuple(want.shape)}"
    error = (got.double() - want.double()).norm().item()
    limit = allowed * want.double().norm().item() + TINY_GRADIENT
    assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e}"


def check_loss(got: Tensor, want: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """The rule, per row for ``reduction="none"``, else for the one number."""
    assert got.shape == want.shape, f"loss: shape {tuple(got.shape)} not {tuple(want.shape)}"
    assert bool(want.isfinite().all()), "the oracle itself is not finite"
    if got.numel() == 0:
        return
    want = want.double()
    # Rows are judged together: eager may by chance be exact in one of them.
    size = want.abs().max()
    limit = FACTOR * (eager.double() - want).abs().max() + FLOORS[dtype].loss * size + TINY_LOSS
    error = (got.double() - want).abs().max()
    assert bool(error <= limit), f"loss: error {error:.3e}, allowed {limit:.3e} of {size:.3e}"


def check_gradient(
    name: str, got: Tensor, want: Tensor, eager: Tensor, dtype: torch.dtype, size: float = 0.0
) -> None:
    """The rule, as a vector and elementwise.

    ``size`` is the norm of the terms of a gradient that cancel: its rounding error scales with
    them, not with what is left.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} not {tuple(want.shape)}"
    assert bool(want.isfinite().all()), "the oracle itself is not finite"
    if got.numel() == 0:
        return
    got, want, eager, floor = got.double(), want.double(), eager.double(), FLOORS[dtype]
    for label, error, of_eager, scale, allowed in (
        ("norm", (got - want).norm(), (eager - want).norm(), want.norm(), floor.norm),
        (
            "element",
            (got - want).abs().max(),
            (eager - want).abs().max(),
            want.abs().max(),
            floor.element,
        ),
    ):
        limit = FACTOR * of_eager + allowed * max(float(scale), size) + TINY_GRADIENT
        assert bool(error <= limit), (
            f"{name} ({label}): error {error:.3e}, allowed {limit:.3e}, eager {of_eager:.3e}, "
            f"of {scale:.3e}"
        )


# Drawn problems: logits of size |z| are good to this times |z|, and so, relatively, is exp(z).
LOGIT_ROUNDING = 4e-7
# Of a gradient, relative to the magnitudes that it is the sum of.
TERM_ROUNDING = 1e-6


def check_drawn_loss(got: Tensor, want: Tensor, logits: float, size: float) -> None:
    """Two float32 computations of a loss; ``size``: of terms that it may be the difference of."""
    assert got.shape == want.shape, f"loss: shape {tuple(got.shape)} not {tuple(want.shape)}"
    # Infinite where it should be.
    exact = got == want
    got, want = got.masked_fill(exact, 0.0), want.masked_fill(exact, 0.0)
    size = size * want.numel() + want.double().norm().item()
    error = (got.double() - want.double()).norm().item()
    limit = (SAME_LOSS + LOGIT_ROUNDING * logits) * size + TINY_LOSS
    assert error <= limit, f"loss: error {error:.3e}, allowed {limit:.3e}"


def check_drawn_gradient(name: str, got: Tensor, want: Tensor, logits: float, size: float) -> None:
    """Two float32 computations of a gradient, a sum of magnitudes that add up to ``size``."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} not {tuple(want.shape)}"
    error = (got.double() - want.double()).norm().item()
    limit = (SAME_GRADIENT + LOGIT_ROUNDING * logits) * want.double().norm().item()
    limit += TERM_ROUNDING * size + TINY_GRADIENT
    assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e}"


# Rounding of two gradients whose difference is judged against a bound, relative to the larger.
SKIP_ROUNDING = 2e-6
# Two gradients of bfloat16 weights, each rounded once from float32: few elements round to different
# sides, by 2^-8 each. A second rounding moves nearly all of them, which makes 2^-8 of the norm.
ROUNDED_ONCE = 2.0**-10

# Twenty steps of training by several ranks against one process: losses; weights and momenta.
TRAINED_LOSS = 1e-5
TRAINED = 1e-4

# Draws: how many standard deviations a sum of chance may be off, once in a million.
IMPROBABLE = 4.9


def check_uniform(counts: Tensor, expected: float, spread: float = 1.0) -> None:
    """Pearson's statistic of counts that should all be ``expected``, over ``spread``.

    Of independent draws ``spread`` is 1; if each draw counts in k of C cells it is the counts'
    variance over their expectation, (C - k) / (C - 1) for k distinct ones drawn uniformly.
    """
    freedom = counts.numel() - 1
    statistic = float(((counts.double() - expected) ** 2).sum() / (expected * spread))
    # Wilson and Hilferty: the cube root of chi-square over its mean is nearly normal.
    width = 2.0 / (9.0 * freedom)
    limit = freedom * (1.0 - width + IMPROBABLE * width**0.5) ** 3
    assert statistic <= limit, f"chi-square {statistic:.1f} of {freedom}, allowed {limit:.1f}"
