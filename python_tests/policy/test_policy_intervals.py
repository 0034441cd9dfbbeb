"""Bounds of slopes by the values of variables: never below what a pair has, and near it."""

from __future__ import annotations

import random

import pytest
import torch
from support.formulas import PARAMS, choose_by, policy_of, tree
from support.variables import (
    POLICIES,
    Balanced,
    Distances,
    Hardest,
    Margins,
    Scales,
    Shifts,
    Tempered,
)
from torch import Tensor

from unitsface_kernels import policy
from unitsface_kernels.losses import REGISTRY
from unitsface_kernels.policy.eager import evaluate
from unitsface_kernels.policy.expression import Expression
from unitsface_kernels.policy.form import POSITIVE, kernel_form, slopes_of_cosine
from unitsface_kernels.policy.formula import (
    COSINE,
    Formula,
    default_params,
    number_bindings,
)
from unitsface_kernels.policy.intervals import LARGE, ends, largest_slope

COSINES = torch.linspace(-1.0, 1.0, 501, dtype=torch.float64)
#: Variables; without them, or with angles on intervals alone, there is no bound by theirs.
READ = [of for of in (*POLICIES, Tempered, Scales, Shifts, Balanced, Hardest) if of is not Margins]


def _of_values(formula: Formula, params: tuple[float, ...], values: dict[Expression, Tensor]):
    """The bound, and the largest slope of all pairs with these values, (n,) each."""
    numbers = number_bindings(formula, params)
    known: dict[Expression, Tensor | float] = dict(numbers)
    for of, (low, high) in ends(formula).items():
        known |= {low: values[of].min(), high: values[of].max()}
    bound = float(evaluate(largest_slope(formula), known))
    largest = 0.0
    for slope in slopes_of_cosine(kernel_form(formula)):
        for positive in (True, False):
            pairs = {COSINE: COSINES[:, None], POSITIVE: torch.tensor(positive), **values}
            largest = max(largest, float(evaluate(slope, numbers | pairs).abs().max()))
    return bound, largest


def _drawn(formula: Formula, least: float, most: float, seed: int) -> dict[Expression, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for of, (low, high) in ends(formula).items():
        count = 1 if low is high else 40
        numbers = torch.rand(count, generator=generator, dtype=torch.float64)
        found[of] = least + (most - least) * numbers
    return found


@pytest.mark.parametrize("of", READ, ids=lambda of: of.__name__)
@pytest.mark.parametrize(("least", "most"), [(0.2, 1.7), (1e-3, 2e-3), (5e4, 2e5)])
def test_bounds_are_those_of_the_values(of: type[policy.Policy], least: float, most: float) -> None:
    formula = of.formula
    bound, largest = _of_values(formula, default_params(formula), _drawn(formula, least, most, 0))
    assert largest <= bound * (1.0 + 1e-9)
    if of is not Distances:
        # Products of values that no pair has together.
        assert bound <= 8.0 * largest


@pytest.mark.parametrize("name", ["curricularface", "mv_softmax", "proxy_nca"])
def test_losses_of_the_registry(name: str) -> None:
    formula = REGISTRY[name].formula
    assert formula is not None
    bound, largest = _of_values(formula, default_params(formula), _drawn(formula, 0.1, 0.9, 1))
    assert largest <= bound * (1.0 + 1e-9)
    assert bound <= 4.0 * largest


@pytest.mark.parametrize("seed", range(25))
def test_no_pair_exceeds_the_interval(seed: int) -> None:
    """Formulas of the whole vocabulary, with a threshold for a variable."""
    choose = choose_by(random.Random(seed))
    combine = "softplus" if seed % 2 else "sum"
    formula = policy_of(tree(choose, 4), tree(choose, 4), combine).formula
    for params in PARAMS:
        bound, largest = _of_values(formula, params, _drawn(formula, -3.0, 4.0, seed))
        # Not a number, or too large to be taken, where intervals know nothing.
        assert not bound < LARGE or largest <= bound * (1.0 + 1e-9)
