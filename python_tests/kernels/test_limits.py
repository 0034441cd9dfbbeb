"""Losses that are each other's special case, on drawn problems; gradients included."""

from __future__ import annotations

from dataclasses import replace

import torch
from support.cases import Problem
from support.draws import Draw, check_equal, for_all, losses
from support.helpers import Target
from torch.nn import functional as F

from unitsface_kernels.backends import reference
from unitsface_kernels.losses import REGISTRY, LossSpec


def _as(p: Problem, name: str, **changes) -> Problem:
    return replace(p, spec=REGISTRY[name], **changes)


@for_all([REGISTRY["uss"], REGISTRY["uce"]])
def test_equal_thresholds_are_one(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """Its gradient is the sum of theirs."""
    p = drawn.build(spec, target.device)
    several = {"uss": "pair_bce", "uce": "class_bce"}[spec.name]
    # Two at least: one number is one threshold.
    count = max(2, drawn.identities) if spec.topology == "pair" else len(p.columns)
    if count == 1:
        return
    loss, gradients = _as(p, several, b=p.b.expand(count).clone()).evaluate(target.backend)
    gradients["b"] = gradients["b"].sum()
    check_equal(p, (loss, gradients), p.evaluate(target.backend))


@for_all([REGISTRY["sphereface2"]])
def test_linear_sphereface2_is_uce(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """t = 1: g(c) = c. The margin, on both sides of b, is twice that of one side."""
    p = drawn.build(spec, target.device)
    scale, margin, alpha, weight = drawn.scale, drawn.margin, 0.7, 50.0
    p.values = {
        "scale": scale,
        "margin": margin,
        "t": 1.0,
        "alpha": alpha,
        "loss_weight": weight,
        "margin_gradient": "exact",
    }
    uce = _as(
        p,
        "uce",
        b=-p.b - scale * margin,
        values={"scale": scale, "margin": 2 * margin, "negative_weight": (1 - alpha) / alpha},
    )
    loss, gradients = uce.evaluate(target.backend)
    factor = weight * alpha / scale
    want = {name: factor * gradient for name, gradient in gradients.items()}
    want["b"] = -want["b"]
    check_equal(p, p.evaluate(target.backend), (factor * loss, want))


@for_all([REGISTRY["margin_softmax"]])
def test_a_vanishing_angle_is_no_angle(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """The path of angular margins, through the arccosine, meets that of CosFace."""
    p = drawn.build(spec, target.device)
    p.values = {"scale": drawn.scale, "m3": drawn.margin}
    angular = replace(p, values={**p.values, "m2": 1e-9})
    check_equal(p, angular.evaluate(target.backend), p.evaluate(target.backend))


@for_all([REGISTRY["margin_softmax"], REGISTRY["pair_softmax"]])
def test_one_negative_is_a_softplus(target: Target, spec: LossSpec, drawn: Draw) -> None:
    """softplus(s (c_n - c_p + m)) with one positive."""
    p = replace(drawn, columns=1).build(spec, target.device, columns=True)
    assert p.columns is not None
    p.columns = torch.cat([p.columns, -p.columns.flip(1)])[:2]
    p.labels = torch.arange(drawn.rows, device=target.device) % 2
    if spec.topology == "pair":
        p.column_labels = torch.arange(2, device=target.device)
    name = "margin" if spec.topology == "pair" else "m3"
    p.values = {"scale": drawn.scale, name: drawn.margin}
    p.reduction, p.upstream = "none", torch.ones(drawn.rows, device=target.device)
    cosine = reference.cosines(p.rows.double(), p.columns.double())
    positive = cosine.gather(1, p.labels[:, None])[:, 0]
    negative = cosine.gather(1, 1 - p.labels[:, None])[:, 0]
    want = F.softplus(drawn.scale * (negative - positive + drawn.margin))
    check_equal(p, (p.loss(target.backend), {}), (want, {}))


@for_all([REGISTRY["uss"], REGISTRY["pair_bce"], REGISTRY["uce"], REGISTRY["class_bce"]])
def test_a_margin_moves_thresholds_of_positives(
    target: Target, spec: LossSpec, drawn: Draw
) -> None:
    """Where every pair is positive, margin m is margin 0 with thresholds higher by s m."""
    if spec.topology == "class":
        drawn = replace(drawn, columns=0)
    p = replace(drawn, identities=1).build(spec, target.device)
    p.values = {"scale": drawn.scale, "margin": drawn.margin}
    without = replace(p, values={"scale": drawn.scale, "margin": 0.0})
    without.b = p.b + drawn.scale * drawn.margin
    check_equal(p, p.evaluate(target.backend), without.evaluate(target.backend))


@for_all(losses(reduction="nearest"))
def test_a_met_margin_is_nothing(target: Target, spec: LossSpec, drawn: Draw) -> None:
    p = drawn.build(spec, target.device)
    p.values = {"margin": -1000.0, "k": 3}
    loss, gradients = p.evaluate(target.backend)
    assert not bool(loss.any())
    assert not any(bool(gradient.any()) for gradient in gradients.values())
