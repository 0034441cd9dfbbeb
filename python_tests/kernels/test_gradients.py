"""Gradients against finite differences, and the rules of autograd that an operator can break."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.cases import Case, Problem, build, detached, problem, variants
from support.grid import FIRST, calls, extended_if, parity_cases
from support.helpers import FUSED, TARGETS, Target
from support.tolerances import (
    DIFFERENCE,
    DIFFERENCE_STEP,
    EXACT,
    SAME_GRADIENT,
    SAME_LOSS,
    TINY,
    check_same,
)
from torch import Tensor

import unitsface_kernels
from unitsface_kernels.losses import REGISTRY, LossSpec

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_fused = pytest.mark.parametrize("target", FUSED, ids=str)
each_call = pytest.mark.parametrize(("target", "spec"), calls(TARGETS, of_operator=True))
each_fused_call = pytest.mark.parametrize(("target", "spec"), calls(FUSED, of_operator=True))
each_loss = pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
each_variant = pytest.mark.parametrize(
    ("spec", "values"),
    [
        pytest.param(spec, values, id=f"{spec.name}-{name}", marks=extended_if(spec not in FIRST))
        for spec in REGISTRY.values()
        for name, values in variants(spec).items()
        if not detached(spec, values)
    ],
)
# In-batch (or a few classes), and against columns.
SHAPES = {"few": None, "columns": 6}


def _reference_function(problem: Problem, names: list[str]):
    def function(*tensors: Tensor) -> Tensor:
        return problem.loss("reference", **dict(zip(names, tensors, strict=True)))

    return function


# --- the reference itself, and the fused gradients, against finite differences -------------------


@pytest.mark.parametrize("columns", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("spec", "values", "reduction"),
    [
        pytest.param(
            *(spec, values, reduction),
            id=f"{spec.name}-{name}-{reduction}",
            marks=extended_if(spec not in FIRST and (name, reduction) != ("default", "mean")),
        )
        for spec in REGISTRY.values()
        for name, values in variants(spec).items()
        # A reduction does not use a loss's parameters.
        for reduction in (("mean", "sum", "none") if name == "default" else ("mean",))
        if not detached(spec, values)
    ],
)
def test_reference_gradcheck(
    spec: LossSpec, values: dict, reduction: str, columns: int | None
) -> None:
    # A small scale keeps the function smooth on the scale of the differences.
    if spec.topology == "class":
        columns = columns or 2
    case = Case("", 5, 3, columns, values={"scale": 3.0}, reduction=reduction, labels="ignored")
    p = build(case, spec, values).converted(torch.float64)
    leaves = p.leaves()
    assert torch.autograd.gradcheck(_reference_function(p, list(leaves)), tuple(leaves.values()))


@pytest.mark.parametrize("angle", [0.02, 1.0, 2.2, 2.9, math.pi - 0.02])
@pytest.mark.parametrize(
    "values",
    [{"m2": 0.5}, {"m1": 1.7}, {"m1": 4.0}, {"m1": 1.7, "m2": 0.5, "m3": 0.1}],
    ids=["arcface", "sphereface", "sphereface-two-turns", "combined"],
)
def test_reference_gradcheck_of_margins(angle: float, values: dict) -> None:
    """Near cosine +1 and -1, and past pi, where the margin continues on another branch."""
    feats = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    target = [0.7 * math.cos(angle), 0.7 * math.sin(angle), 0.0]
    weight = torch.tensor([target, [0.3, 0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0])

    def function(x: Tensor, w: Tensor) -> Tensor:
        return unitsface_kernels.fused_margin_softmax_loss(
            x, w, labels, scale=2.0, **{"m3": 0.0, **values}, backend="reference"
        )

    assert torch.autograd.gradcheck(function, (feats, weight))


def test_margin_continues_monotonically() -> None:
    """The target's logit falls over the whole half turn, without a jump, for any factor."""
    angles = torch.linspace(1e-3, math.pi - 1e-3, 41, dtype=torch.float64)
    feats = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for m1 in (1.0, 1.7, 4.0):
        # Against one other class of constant logit the loss is a monotone function of the
        # target's, with a slope of at most 1.
        losses = torch.stack(
            [
                unitsface_kernels.fused_margin_softmax_loss(
                    feats,
                    torch.stack([torch.stack([angle.cos(), angle.sin()]), other]),
                    torch.tensor([0]),
                    scale=1.0,
                    m1=m1,
                    m2=0.3,
                    m3=0.0,
                    backend="reference",
                )
                for angle in angles
            ]
        )
        steps = losses.diff()
        assert bool((steps > 0).all())
        assert float(steps.max()) < m1 * math.pi / 40 + EXACT


@each_fused
@each_variant
@pytest.mark.parametrize("columns", SHAPES.values(), ids=SHAPES)
def test_fused_gradient_is_a_finite_difference(
    target: Target, spec: LossSpec, values: dict, columns: int | None
) -> None:
    """The derivative along a random direction, without any autograd on the other side."""
    case = Case("", 9, 20, columns, values={"scale": 8.0}, labels="ignored")
    p = build(case, spec, values, device=target.device)
    _, gradients = p.evaluate(target.backend)
    exact = p.converted(torch.float64)
    for name, gradient in gradients.items():
        at = getattr(exact, name).detach()
        direction = torch.randn_like(at)
        ahead, behind = (
            exact.loss("reference", **{name: at + step * direction})
            for step in (DIFFERENCE_STEP, -DIFFERENCE_STEP)
        )
        want = float((ahead - behind) * p.upstream / (2 * DIFFERENCE_STEP))
        got = float((gradient.double() * direction).sum())
        size = float(gradient.double().norm() * direction.norm())
        assert abs(got - want) <= DIFFERENCE * size, f"{name}: {got} not {want}"


@each_target
@each_variant
def test_gradient_is_orthogonal_to_its_row(target: Target, spec: LossSpec, values: dict) -> None:
    """Cosines do not change with the norms, for rows and columns of any."""
    p = build(Case("", 9, 20, 6), spec, values, device=target.device)
    _, gradients = p.evaluate(target.backend)
    for name in ("rows", "columns"):
        x, g = getattr(p, name), gradients[name]
        along = ((x * g).sum(dim=1) / x.norm(dim=1)).abs()
        assert float(along.max()) <= SAME_GRADIENT * float(g.norm(dim=1).max())


@each_target
@pytest.mark.parametrize("values", [{"m2": 0.5, "m3": 0.0}, {"m1": 1.7, "m3": 0.1}])
def test_detached_margin_is_a_constant_shift(target: Target, values: dict) -> None:
    """One row: the detached gradient is the one of the additive margin of the same value."""
    spec = REGISTRY["margin_softmax"]
    p = problem(spec, device=target.device, rows=1, columns=6, dim=3)
    assert p.columns is not None
    unit = [torch.nn.functional.normalize(t.double(), dim=1) for t in (p.rows, p.columns)]
    angle = torch.acos(unit[0][0] @ unit[1][int(p.labels)])
    moved = values.get("m1", 1.0) * angle + values.get("m2", 0.0)
    assert 0 < float(moved) < math.pi
    shift = float(torch.cos(angle) - torch.cos(moved)) + values["m3"]
    p.values = {**values, "scale": 8.0, "margin_gradient": "detached"}
    shifted_loss, shifted = p.evaluate(target.backend)
    p.values = {"scale": 8.0, "m3": shift}
    loss, want = p.evaluate(target.backend)
    check_same("loss", shifted_loss, loss, SAME_LOSS)
    for name, gradient in shifted.items():
        check_same(name, gradient, want[name], SAME_GRADIENT)
    p.values = {**values, "scale": 8.0}
    _, exact = p.evaluate(target.backend)
    assert (exact["rows"] - shifted["rows"]).norm() > 0.02 * exact["rows"].norm()


# --- autograd -------------------------------------------------------------------------------------


@each_call
@each_reduction
def test_backward_twice(target: Target, spec: LossSpec, reduction: str) -> None:
    """Retained graphs give the same gradient again, also after the first was overwritten."""
    p = problem(spec, target.device, rows=9, columns=6, reduction=reduction, labels="ignored")
    leaves = p.leaves()
    loss = p.loss(target.backend, **leaves)
    value = loss.detach().clone()
    loss.backward(p.upstream, retain_graph=True)
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad.fill_(math.nan)
        leaf.grad = None
    loss.backward(2 * p.upstream, retain_graph=True)
    for name, leaf in leaves.items():
        check_same(name, leaf.grad, 2 * first[name], SAME_GRADIENT)
        leaf.grad = None
    loss.backward(p.upstream)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, first[name])
    assert torch.equal(loss.detach(), value)


@each_call
def test_gradients_accumulate(target: Target, spec: LossSpec) -> None:
    """Two backward passes add up, and the parts of a sum share a leaf."""
    p = problem(spec, target.device, rows=9, columns=6)
    q = problem(spec, target.device, rows=9, columns=6, values={"scale": 10.0})
    _, of_p = p.evaluate(target.backend)
    _, of_q = q.evaluate(target.backend)
    leaves = p.leaves()
    p.loss(target.backend, **leaves).backward(p.upstream)
    q.loss(target.backend, **leaves).backward(q.upstream)
    for name, leaf in leaves.items():
        check_same(name, leaf.grad, of_p[name] + of_q[name], SAME_GRADIENT)
        leaf.grad = None
    both = p.loss(target.backend, **leaves) + q.loss(target.backend, **leaves)
    both.backward(p.upstream)
    for name, leaf in leaves.items():
        check_same(name, leaf.grad, of_p[name] + of_q[name], SAME_GRADIENT)


@each_call
@each_reduction
def test_loss_without_gradient(target: Target, spec: LossSpec, reduction: str) -> None:
    p = problem(spec, target.device, rows=9, columns=6, reduction=reduction, labels="ignored")
    loss = p.loss(target.backend, **p.leaves())
    assert loss.requires_grad
    with torch.no_grad():
        alone = p.loss(target.backend, **p.leaves())
    with torch.inference_mode():
        inferred = p.loss(target.backend)
    for other in (alone, inferred, p.loss(target.backend)):
        assert not other.requires_grad
        check_same("loss", other.clone(), loss.detach(), SAME_LOSS)


@each_call
@pytest.mark.parametrize(
    ("columns", "reduction"), [(None, "none"), (6, "mean"), (6, "none")], ids=str
)
def test_some_inputs_require_gradients(
    target: Target, spec: LossSpec, columns: int | None, reduction: str
) -> None:
    """Every combination gives the gradients that all together give."""
    p = problem(spec, target.device, rows=9, columns=columns, reduction=reduction)
    _, want = p.evaluate(target.backend)
    for size in range(1, len(want)):
        for chosen in itertools.combinations(want, size):
            leaves = {name: leaf for name, leaf in p.leaves().items() if name in chosen}
            p.loss(target.backend, **leaves).backward(p.upstream)
            for name, leaf in leaves.items():
                check_same(f"{name} of {chosen}", leaf.grad, want[name], SAME_GRADIENT)


@each_fused_call
@each_reduction
@pytest.mark.parametrize("of", ["inputs", "upstream"])
def test_second_derivative_is_refused(
    target: Target, spec: LossSpec, reduction: str, of: str
) -> None:
    p = problem(spec, target.device, rows=5, columns=6, reduction=reduction)
    leaves = p.leaves()
    upstream = p.upstream.clone().requires_grad_(of == "upstream")
    loss = p.loss(target.backend, **leaves)
    (gradient,) = torch.autograd.grad(loss, leaves["rows"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(
            gradient.square().sum(), upstream if of == "upstream" else leaves["rows"]
        )


@each_loss
def test_reference_has_second_derivatives(spec: LossSpec) -> None:
    """The alternative that the error names."""
    values = {"scale": 2.0, "margin_gradient": "exact"}
    if detached(spec, spec.defaults() | values):
        pytest.skip("the gradient is not that of the value")
    p = problem(spec, rows=4, dim=3, columns=3, values=values).converted(torch.float64)
    leaves = p.leaves()
    function = _reference_function(p, list(leaves))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@each_target
def test_threshold_gradient_follows_its_tensor(target: Target) -> None:
    """Shape and dtype are those of b."""
    for spec in REGISTRY.values():
        if spec.threshold == "none":
            continue
        p = problem(spec, target.device, rows=9)
        # The same numbers in every dtype.
        p.b = p.b.bfloat16().float()
        _, want = p.evaluate(target.backend)
        for dtype in (torch.float64, torch.bfloat16):
            b = p.b.to(dtype).reshape(-1).requires_grad_()
            p.loss(target.backend, b=b).backward(p.upstream)
            assert b.grad.shape == b.shape
            assert b.grad.dtype == dtype
            check_same("b", b.grad, want["b"].to(dtype).reshape(b.shape), SAME_GRADIENT)


@each_call
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    ("columns", "where"), [(None, "rows"), (6, "rows"), (6, "columns")], ids=str
)
def test_bad_features_reach_the_loss(
    target: Target, spec: LossSpec, columns: int | None, where: str, bad: float
) -> None:
    p = problem(spec, target.device, rows=9, columns=columns)
    broken = getattr(p, where).clone()
    broken[3, 5] = bad
    for reduction, gradient in (("mean", True), ("sum", False)):
        features = broken.clone().requires_grad_(gradient)
        loss = p.loss(target.backend, reduction=reduction, **{where: features})
        assert not bool(loss.isfinite())
    rows = p.loss(target.backend, reduction="none", **{where: broken})
    if spec.topology == "class":
        meets = torch.full((9,), where == "columns")
    else:
        positive, negative = p.pairs()
        # Positives without a formula take no part.
        without = spec.positive is None and spec.triplet is None
        compared = negative if without else positive | negative
        everything = where == "columns" or columns is None
        meets = compared[:, 3].cpu() if everything else torch.zeros(9, dtype=torch.bool)
    meets[3] |= where == "rows"
    meets &= p.valid_rows().cpu()
    assert bool(meets[3]) or where == "columns"
    assert torch.equal(rows.isfinite().cpu(), ~meets)


def test_tiny_gradient_is_below_every_gradient_of_the_grid() -> None:
    """The absolute floor cannot be what lets an ordinary case pass."""
    for name, spec, values, case in parity_cases():
        if case.name != "base":
            continue
        if name.startswith("circle-none-"):
            continue  # no pair weighs anything
        _, gradients = build(case, spec, values).evaluate("reference")
        for key, gradient in gradients.items():
            assert float(gradient.norm()) > 1e10 * TINY, f"{name}: {key}"


@each_variant
def test_slope_bound_holds_and_is_not_idle(spec: LossSpec, values: dict) -> None:
    """float16 gradients are scaled by it: too small a bound would overflow."""
    if spec.reduction == "nearest" or spec.variables:
        return  # no gradient tiles, or slopes that any value of a variable can exceed
    params = spec.pack(spec.defaults() | values)
    terms = [spec.negative]
    # A row's single positive has a gradient of its own.
    if spec.positive is not None and (spec.reduction, spec.topology) != ("logsumexp", "class"):
        terms.append(spec.positive)
    largest = 0.0
    for b in (-1000.0, -10.0, 0.0, 10.0, 1000.0):
        threshold = None if spec.threshold == "none" else torch.tensor(b, dtype=torch.float64)
        for term in terms:
            cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
            value = term(cosine, threshold, params)
            (slope,) = torch.autograd.grad(value[value.isfinite()].sum(), cosine)
            largest = max(largest, float(slope.abs().max()))
    assert largest <= spec.slope_bound(params) * (1 + EXACT)
    assert largest > 0.0
