"""A formula at single pairs: derivatives, rounding, and whether all is finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...losses import custom
from ..definition import Policy
from ..derive import derivative
from ..eager import evaluate
from ..expression import Expression, build, is_const, leaf, node, topological
from ..form import POSITIVE, kernel_form
from ..formula import (
    COSINE,
    COSINES,
    SUMS,
    THRESHOLD,
    Formula,
    number_bindings,
    row_leaves,
    variable_leaves,
)
from ..operations import OPERATIONS
from ..variable import NEGATIVES, POSITIVES, ROW_NORM
from .report import Finding

Bindings = dict[Expression, Tensor | float]

#: Differences are those of steps of this size, relative to numbers above 1.
STEP = 1e-6
#: Closer to a cosine of -1 or 1, curvature exceeds what differences can show.
MARGIN = 1e-3
#: Thresholds, and a variable's values.
THRESHOLDS = (0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4)
VARIABLES, POSITIVE_VARIABLES = (0.3, 0.0, 1.0, -0.7), (0.3, 1.0, 2.0)
#: Log-sum-exps, and cosines of a triplet.
OF_ROWS = {
    "finish": (0.0, 3.0, -3.0, 40.0, -40.0),
    "triplet": (-1.0, -0.5, 0.0, 0.001, 0.3, 0.99, 1.0),
}
EPSILON = 2.0**-24
#: Limit, as a multiple of the largest effect of rounding every operation once: library functions
#: err by more than half a unit in the last place.
ROUNDINGS = 8.0


@dataclass(frozen=True)
class _Value:
    """An expression, as the formula has it and as kernels have it, with its derivatives there."""

    name: str
    formula: Expression
    kernel: Expression
    by: dict[Expression, Expression]
    infinite: bool  # a logit of -inf leaves its pair out


def check_formula(policy: Policy) -> list[Finding]:
    spec = custom.spec(policy)
    numbers = number_bindings(policy.formula, spec.pack(policy.values()))
    found = []
    for value in _values(policy.formula):
        bindings = _grid(value, numbers)
        found.append(_compared("kernels' form", value.name, *_both(value, bindings)))
        for leaf_, slope in value.by.items():
            name = f"{value.name}: derivative by {leaf_.payload}"
            found.append(_differences(name, value, leaf_, slope, bindings))
        for name, e in _outputs(value):
            found.append(_rounding(name, value, e, bindings))
    return found


def _outputs(value: _Value) -> Iterator[tuple[str, Expression]]:
    yield f"{value.name}: float32", value.kernel
    for leaf_, slope in value.by.items():
        yield f"{value.name}: float32, derivative by {leaf_.payload}", slope


def _values(formula: Formula) -> Iterator[_Value]:
    form = kernel_form(formula)
    leaves = [COSINE, *([THRESHOLD] if formula.threshold else []), *variable_leaves(formula)]
    for side in ("positive", "negative"):
        own = getattr(formula, side)
        if own is None:
            continue
        slopes = form.term if form.term is not None else getattr(form, side)
        if form.term is not None and formula.combine == "softplus":
            weight = formula.weights[0 if side == "positive" else 1]
            own = weight * build("softplus", -own if side == "positive" else own)
        by = (slopes.dcosine, *([slopes.dthreshold] if formula.threshold else []))
        derivatives = dict(zip(leaves, (*by, *slopes.dvariables), strict=False))
        yield _Value(side, own, slopes.value, derivatives, form.term is None)
    of_rows = ("finish", formula.finish, SUMS), ("triplet", formula.triplet, COSINES)
    for name, own, numbers in of_rows:
        if own is not None:
            by_row = (*numbers, *row_leaves(formula))
            yield _Value(name, own, own, {e: derivative(own, e) for e in by_row}, False)


def _grid(value: _Value, numbers: dict[Expression, float]) -> Bindings:
    """All leaves: the cosine along the first axis, any others along axes of their own."""
    inside = torch.linspace(-1.0, 1.0, 401, dtype=torch.float64)
    near = 1.0 - torch.logspace(-9, -2, 8, dtype=torch.float64)
    others = [
        e
        for e in topological(value.formula, value.kernel, *value.by.values())
        if e.op == "leaf" and e not in numbers and e.kind not in ("cosine", "positive")
    ]
    axes = [torch.cat([inside, near, -near]).sort().values]
    for e in others:
        known: tuple[float, ...] = THRESHOLDS if e is THRESHOLD else VARIABLES
        if e.kind == "argument":
            known = OF_ROWS[value.name]
        elif value.name in OF_ROWS or e.payload in (ROW_NORM, POSITIVES, NEGATIVES):
            # As those at which formulas have to be finite.
            known = POSITIVE_VARIABLES
        axes.append(torch.tensor(known, dtype=torch.float64))
    meshes = torch.meshgrid(*axes, indexing="ij")
    found: Bindings = {**numbers, POSITIVE: torch.tensor(value.name == "positive")}
    found.update(zip((COSINE, *others), (mesh.reshape(-1) for mesh in meshes), strict=True))
    return found


def _at(bindings: Bindings, place: int) -> str:
    named = {e.payload: v for e, v in bindings.items() if isinstance(v, Tensor) and v.dim()}
    return "at " + ", ".join(f"{name} {float(v[place]):.6g}" for name, v in named.items())


def _worst(what: str, ratio: Tensor, bindings: Bindings) -> Finding:
    """The finding of errors over what is allowed, one for each place of the grid."""
    ratio = torch.where(ratio.isfinite(), ratio, torch.inf)
    place = int(ratio.argmax())
    worst = float(ratio[place])
    note = _at(bindings, place) if worst > 0.5 else ""
    return Finding(what, "formula", worst if worst < torch.inf else torch.nan, note)


def _evaluated(e: Expression, bindings: Bindings) -> Tensor:
    return evaluate(e, bindings).expand(_size(bindings))


def _size(bindings: Bindings) -> int:
    cosine = bindings[COSINE]
    assert isinstance(cosine, Tensor)
    return cosine.numel()


def _both(value: _Value, bindings: Bindings) -> tuple[Tensor, Tensor, bool, Bindings]:
    pair = (_evaluated(e, bindings) for e in (value.kernel, value.formula))
    return (*pair, value.infinite, bindings)  # type: ignore[return-value]


def _compared(
    what: str, name: str, got: Tensor, want: Tensor, infinite: bool, bindings: Bindings
) -> Finding:
    equal = (got == want) & (want.isfinite() | infinite)
    error = torch.where(equal, 0.0, (got - want).abs() / (1e-11 * (1.0 + want.abs())))
    return _worst(f"{name}: {what}", error, bindings)


# --- finite differences ---------------------------------------------------------------------------


def _differences(
    name: str, value: _Value, by: Expression, slope: Expression, bindings: Bindings
) -> Finding:
    frozen, constants = _without_detach(value.formula)
    here = dict(bindings)
    for place, e in constants.items():
        here[place] = _evaluated(e, bindings)
    x = here.get(by)
    if not isinstance(x, Tensor):
        wrong = 0.0 if is_const(slope, 0.0) else math.inf
        return Finding(name, "formula", wrong, "the formula does not read it")
    step = STEP * x.abs().clamp_min(1.0)
    low, middle, high = (_evaluated(frozen, {**here, by: x + k * step}) for k in (-1, 0, 1))
    left, right = (middle - low) / step, (high - middle) / step
    got = _evaluated(slope, bindings)
    lower, upper = torch.minimum(left, right), torch.maximum(left, right)
    outside = torch.maximum(lower - got, got - upper).clamp_min(0.0)
    # Differences are as exact as the values' last bits, some of which are of larger terms.
    exact = 1e-6 * (1.0 + got.abs()) + 1e-15 * (1.0 + middle.abs() + x.abs()) / step
    ratio = outside / exact
    cosine = bindings[COSINE]
    assert isinstance(cosine, Tensor)
    ratio = torch.where((cosine.abs() <= 1.0 - MARGIN) & middle.isfinite(), ratio, 0.0)
    return _worst(name, torch.where(got.isfinite(), ratio, torch.inf), bindings)


def _without_detach(root: Expression) -> tuple[Expression, dict[Expression, Expression]]:
    """The expression with a leaf for each ``detach``, and what these leaves stand for."""
    made: dict[Expression, Expression] = {}
    constants: dict[Expression, Expression] = {}
    for e in topological(root):
        if e.op == "detach":
            made[e] = leaf(f"constant {len(constants)}", "scalar")
            constants[made[e]] = e.args[0]
        elif e.args:
            made[e] = node(e.op, tuple(made[arg] for arg in e.args), mask=e.mask)
        else:
            made[e] = e
    return made[root], constants


# --- rounding -------------------------------------------------------------------------------------


def _rounding(name: str, value: _Value, e: Expression, bindings: Bindings) -> Finding:
    """float32 against float64, with the first-order effect of rounding every operation."""
    rounded: Bindings = {
        k: v.float().double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in bindings.items()
    }
    single: Bindings = {
        k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in bindings.items()
    }
    exact, allowed, masks = _with_effects(e, rounded, effects=True)
    got, _, other_masks = _with_effects(e, single, effects=False)
    error = (got.double() - exact).abs()
    # Not where rounding makes another choice.
    same = torch.ones_like(exact, dtype=torch.bool)
    for a, b in zip(masks, other_masks, strict=True):
        same &= a == b
    left_out = value.infinite & (exact == -torch.inf) & (got == -torch.inf)
    ratio = torch.where(left_out | ~same, 0.0, error / (ROUNDINGS * EPSILON * allowed + 1e-30))
    finite = got.isfinite() & exact.isfinite()
    found = _worst(name, torch.where(finite | left_out, ratio, torch.inf), bindings)
    largest = float(torch.where(same & finite, error, 0.0).max())
    return found if found.note else replace(found, note=f"largest error {largest:.1e}")


def _with_effects(
    root: Expression, bindings: Bindings, effects: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Values; the sum of |d root / d node| |node| over all nodes; and the masks on the way."""
    size = _size(bindings)
    cosine = bindings[COSINE]
    assert isinstance(cosine, Tensor)
    values: dict[Expression, Tensor] = {}
    for e in topological(root):
        if e in bindings:
            given = bindings[e]
            found = given if isinstance(given, Tensor) else cosine.new_full((), given)
        elif e.op == "const":
            found = torch.tensor(e.payload, dtype=torch.bool if e.mask else cosine.dtype)
        elif e.op == "detach":
            found = values[e.args[0]]
        else:
            found = OPERATIONS[e.op].eager(*(values[arg] for arg in e.args))
        found = found.expand(size)
        if effects and not e.mask and e.op != "detach" and not found.requires_grad:
            found = found.clone().requires_grad_()
        values[e] = found
    masks = [value for e, value in values.items() if e.mask]
    result = values[root]
    if not effects:
        return result, result, masks
    nodes = [value for e, value in values.items() if not e.mask]
    total = torch.zeros_like(result)
    if result.requires_grad:
        gradients = torch.autograd.grad(result.sum(), nodes, allow_unused=True)
        for gradient, value in zip(gradients, nodes, strict=True):
            if gradient is not None:
                total = total + (gradient * value).abs().nan_to_num(0.0, 0.0, 0.0)
    return result.detach(), total.detach(), masks
