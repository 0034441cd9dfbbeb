"""Expressions of a loss formula: what a policy's methods compute with instead of numbers.

An expression is a node of a graph: an operation of ``operations.py`` with its arguments, or a leaf.
Equal nodes are one object, so that common subexpressions are shared from the start.
"""

from __future__ import annotations

import linecache
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

_PACKAGE = str(Path(__file__).parent) + os.sep


class FormulaError(ValueError):
    """A formula that cannot become a kernel; the message names its line."""


@dataclass(frozen=True)
class Line:
    """A line of a user's formula."""

    file: str
    number: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.number).strip()
        return f"{self.file}:{self.number}" + (f": {text}" if text else "")


def users_line() -> Line | None:
    """The innermost line outside this package that is being executed."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)


class Expression:
    """A number, or a mask, that is not known yet.

    Attributes:
        op: key of ``operations.OPERATIONS``, or "const" or "leaf".
        args: arguments of the operation.
        payload: value of a constant, name of a leaf.
        kind: of a leaf: "number" (a parameter: the same for all pairs and known on the host),
            "scalar", "row", "column", "identity" (variables, known on the device), "threshold",
            "cosine", "positive" (whether the pair is one), or "argument" (of ``finish`` and
            ``triplet``).
        mask: whether it is true or false.
        choices: of a number that is one of several words, these words.
        reads: kinds of the leaves below it.
    """

    __slots__ = ("__weakref__", "args", "choices", "kind", "mask", "op", "payload", "reads")

    op: str
    args: tuple[Expression, ...]
    payload: float | str | None
    kind: str
    mask: bool
    choices: tuple[str, ...]
    reads: frozenset[str]

    @property
    def uniform(self) -> bool:
        """Whether numbers alone decide it: the same for all pairs of a call."""
        return self.reads <= _NUMBERS

    @property
    def pairwise(self) -> bool:
        """Whether it differs from pair to pair of a row."""
        return not self.reads.isdisjoint(_PAIRWISE)

    # --- arithmetic -------------------------------------------------------------------------------

    def __add__(self, other: object) -> Expression:
        return build("add", self, other)

    def __radd__(self, other: object) -> Expression:
        return build("add", other, self)

    def __sub__(self, other: object) -> Expression:
        return build("sub", self, other)

    def __rsub__(self, other: object) -> Expression:
        return build("sub", other, self)

    def __mul__(self, other: object) -> Expression:
        return build("mul", self, other)

    def __rmul__(self, other: object) -> Expression:
        return build("mul", other, self)

    def __truediv__(self, other: object) -> Expression:
        return build("div", self, other)

    def __rtruediv__(self, other: object) -> Expression:
        return build("div", other, self)

    def __pow__(self, other: object) -> Expression:
        from .vocabulary import pow

        return pow(self, lift(other))

    def __rpow__(self, other: object) -> Expression:
        return build("pow", other, self)

    def __neg__(self) -> Expression:
        return build("neg", self)

    def __pos__(self) -> Expression:
        return self

    def __abs__(self) -> Expression:
        return build("abs", self)

    # --- comparisons and masks --------------------------------------------------------------------

    def __lt__(self, other: object) -> Expression:
        return build("lt", self, other)

    def __le__(self, other: object) -> Expression:
        return build("le", self, other)

    def __gt__(self, other: object) -> Expression:
        return build("lt", other, self)

    def __ge__(self, other: object) -> Expression:
        return build("le", other, self)

    def __eq__(self, other: object) -> Expression:  # type: ignore[override]
        if isinstance(other, str) or (self.choices and not isinstance(other, Expression)):
            if other not in self.choices:
                known = ", ".join(map(repr, self.choices)) or "a number"
                fail(f"{self!r} is compared with {other!r}, but it is {known}")
            other = self.choices.index(str(other))
        return build("eq", self, other)

    def __ne__(self, other: object) -> Expression:  # type: ignore[override]
        return build("not", self == other)

    if TYPE_CHECKING:

        def __hash__(self) -> int: ...
    else:
        __hash__ = object.__hash__

    def __and__(self, other: object) -> Expression:
        return build("and", self, other)

    def __rand__(self, other: object) -> Expression:
        return build("and", other, self)

    def __or__(self, other: object) -> Expression:
        return build("or", self, other)

    def __ror__(self, other: object) -> Expression:
        return build("or", other, self)

    def __invert__(self) -> Expression:
        return build("not", self)

    # --- what a formula cannot do -----------------------------------------------------------------

    def __bool__(self) -> NoReturn:
        fail(
            "the value of a pair decides a branch of Python (if, and, or, not, max, a chained "
            "comparison); use policy.where, and & | ~ between masks"
        )

    def _no_number(self, *_: Any) -> NoReturn:
        fail("a formula is written with policy's functions, not with those of math, numpy or torch")

    __float__: Any = _no_number
    __int__: Any = _no_number
    __index__: Any = _no_number
    __complex__: Any = _no_number
    __round__: Any = _no_number
    __len__: Any = _no_number
    __iter__: Any = _no_number
    __getitem__: Any = _no_number
    __array__: Any = _no_number

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **_: object) -> Any:
        """Operators between a number of NumPy and an expression."""
        if method == "__call__" and ufunc.__name__ in _OPERATORS:
            numbers = (x.item() if hasattr(x, "item") else x for x in inputs)
            return _OPERATORS[ufunc.__name__](*map(lift, numbers))
        self._no_number()

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        fail("a formula is written with policy's functions and numbers, not with those of torch")

    def __reduce__(self) -> tuple[Any, ...]:
        # Equal nodes are one object in every process, and copies are the node itself.
        return node, (self.op, self.args, self.payload, self.kind, self.mask, self.choices)

    def __repr__(self) -> str:
        from .text import infix

        return infix(self)


#: Operators by their names in NumPy.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "power": operator.pow,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
}

_NUMBERS = frozenset({"number"})
_PAIRWISE = frozenset({"cosine", "positive"})

_nodes: weakref.WeakValueDictionary[tuple[Any, ...], Expression] = weakref.WeakValueDictionary()
#: Two threads that made a node at once would have two that count as different.
_lock = threading.RLock()


def fail(problem: str, line: Line | None = None) -> NoReturn:
    line = line or users_line()
    raise FormulaError(f"{line}\n  {problem}" if line else problem)


# --- lines ----------------------------------------------------------------------------------------


@dataclass
class Lines:
    """The line that made each node; kept beside the nodes, which formulas may share."""

    of: dict[Expression, Line | None] = field(default_factory=dict)
    #: The line of all nodes made now, rather than the one being executed.
    fixed: Line | None = None

    def record(self, e: Expression) -> None:
        if e not in self.of:
            self.of[e] = self.fixed or users_line()


_recorder: ContextVar[Lines | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded(lines: Lines) -> Iterator[Lines]:
    """Nodes made within have their lines noted in ``lines``."""
    before = _recorder.set(lines)
    try:
        yield lines
    finally:
        _recorder.reset(before)


@contextmanager
def made_by(e: Expression) -> Iterator[None]:
    """Nodes made within, derivatives, have the line of ``e``."""
    lines = _recorder.get()
    if lines is None:
        yield
        return
    before, lines.fixed = lines.fixed, lines.of.get(e)
    try:
        yield
    finally:
        lines.fixed = before


# --- nodes ----------------------------------------------------------------------------------------


def node(
    op: str,
    args: tuple[Expression, ...] = (),
    payload: float | str | None = None,
    kind: str = "",
    mask: bool = False,
    choices: tuple[str, ...] = (),
) -> Expression:
    """The node itself, without any simplification."""
    # repr, so that 0.0 and -0.0 differ, and NaN equals itself.
    key = (op, tuple(map(id, args)), repr(payload), kind, choices)
    with _lock:
        found = _nodes.get(key)
        if found is None:
            found = Expression.__new__(Expression)
            found.op, found.args, found.payload, found.kind = op, args, payload, kind
            found.mask, found.choices = mask, choices
            found.reads = frozenset({kind} - {""}).union(*(arg.reads for arg in args))
            _nodes[key] = found
    lines = _recorder.get()
    if lines is not None:
        lines.record(found)
    return found


def leaf(name: str, kind: str, choices: tuple[str, ...] = ()) -> Expression:
    return node("leaf", payload=name, kind=kind, mask=kind == "positive", choices=choices)


def constant(value: float) -> Expression:
    return node("const", payload=float(value))


def lift(value: object) -> Expression:
    """Numbers of Python as constants."""
    if isinstance(value, Expression):
        return value
    if isinstance(value, bool):
        return node("const", payload=value, mask=True)
    if isinstance(value, Real):
        return constant(float(value))
    fail(f"a formula has numbers and expressions, got {type(value).__name__}")


def build(op: str, *arguments: object) -> Expression:
    """The operation on ``arguments``, checked and simplified."""
    from . import operations
    from .simplify import simplified

    args = tuple(lift(argument) for argument in arguments)
    operation = operations.OPERATIONS[op]
    for place, (arg, mask) in enumerate(zip(args, operation.masks(len(args)), strict=True)):
        if arg.mask != mask:
            wanted, given = ("a mask", "a number") if mask else ("a number", "a mask")
            fail(f"argument {place + 1} of {op} must be {wanted}, got {given}")
    return simplified(op, args, operation.gives_mask)


def is_const(e: Expression, value: float | None = None) -> bool:
    return e.op == "const" and (value is None or e.payload == value)


def topological(*roots: Expression, above: Container[Expression] = ()) -> list[Expression]:
    """All nodes below ``roots``, each once, arguments first; nothing below those of ``above``."""
    found: dict[Expression, None] = {}

    def visit(e: Expression) -> None:
        if e not in found:
            if e not in above:
                for arg in e.args:
                    visit(arg)
            found[e] = None

    for root in roots:
        visit(root)
    return list(found)


def value_of(e: Expression) -> float:
    assert e.op == "const"
    return float(e.payload)  # type: ignore[arg-type]
