"""The form in which kernels compute an expression: values only, with few operations per pair.

Sums are linear combinations whose coefficients are uniform, so that ``scale * (c - margin) - b`` is
one multiplication and one subtraction, ``scale * c - (b + k)`` with a constant k. Divisions by what
is uniform are multiplications. ``detach`` means nothing for a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .expression import Expression, build, constant, is_const, value_of

ONE, ZERO = constant(1), constant(0)


@dataclass
class _Linear:
    """offset + sum of coefficient * term; offset and coefficients are uniform, terms are not."""

    terms: dict[Expression, Expression] = field(default_factory=dict)
    offset: Expression = ZERO

    def scaled(self, factor: Expression) -> _Linear:
        terms = {term: build("mul", factor, k) for term, k in self.terms.items()}
        return _Linear(terms, build("mul", factor, self.offset))

    def plus(self, other: _Linear) -> _Linear:
        terms = dict(self.terms)
        for term, k in other.terms.items():
            terms[term] = _added(terms[term], k) if term in terms else k
        terms = {term: k for term, k in terms.items() if not is_const(k, 0.0)}
        return _Linear(terms, _added(self.offset, other.offset))

    @property
    def distributes(self) -> bool:
        """Whether a factor costs nothing more when each term has its own."""
        return sum(term.pairwise for term in self.terms) <= 1

    @property
    def single(self) -> tuple[Expression, Expression] | None:
        """(coefficient, term) if that is all."""
        if len(self.terms) == 1 and is_const(self.offset, 0.0):
            ((term, k),) = self.terms.items()
            return k, term
        return None


def _added(x: Expression, y: Expression) -> Expression:
    """The sum of uniform numbers, without what cancels."""
    if is_const(x, 0.0):
        return y
    if is_const(y, 0.0):
        return x
    counts: Counter[Expression] = Counter()
    total = 0.0
    for part, sign in [*_parts(x, 1), *_parts(y, 1)]:
        if is_const(part):
            total += sign * value_of(part)
        else:
            counts[part] += sign
    terms = [(build("mul", abs(count), part), count < 0) for part, count in counts.items() if count]
    if total or not terms:
        terms.append((constant(abs(total)), total < 0))
    return _with_sign(*_signed_sum(terms))


def _parts(e: Expression, sign: int) -> Iterator[tuple[Expression, int]]:
    """Summands with their signs."""
    if e.op == "neg":
        yield from _parts(e.args[0], -sign)
    elif e.op in ("add", "sub"):
        yield from _parts(e.args[0], sign)
        yield from _parts(e.args[1], sign if e.op == "add" else -sign)
    else:
        yield e, sign


class Normalizer:
    """Caches normal forms, so that shared terms stay shared."""

    def __init__(self) -> None:
        self._linear: dict[Expression, _Linear] = {}
        self._normal: dict[Expression, Expression] = {}

    def __call__(self, e: Expression) -> Expression:
        if e not in self._normal:
            whole = e.uniform or e.mask
            found = self._without_detach(e) if whole else _expression(self.linear(e))
            self._normal[e] = self._normal[found] = found
        return self._normal[e]

    def _without_detach(self, e: Expression) -> Expression:
        if e.op == "detach":
            return self(e.args[0])
        return build(e.op, *map(self, e.args)) if e.args else e

    def linear(self, e: Expression) -> _Linear:
        if e not in self._linear:
            self._linear[e] = self._find(e)
        return self._linear[e]

    def _find(self, e: Expression) -> _Linear:
        if e.uniform:
            return _Linear({}, self(e))
        if e.op == "detach":
            return self.linear(e.args[0])
        if e.op == "neg":
            return self.linear(e.args[0]).scaled(constant(-1))
        if e.op in ("add", "sub"):
            x, y = map(self.linear, e.args)
            return x.plus(y if e.op == "add" else y.scaled(constant(-1)))
        if e.op in ("mul", "div"):
            return self._product(e)
        if not e.args:
            return _Linear({e: ONE})
        rebuilt = build(e.op, *map(self, e.args))
        return _Linear({e: ONE}) if rebuilt is e else self._atom(rebuilt)

    def _atom(self, rebuilt: Expression) -> _Linear:
        """An expression of normal ones as one term, unless it became a sum or a product."""
        if rebuilt.uniform or rebuilt.op in ("add", "sub", "neg", "mul", "div"):
            return self.linear(rebuilt)
        return self._linear.setdefault(rebuilt, _Linear({rebuilt: ONE}))

    def _product(self, e: Expression) -> _Linear:
        x, y = e.args
        if e.op == "mul" and (x.uniform or y.uniform):
            factor, other = (x, y) if x.uniform else (y, x)
            return self._times(self(factor), other)
        if e.op == "div" and y.uniform:
            return self._times(build("div", ONE, self(y)), x)
        # Uniform coefficients of both are one.
        (kx, x), (ky, y) = self._split(x), self._split(y)
        rest = build(e.op, x, y)
        if rest.op != e.op or any(a is not b for a, b in zip(rest.args, (x, y), strict=True)):
            return self._atom(rest).scaled(build(e.op, kx, ky))
        return _Linear({rest: build(e.op, kx, ky)})

    def _times(self, factor: Expression, other: Expression) -> _Linear:
        linear = self.linear(other)
        if linear.distributes:
            return linear.scaled(factor)
        return _Linear({self(other): ONE}).scaled(factor)

    def _split(self, e: Expression) -> tuple[Expression, Expression]:
        if e.uniform:
            return self(e), ONE
        return self.linear(e).single or (ONE, self(e))


def negative_sign(e: Expression) -> tuple[Expression, bool]:
    """|e| as written, and whether it has a minus."""
    if e.op == "neg":
        return e.args[0], True
    if is_const(e) and value_of(e) < 0.0:
        return constant(-value_of(e)), True
    return e, False


def _expression(linear: _Linear) -> Expression:
    pairwise: list[tuple[Expression, bool]] = []
    others: list[tuple[Expression, bool]] = []
    for term, k in linear.terms.items():
        coefficient, minus = negative_sign(k)
        place = pairwise if term.pairwise else others
        place.append((build("mul", coefficient, term), minus))
    if not is_const(linear.offset, 0.0) or not linear.terms:
        others.append(negative_sign(linear.offset))
    if not pairwise:
        return _with_sign(*_signed_sum(others))
    if not others:
        return _with_sign(*_signed_sum(pairwise))
    return _with_sign(*_signed_sum([_signed_sum(pairwise), _signed_sum(others)]))


def _signed_sum(parts: list[tuple[Expression, bool]]) -> tuple[Expression, bool]:
    """Sum of parts with their signs; as minus a sum if all have a minus."""
    all_minus = all(minus for _, minus in parts)
    found: Expression | None = None
    for part, minus in sorted(parts, key=lambda part: part[1] and not all_minus):
        if found is None:
            found = part
        else:
            found = build("sub" if minus and not all_minus else "add", found, part)
    assert found is not None
    return found, all_minus


def _with_sign(e: Expression, minus: bool) -> Expression:
    return build("neg", e) if minus else e
