"""Random formulas from the whole vocabulary, and what rounding may do to them.

A formula is drawn as a tree of tuples, which a policy's methods interpret. Trees are finite for all
cosines by construction: arguments of partial functions are brought into their domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unitsface_kernels import policy
from unitsface_kernels.policy.expression import Expression, leaf, lift, topological, value_of
from unitsface_kernels.policy.formula import COSINE, THRESHOLD, Formula
from unitsface_kernels.policy.operations import OPERATIONS

#: choose(n): a number below n.
Choose = Callable[[int], int]
Tree = tuple[Any, ...]

UNARY: dict[str, Callable[[Any], Any]] = {
    "exp": lambda x: policy.exp(2 * policy.tanh(x)),
    "exp of the smaller": lambda x: policy.exp(policy.minimum(x, 1)),
    "log": lambda x: policy.log(policy.square(x) + 0.5),
    "sqrt": lambda x: policy.sqrt(policy.square(x) + 0.25),
    "softplus": policy.softplus,
    "sigmoid": policy.sigmoid,
    "tanh": policy.tanh,
    "abs": policy.abs,
    "neg": lambda x: -x,
    "square": lambda x: policy.square(policy.clamp(x, -3, 3)),
    "cube": lambda x: policy.pow(policy.clamp(x, -2, 2), 3),
    "sin": policy.sin,
    "cos": policy.cos,
    "acos": lambda x: policy.acos(0.95 * policy.tanh(x)),
    "sine": lambda x: policy.sine(0.95 * policy.tanh(x)),
    "pow": lambda x: policy.pow(policy.sigmoid(x) + 0.1, 2.5),
    "root": lambda x: policy.pow(policy.sigmoid(x) + 0.1, 0.5),
    "detach": policy.detach,
    "margin": lambda x: policy.cosine_margin(0.95 * policy.tanh(x), 1.0, 0.5),
    "angular margin": lambda x: policy.cosine_margin(0.95 * policy.tanh(x), 2.0, 0.2),
    "clamp": lambda x: policy.clamp(x, -1, 1),
    "twice": lambda x: x + x,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: policy.clamp(x, -8, 8) * y,
    "div": lambda x, y: x / (policy.square(y) + 0.5),
    "max": policy.maximum,
    "min": policy.minimum,
    "by parameter": lambda x, y: x * y,
}
CHOICES: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "below": lambda x, y, z, w: policy.where(x < y, z, w),
    "at least": lambda x, y, z, w: policy.where(~(x < y) | (z > 1), z, w),
    "between": lambda x, y, z, w: policy.where((x <= y) & (y < 2), z, w),
}
CONSTANTS = (-2.0, -1.0, -0.5, 0.0, 0.3, 1.0, 2.0)
LEAVES = (*("cosine",) * 9, "a", "s", "threshold", "word", *map(str, CONSTANTS))


def tree(choose: Choose, depth: int, root: bool = True) -> Tree:
    kind = 2 + choose(6) if root else choose(8) if depth else 0
    if kind <= 1:
        return ("leaf", LEAVES[choose(len(LEAVES))])
    names = list(UNARY if kind <= 4 else BINARY if kind <= 6 else CHOICES)
    name = names[choose(len(names))]
    arity = 1 if kind <= 4 else 2 if kind <= 6 else 4
    return (name, *(tree(choose, depth - 1, root=False) for _ in range(arity)))


def without_threshold(drawn: Tree) -> Tree:
    if drawn == ("leaf", "threshold"):
        return ("leaf", "a")
    return (drawn[0], *(without_threshold(x) if isinstance(x, tuple) else x for x in drawn[1:]))


def interpreted(drawn: Tree, leaves: Mapping[str, Any]) -> Any:
    name, *args = drawn
    if name == "leaf":
        return leaves[args[0]] if args[0] in leaves else lift(float(args[0]))
    values = [interpreted(arg, leaves) for arg in args]
    return {**UNARY, **BINARY, **CHOICES}[name](*values)


def policy_of(
    positive: Tree | None, negative: Tree | None, combine: str = "sum", topology: str = "pair"
) -> type[policy.Policy]:
    """A class with a number ``a``, a positive number ``s``, a word and a threshold."""

    def method(drawn: Tree) -> Callable[[Any, Any], Any]:
        def term(self: Any, c: Any) -> Any:
            leaves = {
                "cosine": c,
                "a": self.a,
                "s": self.s,
                "threshold": self.b,
                "word": policy.where(self.word == "second", self.a, c),
            }
            # A constant formula is an expression all the same.
            return 0 * c + interpreted(drawn, leaves)

        return term

    body: dict[str, Any] = {
        "__annotations__": {
            "a": policy.Number,
            "s": policy.Number,
            "word": policy.Number,
            "b": policy.Threshold,
        },
        "a": 0.4,
        "s": policy.number(1.5, above=0.0),
        "word": policy.number("first", choices=("first", "second")),
        "combine": combine,
    }
    for name, drawn in (("positive", positive), ("negative", negative)):
        if drawn is not None:
            body[name] = method(drawn)
    base = policy.Pair if topology == "pair" else policy.Class
    return type("Drawn", (base,), body)


#: Parameters (a, s, word) at which drawn formulas are compared.
PARAMS = ((0.4, 1.5, 0.0), (-0.7, 3.0, 1.0))


def cosines(count: int = 61) -> Tensor:
    return torch.linspace(-0.995, 0.995, count, dtype=torch.float32).double()


def bindings(
    formula: Formula, params: Iterable[float], cosine: Tensor, threshold: Tensor | float
) -> dict[Expression, Tensor]:
    numbers = {
        leaf(n.name, "number", n.choices): torch.tensor(value, dtype=torch.float64)
        for n, value in zip(formula.numbers, params, strict=True)
    }
    return {COSINE: cosine, THRESHOLD: torch.as_tensor(threshold).double(), **numbers}


class Rounding:
    """Values in float64 and, to first order, what rounding to float32 in each operation does.

    Attributes:
        values: of all nodes.
        errors: bounds of |error|, of a result whose operations all err by ``UNIT`` relatively.
        stable: where no comparison is so close that rounding decides it.
    """

    UNIT = 4e-7

    def __init__(self, roots: list[Expression], leaves: Mapping[Expression, Tensor]) -> None:
        self.values: dict[Expression, Tensor] = {}
        self.errors: dict[Expression, Tensor] = {}
        self.stable = torch.tensor(True)
        nodes = topological(*roots)
        for e in nodes:
            self._value(e, leaves)
        for e in nodes:
            if not e.mask:
                self._error(e)

    def _value(self, e: Expression, leaves: Mapping[Expression, Tensor]) -> None:
        if e in self.values:
            return
        if e.op == "leaf":
            self.values[e] = leaves[e]
        elif e.op == "const":
            payload = bool(e.payload) if e.mask else value_of(e)
            self.values[e] = torch.tensor(payload, dtype=torch.bool if e.mask else torch.float64)
        else:
            for arg in e.args:
                self._value(arg, leaves)
            args = [self.values[arg] for arg in e.args]
            self.values[e] = OPERATIONS[e.op].eager(*args)

    def _error(self, e: Expression) -> None:
        if e in self.errors:
            return
        value = self.values[e]
        error = torch.zeros(())
        if e.op == "leaf" or (e.op == "const" and value_of(e) % 0.5):
            error = value.abs() * self.UNIT
        for arg, slope in zip(e.args, self._slopes(e), strict=True):
            if not arg.mask:
                self._error(arg)
                error = error + slope.abs() * self.errors[arg]
        if e.args and e.op not in ("neg", "abs", "max", "min", "where", "detach"):
            floor = 1.0 if e.op in _ABSOLUTE else 0.0
            error = error + value.abs().clamp_min(floor) * self.UNIT
        self.errors[e] = error
        compared = e.args[:2] if e.op in ("max", "min", "abs") else ()
        if e.op == "where":
            compared = [
                arg
                for mask in topological(e.args[0])
                if mask.op in ("lt", "le", "eq")
                for arg in mask.args
            ]
        pairs = list(zip(compared[::2], compared[1::2], strict=False))
        if e.op == "abs":
            pairs = [(e.args[0], None)]
        for x, y in pairs:
            self._compare(x, y)

    def _compare(self, x: Expression, y: Expression | None) -> None:
        self._error(x)
        gap, error = self.values[x], self.errors[x]
        if y is not None:
            self._error(y)
            gap, error = gap - self.values[y], error + self.errors[y]
        if x.uniform and (y is None or y.uniform):
            return
        self.stable = self.stable & ((gap.abs() > 16 * error) | (error == 0.0))

    def _slopes(self, e: Expression) -> list[Tensor]:
        if not e.args:
            return []
        if e.op in ("where", "max", "min", "detach"):
            return [torch.ones(())] * len(e.args)
        rules = OPERATIONS[e.op].derivatives(e, *e.args)
        slopes = []
        for rule in rules:
            if rule is None:
                slopes.append(torch.zeros(()))
                continue
            self._value(rule, {})
            slopes.append(self.values[rule])
        if e.op == "margin_slope":
            # Its own derivative is not among the rules: cosines stay away from the ends.
            return [torch.full((), 60.0)] * 3
        return slopes


#: Accurate relative to 1, rather than to a result that may be far smaller.
_ABSOLUTE = {"sin", "cos", "margin", "margin_slope", "acos", "log", "pow"}


def close(got: Tensor, roots: Rounding, of: Expression, factor: float = 4.0) -> Tensor:
    """Where ``got`` is what ``of`` is, up to rounding, or comparisons are too close to decide."""
    error = (got.double() - roots.values[of]).abs()
    return (error <= factor * roots.errors[of] + 1e-30) | ~roots.stable


def choose_by(generator: Any) -> Choose:
    return lambda count: generator.randrange(count)
