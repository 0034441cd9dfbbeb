"""Losses from their policies against the formulas of the papers, written anew here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unitsface_kernels.losses import REGISTRY
from unitsface_kernels.policy.checks import check_finite
from unitsface_kernels.policy.expression import Lines

Values = dict[str, float | str]
#: positive and negative: (cosine, threshold, values) -> terms or logits.
Formulas = tuple[Callable[..., Tensor] | None, Callable[..., Tensor]]

COSINES = torch.linspace(-0.999, 0.999, 401, dtype=torch.float64)
THRESHOLDS = (-3.0, 0.0, 25.5)


def _sum(threshold: Tensor, scale: float, margin: Tensor | float, cosine: Tensor) -> Tensor:
    return -F.logsigmoid(scale * (cosine - margin) - threshold)


def _uss_positive(c: Tensor, b: Tensor, scale: float, margin: float) -> Tensor:
    return _sum(b, scale, margin, c)


def _uss_negative(c: Tensor, b: Tensor, scale: float, margin: float) -> Tensor:
    return -F.logsigmoid(b - scale * c)


def _uce_positive(
    c: Tensor,
    b: Tensor,
    scale: float,
    margin: float,
    negative_weight: float,
    adaptive_margin: float,
) -> Tensor:
    return _sum(b, scale, margin + adaptive_margin * c.detach(), c)


def _uce_negative(
    c: Tensor,
    b: Tensor,
    scale: float,
    margin: float,
    negative_weight: float,
    adaptive_margin: float,
) -> Tensor:
    return -negative_weight * F.logsigmoid(b - scale * c)


def _target_cosine(c: Tensor, m1: float, m2: float) -> Tensor:
    """cos(m1 theta + m2), continued past pi as (-1)^k cos(.) - 2k; slopes with sin >= 1e-4."""
    if m1 == 1.0 and m2 == 0.0:
        return c
    known = c.detach()
    angle = m1 * torch.acos(known) + m2
    k = torch.floor(angle / math.pi)
    sign = 1.0 - 2.0 * torch.remainder(k, 2.0)
    sine = torch.sqrt((1.0 - known**2).clamp_min(1e-8))
    slope = sign * torch.sin(angle) * m1 / sine
    return sign * torch.cos(angle) - 2.0 * k + slope * (c - known)


def _margin_positive(
    c: Tensor,
    b: None,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    margin_gradient: str,
    adaptive_margin: float,
) -> Tensor:
    shrunk = c - adaptive_margin * c.detach()
    target = _target_cosine(shrunk, m1, m2)
    if margin_gradient == "detached":
        target = shrunk + (target - shrunk).detach()
    return scale * (target - m3)


def _scaled(c: Tensor, b: None, scale: float, **values: float | str) -> Tensor:
    return scale * c


def _shifted(c: Tensor, b: None, scale: float, margin: float) -> Tensor:
    return scale * (c - margin)


def _between(c: Tensor, b: None, scale: float, lower: float, upper: float) -> Tensor:
    return torch.where((c < lower) | (c > upper), -torch.inf, scale * c)


def _moved(c: Tensor, margin: float) -> Tensor:
    """cos(theta + margin), -1 once the angle passes pi."""
    known = c.detach()
    sine = torch.sqrt((1.0 - known) * (1.0 + known))
    value = known * math.cos(margin) - sine * math.sin(margin)
    slope = math.cos(margin) + known * math.sin(margin) / sine.clamp_min(1e-4)
    past = known < -math.cos(margin)
    value, slope = torch.where(past, -1.0, value), torch.where(past, 0.0, slope)
    return value + slope * (c - known)


def _sphereface2(
    positive: bool,
    c: Tensor,
    b: Tensor,
    scale: float,
    margin: float,
    t: float,
    alpha: float,
    loss_weight: float,
    margin_type: str,
    margin_gradient: str,
) -> Tensor:
    angular = margin_type == "A"
    moved = _moved(c, margin) if positive and angular else c
    # At a base of 0 the derivative is 0 for any t.
    adjusted = 2.0 * ((moved + 1.0) / 2.0).clamp_min(1e-30) ** t - 1.0
    if margin_gradient == "detached":
        adjusted = c + (adjusted - c).detach()
    if not angular:
        adjusted = adjusted - margin if positive else adjusted + margin
    logit = scale * adjusted + b
    share = alpha if positive else 1.0 - alpha
    return -loss_weight / scale * share * F.logsigmoid(logit if positive else -logit)


def _sphereface2_positive(c: Tensor, b: Tensor, **values: float | str) -> Tensor:
    return _sphereface2(True, c, b, **values)


def _sphereface2_negative(c: Tensor, b: Tensor, **values: float | str) -> Tensor:
    return _sphereface2(False, c, b, **values)


def _turned(c: Tensor, margin: float) -> Tensor:
    """cos(theta + margin); slopes with sin >= 1e-4."""
    known = c.detach()
    sine = torch.sqrt((1.0 - known) * (1.0 + known))
    slope = math.cos(margin) + known * math.sin(margin) / sine.clamp_min(1e-4)
    return known * math.cos(margin) - sine * math.sin(margin) + slope * (c - known)


def _curricularface_positive(c: Tensor, b: None, scale: float, margin: float, **read) -> Tensor:
    beyond = c - math.sin(math.pi - margin) * margin
    return scale * torch.where(c > math.cos(math.pi - margin), _turned(c, margin), beyond)


def _curricularface_negative(
    c: Tensor, b: None, scale: float, margin: float, t: Tensor, target_cosine: Tensor
) -> Tensor:
    return scale * torch.where(c > _turned(target_cosine, margin), c * (t + c), c)


def _mv_moved(c: Tensor, margin: float, margin_type: str) -> Tensor:
    return c - margin if margin_type == "am" else _turned(c, margin)


def _mv_softmax_positive(
    c: Tensor, b: None, scale: float, margin: float, margin_type: str, margin_at: str, **read
) -> Tensor:
    moved = _mv_moved(c, margin, margin_type)
    return scale * (moved if margin_at == "all" else torch.where(c > 0, moved, c))


def _mv_softmax_negative(
    c: Tensor,
    b: None,
    scale: float,
    margin: float,
    t: float,
    margin_type: str,
    weighting: str,
    target_cosine: Tensor,
    **read,
) -> Tensor:
    emphasized = c + t if weighting == "fixed" else (t + 1) * c + t
    hard = c > _mv_moved(target_cosine, margin, margin_type)
    return scale * torch.where(hard, emphasized, c)


def _filtered(
    c: Tensor, b: None, scale: float, interclass_filtering_threshold: float, **values
) -> Tensor:
    limit = interclass_filtering_threshold
    return torch.where((c > limit) & (limit > 0.0), 0.0, scale * c)


def _filtered_positive(
    c: Tensor, b: None, interclass_filtering_threshold: float, **values
) -> Tensor:
    return _margin_positive(c, b, **values)


def _contrastive(
    positive: bool,
    c: Tensor,
    b: None,
    positive_margin: float,
    negative_margin: float,
    distance: str,
) -> Tensor:
    """Hadsell, Chopra and LeCun, CVPR 2006, eq. 4 of unit vectors; none of COSINES is near 1."""
    apart = torch.sqrt(2.0 - 2.0 * c) if distance == "euclidean" else 1.0 - c
    hinge = apart - positive_margin if positive else negative_margin - apart
    return 0.5 * F.relu(hinge) ** 2


FORMULAS: dict[str, Formulas] = {
    "contrastive": (partial(_contrastive, True), partial(_contrastive, False)),
    "uss": (_uss_positive, _uss_negative),
    "pair_bce": (_uss_positive, _uss_negative),
    "uce": (_uce_positive, _uce_negative),
    "class_bce": (_uce_positive, _uce_negative),
    "margin_softmax": (_margin_positive, _scaled),
    "sphereface2": (_sphereface2_positive, _sphereface2_negative),
    "pair_softmax": (_shifted, _scaled),
    "pair_logsumexp": (None, _between),
    "curricularface": (_curricularface_positive, _curricularface_negative),
    "mv_softmax": (_mv_softmax_positive, _mv_softmax_negative),
    "filtered_margin_softmax": (_filtered_positive, _filtered),
    "adacos": (_scaled, _scaled),
}

_SCALES = (1.0, 64.0)
_UCE = {
    "scale": _SCALES,
    "margin": (0.0, 0.4),
    "negative_weight": (0.3, 2.0),
    "adaptive_margin": (0.0, 0.7),
}
GRID: dict[str, dict[str, tuple[float | str, ...]]] = {
    "contrastive": {
        "positive_margin": (0.0, 0.4),
        "negative_margin": (1.0, 0.5, 2.5),
        "distance": ("euclidean", "cosine"),
    },
    "uss": {"scale": _SCALES, "margin": (0.0, 0.1, -0.2)},
    "pair_bce": {"scale": _SCALES, "margin": (0.1,)},
    "uce": _UCE,
    "class_bce": _UCE,
    "margin_softmax": {
        "scale": _SCALES,
        "m1": (1.0, 1.7, 4.0),
        "m2": (0.0, 0.5, 3.5),
        "m3": (0.0, 0.4),
        "margin_gradient": ("exact", "detached"),
        "adaptive_margin": (0.0, 0.3),
    },
    "sphereface2": {
        "scale": (1.0, 40.0),
        "margin": (0.0, 0.4, 2.5),
        "t": (0.5, 1.0, 2.0, 3.0, 4.5),
        "alpha": (0.7,),
        "loss_weight": (50.0,),
        "margin_type": ("C", "A"),
        "margin_gradient": ("detached", "exact"),
    },
    "pair_softmax": {"scale": _SCALES, "margin": (0.0, 0.1)},
    "pair_logsumexp": {"scale": _SCALES, "lower": (-2.0, -0.3), "upper": (0.5, 2.0)},
    "curricularface": {"scale": _SCALES, "margin": (0.0, 0.5, 2.5)},
    "mv_softmax": {
        "scale": _SCALES,
        "margin": (0.0, 0.35),
        "t": (0.0, 0.2),
        "margin_type": ("am", "arc"),
        "weighting": ("adaptive", "fixed"),
        "margin_at": ("acute", "all"),
    },
    "filtered_margin_softmax": {
        "scale": _SCALES,
        "m1": (1.0,),
        "m2": (0.5,),
        "m3": (0.4,),
        "margin_gradient": ("exact", "detached"),
        "adaptive_margin": (0.3,),
        "interclass_filtering_threshold": (0.0, 0.3, 1.0),
    },
    "adacos": {},
}
#: Of variables, in the order of a formula: at different sides of what they are compared with.
VARIABLES = (0.45, 0.3)


def _settings(name: str) -> Iterator[Values]:
    grid = GRID[name]
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _with_gradients(run: Callable[[Tensor, Tensor], Tensor], threshold: float) -> list[Tensor]:
    c = COSINES.clone().requires_grad_()
    b = torch.full_like(COSINES, threshold).requires_grad_()
    value = run(c, b)
    finite = value.masked_fill(value == -torch.inf, 0.0).sum()
    gradients = torch.autograd.grad(finite, (c, b), materialize_grads=True)
    return [value.detach(), *gradients]


def test_every_formula_is_written_anew() -> None:
    specs = REGISTRY.items()
    # What is computed of a row's log-sum-exps or nearest columns has tests of its own.
    assert FORMULAS.keys() == {n for n, spec in specs if not (spec.finish or spec.triplet)}
    assert GRID.keys() == FORMULAS.keys()
    for name, grid in GRID.items():
        assert grid.keys() == REGISTRY[name].defaults().keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_eager_terms_are_those_of_the_paper(name: str) -> None:
    """Values and gradients, to 1e-12 of the largest."""
    spec = REGISTRY[name]
    thresholds = THRESHOLDS if spec.threshold != "none" else (0.0,)
    read = dict(zip((v.name for v in spec.variables), map(torch.tensor, VARIABLES), strict=False))
    given = (tuple(read.values()),) if read else ()
    for values, threshold in product(_settings(name), thresholds):
        params = spec.pack(values)
        for ours, anew in zip((spec.positive, spec.negative), FORMULAS[name], strict=True):
            assert (ours is None) == (anew is None)
            if ours is None or anew is None:
                continue
            got = _with_gradients(lambda c, b: ours(c, b, params, *given), threshold)  # noqa: B023
            want = _with_gradients(partial(anew, **values, **read), threshold)
            for g, w in zip(got, want, strict=True):
                largest = w[w.isfinite()].abs().max().clamp_min(1.0)
                torch.testing.assert_close(g / largest, w / largest, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_finite(name: str) -> None:
    """As those of users are when their classes are defined."""
    formula = REGISTRY[name].formula
    assert formula is not None
    check_finite(formula, Lines())
