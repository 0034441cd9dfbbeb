"""The only place with numeric tolerances, and their derivation.

A limit must not depend on whose library adds in which order, so no float32 computation is asked
for its error. The reference runs in float64, and each of its operations, those of the backward pass
included, moves its result by what float32 may lose there, in a random direction (Monte Carlo
arithmetic: D. S. Parker, 1997; rounding.py). What follows carries the errors on. With u = 2^-24,
half a unit in the last place:

- Add, subtract, multiply, divide, square root: IEEE 754 rounds them correctly, relative error u.
- exp, log, sigmoid, arccosine, powers: 4 u, the 2 units in the last place of vector libraries.
- A sum S of n terms in any order, one by one: n - 1 additions round their partial sums. Over random
  orders the square of a partial sum averages to S^2 / 3 + Q / 6 with Q the sum of the terms'
  squares, hence an error of u sqrt((n - 1) (S^2 / 3 + Q / 6)). Trees and vector lanes do better.
  Cosines of rows of length D are such sums, and so are a row's terms and a gradient's.
- A result that float32 can hold (powers of two, zeros, copies) is exact.
- In half precision the operands of GEMMs are rounded to it, and gradients at the end.
- Each number errs by itself, and once more with all others: equal operands round equally.

So a cosine errs by about u (1 + |c| sqrt(D / 3)) and its logit by s times that plus u |z|: at
s = 64, D = 100 and c = 1 by 2e-5. A loss makes |dL/dz| of it, a gradient |d2L/dz2|, an arccosine
1 / sin(theta), SphereFace2's g(c) a factor t ((c + 1) / 2)^(t - 1), a cancellation the ratio of
its terms to what is left: none of this is written per loss, it follows from its operations.

The rule: the error of a loss and of every gradient, as a vector (Euclidean norm) and elementwise
(largest element), is at most ``FACTOR`` times its root mean square over such runs. Over random
orders of D, the largest ratio of an error to its root mean square is 1.5. test_tolerances.py checks
both sides: other orders stay far below the limit, and a fault of the size of a bfloat16 rounding, a
wrong or a missing term is above it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from support.rounding import CONVERSION, UNIT, Spread
from torch import Tensor

FACTOR = 4.0

# Below this a number counts as zero: kernels clamp exponents where float32 would underflow.
TINY = 1e-28

# Published values are float32 themselves.
REFERENCE_LOSS = 1e-5
REFERENCE_GRADIENT = 1e-4

# Two float32 computations of the same quantity in another order (ignored rows removed, a memory
# instead of the batch, compiled instead of eager, averaged over processes), where the whole rule
# would say no more: a logit errs by about u |z|, |z| <= 64, which is the relative error of a
# gradient of one exponential; a loss is the mean of several such.
SAME_GRADIENT = FACTOR * 2**0.5 * 64 * UNIT
SAME_LOSS = 64 * UNIT

# float64, against itself.
EXACT = 1e-10

# Central differences of the float64 reference, with this step, along random directions.
DIFFERENCE_STEP = 1e-6
DIFFERENCE = 2e-5

# Mixed precision against float32: the GEMMs of the model before the loss are in bfloat16.
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
    limit = allowed * want.double().norm().item() + TINY
    assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e}"


def check(name: str, got: Tensor, spread: Spread, computations: float = 1.0) -> None:
    """The rule; written so that NaN fails.

    Args:
        computations: how many err: 2 for the difference of two float32 computations.
    """
    want = spread.want
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} not {tuple(want.shape)}"
    assert not bool(want.isnan().any()), f"{name}: the oracle itself is not a number"
    if got.numel() == 0:
        return
    got = got.double()
    error = (got - want).masked_fill(got == want, 0.0)  # infinite where it should be
    for label, off, rounding in (
        ("norm", error.norm(), spread.norm),
        ("element", error.abs().max(), spread.element),
    ):
        limit = FACTOR * computations * rounding + TINY
        assert bool(off <= limit), (
            f"{name} ({label}): error {off:.3e}, allowed {limit:.3e}, "
            f"of a largest element {want.abs().max():.3e}"
        )


def check_all(
    got: Mapping[str, Tensor], spreads: Mapping[str, Spread], computations: float = 1.0
) -> None:
    """The rule for the results of the same names."""
    for name, value in got.items():
        check(name, value, spreads[name], computations)


def conversion(dtype: torch.dtype) -> float:
    """Relative difference of two results that were computed in ``dtype``."""
    return 2 * CONVERSION[dtype][0]


# Rounding of two gradients whose difference is compared with a bound, relative to the larger.
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

    ``spread`` is 1 for independent draws; if each draw counts in k of C cells it is the counts'
    variance over their expectation, (C - k) / (C - 1) for k distinct ones drawn uniformly.
    """
    freedom = counts.numel() - 1
    statistic = float(((counts.double() - expected) ** 2).sum() / (expected * spread))
    # Wilson and Hilferty: the cube root of chi-square over its mean is nearly normal.
    width = 2.0 / (9.0 * freedom)
    limit = freedom * (1.0 - width + IMPROBABLE * width**0.5) ** 3
    assert statistic <= limit, f"chi-square {statistic:.1f} of {freedom}, allowed {limit:.1f}"
