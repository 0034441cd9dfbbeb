"""Bounds of derivatives: never below what a pair may have, and not far above it."""

from __future__ import annotations

import random

import pytest
import torch
from support.formulas import PARAMS, bindings, choose_by, policy_of, tree

from unitsface_kernels import policy
from unitsface_kernels.losses import REGISTRY
from unitsface_kernels.policy.bounds import slope_bound
from unitsface_kernels.policy.derive import derivative
from unitsface_kernels.policy.eager import evaluate
from unitsface_kernels.policy.form import term_of
from unitsface_kernels.policy.formula import COSINE

#: Not those at which the bounds are sampled.
COSINES = torch.linspace(-1.0, 1.0, 3001, dtype=torch.float64)
THRESHOLDS = torch.tensor([-300.0, -3.3, -0.7, 0.0, 0.2, 1.9, 17.0, 4000.0]).double()[:, None]


@pytest.mark.parametrize("seed", range(25))
def test_no_pair_exceeds_the_bound(seed: int) -> None:
    choose = choose_by(random.Random(seed))
    combine = "softplus" if seed % 2 else "sum"
    formula = policy_of(tree(choose, 4), tree(choose, 4), combine).formula
    for params in PARAMS:
        bound = slope_bound(formula, params)
        for positive in (True, False):
            slope = derivative(term_of(formula, positive), COSINE)
            found = evaluate(slope, bindings(formula, params, COSINES, THRESHOLDS)).abs().max()
            assert float(found) <= bound * (1.0 + 1e-9)
            assert bound < 1e6


#: Of the formulas themselves: the scale, times the larger weight, times the largest derivative of
#: the adjusted cosine.
KNOWN = {
    "uss": ({"scale": 20.0}, 20.0),
    "pair_bce": ({"scale": 20.0}, 20.0),
    "uce": ({"scale": 20.0, "negative_weight": 3.0}, 60.0),
    "class_bce": ({"scale": 20.0, "negative_weight": 0.5}, 20.0),
    "margin_softmax": ({"scale": 30.0, "m2": 0.5}, 30.0),
    "pair_softmax": ({"scale": 30.0}, 30.0),
    "pair_logsumexp": ({"scale": 30.0}, 30.0),
    "sphereface2": ({"scale": 20.0, "alpha": 0.8, "loss_weight": 10.0}, 8.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_bounds_of_the_losses_are_exact(name: str) -> None:
    spec = REGISTRY[name]
    values, want = KNOWN[name]
    assert spec.slope_bound(spec.pack(spec.defaults() | values)) == pytest.approx(want)


def test_a_bound_by_samples_where_intervals_are_loose() -> None:
    spec = REGISTRY["sphereface2"]
    params = spec.pack(spec.defaults() | {"margin_gradient": "exact"})
    # t times a weight, exactly; intervals divide a power by a base that may be 0.
    assert spec.slope_bound(params) / (50.0 * 0.7 * 3.0) in (1.0, 2.0)


class Cosines(policy.Class):
    combine = "logsumexp"

    def positive(self, c):
        return 1e3 * policy.cosine_margin(c, 1.0, 0.5)

    def negative(self, c):
        return 7.0 * c


class Root(policy.Pair):
    weight: policy.Scalar

    def negative(self, c):
        return policy.sqrt(self.weight) * c


class Constant(policy.Pair):
    def negative(self, c):
        return policy.detach(c)


def test_a_bound_of_nothing_is_no_divisor_of_zero() -> None:
    assert slope_bound(Constant.formula, ()) > 0.0


def test_values_of_variables_outside_of_the_domain_are_no_samples() -> None:
    assert slope_bound(Root.formula, ()) >= 100.0


def test_a_single_positive_is_excepted() -> None:
    """Its gradient is computed on N numbers."""
    assert slope_bound(Cosines.formula, ()) == 7.0


def test_slopes_that_grow_towards_a_cosine_of_one() -> None:
    """A distance of 0.0101, between the samples of a grid."""
    spec = REGISTRY["contrastive"]
    cosine = torch.tensor(1.0 - 0.0101**2 / 2, dtype=torch.float64, requires_grad=True)
    params = spec.pack(spec.defaults())
    assert spec.negative is not None
    spec.negative(cosine, None, params).backward()
    assert cosine.grad is not None
    assert 90.0 < abs(float(cosine.grad)) <= spec.slope_bound(params)
