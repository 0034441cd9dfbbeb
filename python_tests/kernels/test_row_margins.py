"""Margins per row: in general, errors, regularizers of policies, and the work of a call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.helpers import TARGETS, Target
from support.row_margins import C, D, N, batch, compare, cosines, cross_entropy, of_targets, widened
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels import policy
from unitsface_kernels.policy import FormulaError

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


# -- margins per row in general ----------------------------------------------------------


@each_target
@pytest.mark.parametrize(
    "margin_gradient", ["exact", pytest.param("detached", marks=pytest.mark.extended)]
)
def test_margins_per_row_are_those_of_each_row_alone(target: Target, margin_gradient: str) -> None:
    feats, weight, labels = batch(target.device)
    margins = {
        "m1": torch.linspace(0.9, 1.4, N, device=target.device),
        "m2": torch.linspace(0.0, 0.6, N, device=target.device),
        "m3": torch.linspace(0.4, -0.1, N, device=target.device),
    }
    options: dict[str, Any] = {
        "scale": 16.0,
        "margin_gradient": margin_gradient,
        "adaptive_margin": 0.1,
        "reduction": "none",
        "backend": target.backend,
    }
    got = uk.fused_margin_softmax_loss(feats, weight, labels, **margins, **options)
    alone = torch.cat(
        [
            uk.fused_margin_softmax_loss(
                feats[i : i + 1],
                weight,
                labels[i : i + 1],
                **{name: float(value[i]) for name, value in margins.items()},
                **options,
            )
            for i in range(N)
        ]
    )
    check_same("loss", got, alone, SAME_LOSS)
    for a, b in zip(
        torch.autograd.grad(got.sum(), [feats, weight]),
        torch.autograd.grad(alone.sum(), [feats, weight]),
        strict=True,
    ):
        check_same("gradient", a, b, SAME_GRADIENT)


def test_one_number_is_a_margin_of_all_rows() -> None:
    feats, weight, labels = batch()
    want = uk.fused_margin_softmax_loss(feats, weight, labels, m2=0.3, m3=0.1)
    for m2, m3 in ((torch.tensor(0.3), 0.1), (torch.full((N,), 0.3), torch.tensor(0.1))):
        got = uk.fused_margin_softmax_loss(feats, weight, labels, m2=m2, m3=m3)
        check_same("loss", got, want, SAME_LOSS)


def _spoiled(value: float) -> Tensor:
    margins = torch.full((N,), 0.3)
    margins[2] = value
    return margins


@pytest.mark.parametrize("value", [math.nan, math.inf])
@each_target
def test_a_margin_that_is_not_finite_is_the_row_s_alone(target: Target, value: float) -> None:
    feats, weight, labels = batch(target.device)
    margins = _spoiled(value).to(target.device)
    loss = uk.fused_margin_softmax_loss(
        feats, weight, labels, m3=margins, reduction="none", backend=target.backend
    )
    assert loss.isnan().nonzero().flatten().tolist() == [2]
    margins[4] = math.nan  # of an ignored row
    loss = uk.fused_margin_softmax_loss(
        feats, weight, labels, m3=margins, reduction="none", backend=target.backend
    )
    assert float(loss[4].detach()) == 0.0


ERRORS = {
    "length": ({"m3": torch.zeros(N - 1)}, ValueError, r"m3 must have shape \(13,\), one per row"),
    "shape": ({"m2": torch.zeros(N, 1)}, ValueError, r"m2 must have shape \(13,\), one per row"),
    "dtype": ({"m2": torch.zeros(N, dtype=torch.int64)}, TypeError, "m2 must have a floating"),
    "type": ({"m2": torch.zeros(N), "m3": "0.4"}, TypeError, "m3 must be a float or a torch"),
    "number": ({"m2": torch.zeros(N), "m3": math.nan}, ValueError, "m3 must be finite"),
    "m1": ({"m2": torch.zeros(N), "m1": 0.0}, ValueError, "m1 must be > 0"),
    "tensor m1": (
        {"m2": torch.zeros(N), "m1": torch.zeros(())},
        ValueError,
        "m1 must be > 0",
    ),
    "filter": (
        {"m2": torch.zeros(N), "interclass_filtering_threshold": torch.zeros(2)},
        ValueError,
        "interclass_filtering_threshold must be 0 with margins per row, got Tensor",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_margins_are_named(name: str) -> None:
    feats, weight, labels = batch()
    options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        uk.fused_margin_softmax_loss(feats, weight, labels, **options)


def test_wrong_options_are_named() -> None:
    feats, weight, labels = batch()
    for error, message, call in (
        (ValueError, "u_a must be > l_a = 20", lambda: uk.MagFaceLoss(D, C, l_a=20.0, u_a=20.0)),
        (
            ValueError,
            "u_a must be > l_a = 10.0, got 5",
            lambda: uk.fused_magface_loss(feats, weight, labels, u_a=5.0),
        ),
        (
            ValueError,
            "std must be >= 0, got -1",
            lambda: uk.fused_adaface_loss(feats, weight, labels, 20.0, -1.0),
        ),
        (
            ValueError,
            r"mean must have one element, got shape \(3,\)",
            lambda: uk.fused_adaface_loss(feats, weight, labels, torch.ones(3), 1.0),
        ),
        (ValueError, "t_alpha must be > 0", lambda: uk.AdaFaceLoss(D, C, t_alpha=0.0)),
        (ValueError, "assignment must be one of", lambda: uk.ElasticFaceLoss(D, C, assignment="x")),
        (ValueError, "std must be >= 0", lambda: uk.ElasticFaceLoss(D, C, std=-0.1)),
        (TypeError, "learned must be a bool", lambda: uk.ClassMarginLoss(D, C, learned=1)),
        (
            ValueError,
            "learned must be True for a margin that needs a gradient, got False",
            lambda: uk.ClassMarginLoss(D, C, margin=torch.ones(C, requires_grad=True)),
        ),
        (
            ValueError,
            r"margin must have shape \(\) or \(9,\), got \(4,\)",
            lambda: uk.ClassMarginLoss(D, C, margin=torch.ones(4)),
        ),
        (
            ValueError,
            r"margin must have shape \(9,\), one per class",
            lambda: uk.fused_class_margin_loss(feats, weight, labels, torch.ones(4)),
        ),
        (
            ValueError,
            "counts must be given for smallest=0.1, got None",
            lambda: uk.ClassMarginLoss(D, C, smallest=0.1),
        ),
        (
            TypeError,
            "margin must be a float where there are counts, got Tensor",
            lambda: uk.ClassMarginLoss(D, C, margin=torch.ones(C), counts=torch.ones(C)),
        ),
        (
            ValueError,
            r"counts must have shape \(9,\), got \(4,\)",
            lambda: uk.ClassMarginLoss(D, C, counts=torch.ones(4)),
        ),
        (ValueError, "counts must be >= 0, got -1", lambda: uk.frequency_margins(-torch.ones(2))),
        (
            ValueError,
            r"counts must have shape \(C,\)",
            lambda: uk.frequency_margins(torch.ones(())),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


# -- the policy language ----------------------------------------------------------


def test_a_regularizer_reads_rows_alone_and_belongs_to_a_softmax_over_classes() -> None:
    with pytest.raises(FormulaError, match="regularizer may read numbers, scalars and rows"):

        class OfClasses(policy.Class):
            combine = "logsumexp"
            weight: policy.PerColumn = 1.0

            def positive(self, c):
                return c

            negative = positive

            def regularizer(self):
                return self.weight

    with pytest.raises(FormulaError, match="only a policy\\.Class that combines by 'logsumexp'"):

        class OfPairs(policy.Pair):
            def negative(self, c):
                return c

            def regularizer(self):
                return self.row_norm


class Weighted(policy.Class):
    """A term of all that a row may read."""

    combine = "logsumexp"
    strength: policy.Scalar = 0.5
    offset: policy.PerRow

    def positive(self, c):
        return 8.0 * (c - self.strength)

    def negative(self, c):
        return 8.0 * c

    def regularizer(self):
        return self.strength * policy.log(self.row_norm) + policy.square(self.offset)


@each_target
def test_a_regularizer_of_one_s_own(target: Target) -> None:
    feats, weight, labels = batch(target.device)
    strength = torch.tensor(0.3, device=target.device, requires_grad=True)
    offset = torch.linspace(-1, 1, N, device=target.device, requires_grad=True)
    got = uk.fused_class_loss(
        Weighted(),
        feats,
        weight,
        labels,
        strength=strength,
        offset=offset,
        backend=target.backend,
    )
    leaves = (feats, weight, strength, offset)
    wide = widened(*leaves)
    cosine = cosines(*wide[:2])
    term = wide[2] * wide[0].norm(dim=1).log() + wide[3].square()
    want = cross_entropy(cosine, of_targets(cosine, labels) - wide[2], labels, 8.0)
    compare(got, want + term[labels >= 0].mean(), leaves, wide)


# -- work -----------------------------------------------------------------------------------------


def _tiles(call) -> list[tuple[str, Any]]:
    """Kernels of the extension that a call launches, with the loss and constants of its tiles."""
    from unitsface_kernels.backends.native.cpu_engine import CpuEngine

    found, run = [], CpuEngine._kernel

    def kernel(self, name, *arguments, **more):
        loss = arguments[0] if isinstance(arguments[0], str) else None
        found.append((name, loss, arguments[1][-3] if loss else None))
        return run(self, name, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuEngine, "_kernel", kernel)
        call().backward()
    # Operations on N numbers are left out.
    return [each for each in found if each[0] != "positive_rows"]


@pytest.mark.parametrize("name", ["adaface", "class_margin", "elasticface", "magface"])
def test_no_tile_more_than_cosface(name: str) -> None:
    """The same kernels with the same constants, as often."""
    if "native" not in [target.backend for target in TARGETS]:
        pytest.skip("no extension")
    feats, _, labels = batch()
    one = uk.CosFaceLoss(D, 2000, scale=32.0, backend="native")
    other = uk.CLASS_LOSSES[name](D, 2000, scale=32.0, backend="native")
    wanted = _tiles(lambda: one(feats, labels))
    assert _tiles(lambda: other(feats, labels)) == wanted
    assert ("logsumexp_tile", "margin_softmax", 32.0) in wanted
