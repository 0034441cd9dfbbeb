"""What kernels compute of a formula: merged over positives and negatives, with derivatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from .derive import derivative
from .expression import Expression, build, constant, is_const, leaf, topological, value_of
from .formula import COSINE, THRESHOLD, Formula, variable_leaves
from .merge import Merger, cost
from .nan import keeping_nan
from .normal import Normalizer
from .operations import OPERATIONS

#: Whether a pair is a positive one.
POSITIVE = leaf("positive", "positive")

#: Kernels are those of these: "sum" also serves logits whose kernels cannot be those of "softplus".
Kind = Literal["sum", "softplus", "logsumexp", "logsumexps", "topk"]


@dataclass(frozen=True, eq=False)
class Slopes:
    """A value and its derivatives, for kernels: the first is not to be differentiated again.

    Attributes:
        value: of the pair.
        dcosine, dthreshold: d value / d cosine, d threshold.
        dvariables: d value / d each of ``Formula.variables``.
    """

    value: Expression
    dcosine: Expression
    dthreshold: Expression
    dvariables: tuple[Expression, ...]

    def all(self) -> tuple[Expression, ...]:
        return self.value, self.dcosine, self.dthreshold, *self.dvariables


@dataclass(frozen=True, eq=False)
class KernelForm:
    """A formula as kernels compute it. Expressions read the cosine, :data:`POSITIVE`, the
    threshold, variables, and numbers only within ``uniforms``.

    Attributes:
        formula: the formula.
        kind: of the kernels.
        uniforms: what numbers alone decide: computed on the host, see :meth:`constants`. A mask
            among them is 1 or 0.
        term: of "sum" and "softplus": loss of a pair, positive or negative, with derivatives.
        logit: of "softplus": z, with derivatives; the loss is ``weight * softplus(-z)`` of a
            positive and ``weight * softplus(z)`` of a negative.
        threshold_slope: of "softplus": d z / d threshold, -1, 0 or 1.
        weights: of "softplus": of positives and of negatives, uniform; None: 1 and 1.
        positive, negative: of "logsumexp" and "logsumexps": logits with derivatives. None: such
            pairs take no part.
        linear: of "logsumexp": whether a negative's logit is its derivative, which is the same for
            all pairs and, without variables, above 0, times the cosine.
        factor: of "logsumexp": the place of the variable v, never 0, with v dz/dv = c dz/dc for
            logits z of negatives, as those are that are v times the cosine c. None: there is none.
    """

    formula: Formula
    kind: Kind
    uniforms: tuple[Expression, ...] = ()
    term: Slopes | None = None
    logit: Slopes | None = None
    threshold_slope: float = 0.0
    weights: tuple[Expression, Expression] | None = None
    positive: Slopes | None = None
    negative: Slopes | None = None
    linear: bool = False
    factor: int | None = None
    _known: dict[tuple[float, ...], tuple[float, ...]] = field(default_factory=dict, repr=False)

    def constants(self, params: tuple[float, ...]) -> tuple[float, ...]:
        """The floats that kernels receive, from the loss's parameters as ``LossSpec.pack`` has
        them."""
        found = self._known.get(params)
        if found is None:
            if len(self._known) >= 1024:
                self._known.clear()
            found = self._known[params] = host_values(self.uniforms, self.formula, params)
        return found


def host_values(
    expressions: tuple[Expression, ...], formula: Formula, params: tuple[float, ...]
) -> tuple[float, ...]:
    """Uniform expressions in float64, masks as 1 and 0."""
    names = [parameter.name for parameter in formula.numbers]
    numbers = dict(zip(names, params, strict=True))
    values: dict[Expression, float] = {}
    for e in topological(*expressions):
        if e.op == "const":
            values[e] = e.payload if e.mask else value_of(e)  # type: ignore[assignment]
        elif e.op == "leaf":
            values[e] = numbers[str(e.payload)]
        else:
            values[e] = OPERATIONS[e.op].host(*(values[arg] for arg in e.args))
    return tuple(float(values[e]) for e in expressions)


@cache
def kernel_form(formula: Formula) -> KernelForm:
    """The kernel form, made once per formula."""
    return _Maker(formula).form()


class _Maker:
    def __init__(self, formula: Formula) -> None:
        self._formula = formula
        self._normal = Normalizer()
        self._merge = Merger(POSITIVE)

    def form(self) -> KernelForm:
        formula = self._formula
        if formula.combine == "topk":
            # The search has no formula, what follows it is eager.
            return KernelForm(formula, "topk")
        if formula.combine in ("logsumexp", "logsumexps"):
            return self._logsumexp(formula.combine)
        if formula.combine == "softplus":
            found = self._softplus()
            if found is not None:
                return found
        return self._sum()

    def _by_all(self, of: Expression) -> tuple[Expression, ...]:
        """d ``of`` / d cosine, threshold and variables."""
        variables = variable_leaves(self._formula)
        return tuple(derivative(of, by) for by in (COSINE, THRESHOLD, *variables))

    def _slopes(self, of: Expression) -> Slopes:
        cosine, threshold, *variables = map(self._normal, self._by_all(of))
        return Slopes(self._value(of), cosine, threshold, tuple(variables))

    def _value(self, of: Expression) -> Expression:
        """``of`` in normal form, in which a cosine that is not a number may have canceled."""
        return keeping_nan(self._normal(of), COSINE) if "cosine" in of.reads else self._normal(of)

    def _merged(self, yes: Slopes, no: Slopes) -> Slopes:
        value, cosine, threshold, *variables = (
            self._normal(self._merge(x, y)) for x, y in zip(yes.all(), no.all(), strict=True)
        )
        return Slopes(value, cosine, threshold, tuple(variables))

    def _sum(self) -> KernelForm:
        terms = (term_of(self._formula, side) for side in (True, False))
        term = self._merged(*map(self._slopes, terms))
        return KernelForm(self._formula, "sum", uniforms_of(*term.all()), term=term)

    def _softplus(self) -> KernelForm | None:
        """The form of a weighted softplus of a logit; None if there is no such logit."""
        positive, negative = self._formula.positive, self._formula.negative
        if positive is None or negative is None:
            return None
        if not all(weight.uniform for weight in self._formula.weights):
            return None
        logit = self._merged(self._slopes(positive), self._slopes(negative))
        # Merged with their signs, or with a sign for the merged one, whichever costs less.
        signed = min(
            self._merge(self._value(-positive), self._value(negative)),
            build("where", POSITIVE, -logit.value, logit.value),
            key=cost,
        )
        of_positives, of_negatives = map(self._normal, self._formula.weights)
        weight = self._merge(of_positives, of_negatives)
        slope = self._merge(-of_positives, of_negatives) * build("sigmoid", signed)
        term = Slopes(
            weight * build("softplus", signed),
            slope * logit.dcosine,
            slope * logit.dthreshold,
            tuple(slope * by for by in logit.dvariables),
        )
        by_threshold = logit.dthreshold
        if (
            self._formula.variables
            or not is_const(by_threshold)
            or value_of(by_threshold) not in (-1.0, 0.0, 1.0)
        ):
            return KernelForm(self._formula, "sum", uniforms_of(*term.all()), term=term)
        weights = None
        if not (is_const(of_positives, 1.0) and is_const(of_negatives, 1.0)):
            weights = of_positives, of_negatives
        return KernelForm(
            self._formula,
            "softplus",
            uniforms_of(*logit.all(), *term.all(), *(weights or ())),
            term=term,
            logit=logit,
            threshold_slope=value_of(by_threshold),
            weights=weights,
        )

    def _logsumexp(self, kind: Literal["logsumexp", "logsumexps"]) -> KernelForm:
        positive, negative = (
            None if logit is None else self._slopes(logit)
            for logit in (self._formula.positive, self._formula.negative)
        )
        if self._formula.topology == "class":
            # A row has one positive: what is made of its logit is no work of tiles.
            kind = "logsumexp"
        outputs = [e for slopes in (positive, negative) if slopes for e in slopes.all()]
        linear = negative is not None and negative.value is self._normal(negative.dcosine * COSINE)
        # By numbers and scalars alone, which are the same for all pairs.
        shared = negative is not None and negative.dcosine.reads <= {"number", "scalar"}
        # Kernels leave pairs out by cosines of -inf, unless there are variables.
        shared = shared and negative is not None and self._is_positive(negative.dcosine)
        return KernelForm(
            self._formula,
            kind,
            uniforms_of(*outputs),
            positive=positive,
            negative=negative,
            linear=linear and shared,
            factor=None if negative is None else self._factor(negative),
        )

    def _is_positive(self, e: Expression) -> bool:
        """Whether numbers within their bounds make it larger than 0; any scalar may."""
        if e.op == "const":
            return value_of(e) > 0.0
        if e.op in ("mul", "div"):
            return all(map(self._is_positive, e.args))
        bounds = [n.minimum for n in self._formula.numbers if leaf(n.name, "number") is e]
        return e.kind == "scalar" or any(least is not None and least >= 0.0 for least in bounds)

    def _factor(self, negative: Slopes) -> int | None:
        by_cosine = self._normal(negative.dcosine * COSINE)
        leaves = variable_leaves(self._formula)
        for place, variable in enumerate(self._formula.variables):
            if not variable.nonzero:
                continue
            if self._normal(leaves[place] * negative.dvariables[place]) is by_cosine:
                return place
        return None


def slopes_of_cosine(form: KernelForm) -> list[Expression]:
    """What bounds of tiles of gradients are those of: d value / d cosine of terms, or d logit / d
    cosine of negatives, and of positives if there is any number of them.
    """
    if form.term is not None:
        return [form.term.dcosine]
    sides = [form.negative]
    if form.formula.topology == "pair" or form.negative is None:
        sides.append(form.positive)
    return [side.dcosine for side in sides if side is not None]


def term_of(formula: Formula, positive: bool) -> Expression:
    """The loss of a pair that is positive, or negative; 0 of pairs that take no part."""
    value = formula.positive if positive else formula.negative
    if value is None:
        return constant(0)
    if formula.combine != "softplus":
        return value
    weight = formula.weights[0 if positive else 1]
    return weight * build("softplus", -value if positive else value)


def uniforms_of(*outputs: Expression) -> tuple[Expression, ...]:
    """The largest subexpressions that numbers alone decide, in the order of their first use."""
    found: dict[Expression, None] = {}
    for e in topological(*outputs):
        if not e.uniform:
            found.update(dict.fromkeys(arg for arg in e.args if is_uniform(arg)))
    found.update(dict.fromkeys(e for e in outputs if is_uniform(e)))
    return tuple(found)


def is_uniform(e: Expression) -> bool:
    """Whether kernels receive it as a constant, rather than as a literal."""
    return e.uniform and not is_const(e)
