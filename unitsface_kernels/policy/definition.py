"""Policies: a loss's formula, written once."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from .checks import check_finite, refuse_misspelled
from .expression import (
    Expression,
    FormulaError,
    Line,
    Lines,
    fail,
    leaf,
    lift,
    recorded,
    topological,
    users_line,
)
from .formula import COSINE, COSINES, SUMS, THRESHOLD, Combination, Formula
from .nan import keeping_nan
from .parameter import Parameter, Topology
from .variable import COMPUTED, SIDES, TARGET_COSINE, Variable

_PACKAGE = __name__.partition(".")[0]
#: Other keywords of the functions, which take variables by their names.
_KEYWORDS = {"policy", "feats", "labels", "b", "memory", "memory_labels", "batch_offset", "both"}
_KEYWORDS |= {"class_index", "reduction", "backend", "skip_tolerance", "group", "exchange"}
#: Scalars of all formulas.
_SYMBOLS = {THRESHOLD, *SUMS, *COSINES}


class _Annotation:
    """What stands behind the name of a field."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


if TYPE_CHECKING:
    from torch import Tensor

    Number = Any
    Threshold = Any
    Scalar = Any
    PerRow = Any
    PerColumn = Any
    PerIdentity = Any
else:
    #: A hyper-parameter: one number, known on the host. Given as a tensor it is a Scalar.
    Number = _Annotation("number")
    #: The learnable threshold of a loss, in logit units: one, or one per column.
    Threshold = _Annotation("threshold")
    #: One number in a tensor; it may be learned.
    Scalar = _Annotation("scalar")
    #: One number per row (N,), per column (M,), or per identity (K,), in a tensor; may be learned.
    PerRow = _Annotation("row")
    PerColumn = _Annotation("column")
    PerIdentity = _Annotation("identity")


def number(
    default: float | str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    integer: bool = False,
) -> Any:
    """Default and bounds of a :data:`Number`; see :class:`Parameter`."""
    return Parameter("", default, above, at_least, maximum, choices, integer)


class Policy:
    """Base of all policies; users derive from :class:`Pair` or :class:`Class`.

    A policy's methods are written once, with the operators of Python and the functions of this
    package, for one pair of rows at cosine ``c``. Fields are the names that they read.

    ``combine`` determines what the methods return and how a row's pairs become its loss:

    - "sum": terms, which are added.
    - "softplus": logits z; softplus(-z) of positives and softplus(z) of negatives, times
      :meth:`positive_weight` and :meth:`negative_weight`, methods or fields, are added.
    - "logsumexp": logits; the mean over positives p of log(exp(z_p) + sum exp(z_n)) - z_p.
    - "logsumexps": logits; ``finish`` of the two log-sum-exps of positives and of negatives, of
      which one of no pairs is -1e30. Over classes the first is the target's logit.
    - "topk": the mean of ``triplet(nearest, target)`` over the k largest cosines with other
      classes, or with negatives, of which ``target`` is the smallest with a positive; k is the
      number ``k``, 1 if there is none. A number ``hinges``, "mean" or "sum", selects whether terms
      are averaged or added.

    ``normalize = False`` compares by inner products of the features as they are: ``c`` is one.

    ``regularizer()``, of a :class:`Class` that combines by "logsumexp", is added to the loss of
    every row; it reads numbers, scalars and variables of the row, as ``row_norm``.

    Without :meth:`positive`, positive pairs take no part; likewise :meth:`negative`. The
    log-sum-exps need ``negative``, that over classes both, and read no threshold.
    """

    #: What formulas may read of the row: its norm and, over classes, its cosine with its class,
    #: which is a constant of the gradient; of the column: its norm; of all pairs: the number of
    #: positive, and of negative ones, over that of the rows; of rows the share that has a positive.
    row_norm: Any
    target_cosine: Any
    column_norm: Any
    positives_per_row: Any
    negatives_per_row: Any
    share_with_positives: Any

    topology: ClassVar[Topology]
    combine: ClassVar[Combination] = "sum"
    normalize: ClassVar[bool] = True
    formula: ClassVar[Formula]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if any(hasattr(cls, name) for name in ("positive", "negative", "triplet")):
            lines = Lines()
            with recorded(lines):
                formula = _trace(cls)
                # The package's own are checked by its tests: it takes a while.
                if not cls.__module__.startswith(f"{_PACKAGE}.losses."):
                    check_finite(formula, lines)
            cls.formula = formula

    def __init__(self, **values: float | str | Tensor) -> None:
        if not hasattr(self, "formula"):
            raise TypeError(f"{type(self).__name__} defines neither positive nor negative")
        known = {parameter.name: parameter for parameter in self.formula.numbers}
        for name in values:
            if name not in known:
                takes = f"{type(self).__name__} takes {', '.join(known) or 'no parameters'}"
                hint = f"; is {name} annotated as a policy.Number?" if hasattr(self, name) else ""
                raise TypeError(f"{takes}, got {name}{hint}")
        for name, parameter in known.items():
            setattr(self, name, values.get(name, parameter.default))

    def values(self) -> dict[str, float | str | Tensor]:
        return {parameter.name: getattr(self, parameter.name) for parameter in self.formula.numbers}

    def __repr__(self) -> str:
        values = (f"{name}={value!r}" for name, value in self.values().items())
        # In one line, also of tensors.
        return " ".join(f"{type(self).__name__}({', '.join(values)})".split())

    def positive_weight(self) -> Any:
        return 1.0

    def negative_weight(self) -> Any:
        return 1.0


class Pair(Policy):
    """A policy of pairs of samples: of a batch, against a memory, or across ranks."""

    topology: ClassVar[Topology] = "pair"

    @property
    def target_cosine(self) -> Any:
        fail("target_cosine is that of a row's class; a row of samples may have many positives")


class Class(Policy):
    """A policy of samples against class weights; the positive is the row's own class."""

    topology: ClassVar[Topology] = "class"


def _fields(cls: type[Policy]) -> dict[str, Any]:
    """Kinds of the fields by name, those of base classes first."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(base).items():
            kind = _kind(annotation, base)
            if kind is not None:
                found[name] = kind
    return found


def _kind(annotation: Any, base: type) -> str | None:
    if isinstance(annotation, str):
        # As typing.get_type_hints, which refuses annotations that are not types.
        scope = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        last = annotation.split(".")[-1].strip()
        if last not in _KINDS:
            return None
        try:
            annotation = eval(annotation, dict(scope))
        except Exception:
            annotation = _KINDS[last]
    return annotation.kind if isinstance(annotation, _Annotation) else None


def _trace(cls: type[Policy]) -> Formula:
    fields = _fields(cls)
    this = object.__new__(cls)
    numbers: list[Parameter] = []
    variables: list[Variable] = []
    computed = {name: leaf(name, side) for name, side in COMPUTED.items()}
    for name in fields:
        taken = hasattr(Policy, name) or name in Policy.__annotations__
        if taken and name not in _WEIGHTS:
            fail(f"{cls.__name__}.{name} is a name that every policy has")
    if cls.combine not in get_args(Combination):
        known = ", ".join(map(repr, get_args(Combination)))
        fail(f"{cls.__name__}.combine must be one of {known}, got {cls.combine!r}")
    if not isinstance(cls.normalize, bool):
        fail(f"{cls.__name__}.normalize must be True or False, got {cls.normalize!r}")
    for name, value in computed.items():
        if name != TARGET_COSINE or cls.topology == "class":
            setattr(this, name, value)
    for name, kind in fields.items():
        default = getattr(cls, name, None)
        if kind == "number":
            if default is None:
                raise FormulaError(f"{cls.__name__}.{name} has no default")
            parameter = default if isinstance(default, Parameter) else Parameter("", default)
            numbers.append(replace(parameter, name=name))
            setattr(this, name, leaf(name, "number", parameter.choices))
        elif kind == "threshold":
            setattr(this, name, THRESHOLD)
        else:
            if name in _KEYWORDS or leaf(name, kind) in _SYMBOLS:
                fail(f"{cls.__name__}.{name} is a name that variables cannot have")
            variables.append(Variable(name, kind))  # type: ignore[arg-type]
            setattr(this, name, leaf(name, kind))
    refuse_misspelled(cls, _METHODS)
    terms = {name: _call(cls, this, name, COSINE) for name in ("positive", "negative")}
    for name, term in terms.items():
        if term is not None and "cosine" in term.reads:
            terms[name] = keeping_nan(term, COSINE)
    weights = tuple(
        getattr(this, name) if name in fields else _call(cls, this, name) for name in _WEIGHTS
    )
    regularizer = None if "regularizer" in fields else _call(cls, this, "regularizer")
    _check_regularizer(cls, regularizer)
    read = _leaves(*terms.values(), *weights, regularizer)
    if cls.combine not in ("sum", "softplus") and THRESHOLD in read:
        fail(
            f"{cls.__name__} combines by {cls.combine!r}, whose logits have no policy.Threshold; "
            "a policy.Scalar is one number that may be learned, too"
        )
    for name in _SIDES.get((cls.topology, cls.combine), ()):
        if terms[name] is None:
            fail(f"{cls.__name__} combines by {cls.combine!r} and has no {name}")
    if not cls.normalize:
        _refuse_angles(cls.__name__, *terms.values())
    finish = triplet = None
    if cls.combine == "logsumexps":
        finish = _required(cls, this, "finish", *SUMS)
    if cls.combine == "topk":
        triplet = _required(cls, this, "triplet", *COSINES)
        numbers = [_count(number) if number.name == "k" else number for number in numbers]
    read |= _leaves(finish, triplet)
    variables += [
        Variable(name, side, given=False)
        for name, side in COMPUTED.items()
        if computed[name] in read
    ]
    if cls.combine not in ("sum", "softplus"):
        classes = cls.topology == "class"
        streamed = _leaves(terms["negative"], *([] if classes else [terms["positive"]]))
        variables = [replace(v, streamed=leaf(v.name, v.kind) in streamed) for v in variables]
    variables.sort(key=lambda v: (SIDES.index(v.side), not v.given))
    return Formula(
        cls.__name__,
        users_line(),
        cls.topology,
        cls.combine,
        tuple(numbers),
        tuple(variables),
        "threshold" in fields.values(),
        terms["positive"],
        terms["negative"],
        weights,
        finish,
        triplet,
        cls.normalize,
        regularizer,
    )


#: Operations on cosines alone, and how they are written.
_ANGLES = {"acos": "acos", "sine": "sine", "margin": "cosine_margin"}


def _refuse_angles(name: str, *terms: Expression | None) -> None:
    for e in topological(*(e for e in terms if e is not None)):
        if e.op in _ANGLES and "cosine" in e.reads:
            fail(
                f"{name} reads policy.{_ANGLES[e.op]}, which is of a cosine; with "
                "normalize = False pairs are compared by inner products"
            )


def _leaves(*terms: Expression | None) -> set[Expression]:
    read = topological(*(e for e in terms if e is not None))
    return {e for e in read if e.op == "leaf"}


def _call(cls: type[Policy], this: Policy, name: str, *arguments: Expression) -> Any:
    method = getattr(cls, name, None)
    if method is None:
        return None
    code = getattr(method, "__code__", None)
    line = Line(code.co_filename, code.co_firstlineno) if code else users_line()
    try:
        found = method(this, *arguments)
    except FormulaError:
        raise
    except Exception as error:
        # Raised within the method: name the last line of it that was reached.
        hint = ""
        if isinstance(error, AttributeError) and isinstance(error.obj, Expression):
            hint = "; a formula is written with policy's functions, such as policy.exp(c)"
        raise FormulaError(f"{_reached(error, line)}\n  {error}{hint}") from error
    what = f"{cls.__name__}.{name}"
    if found is None:
        fail(f"{what} returns nothing", line)
    if not isinstance(found, (Expression, bool, int, float)):
        fail(f"{what} must return a number or an expression, got {type(found).__name__}", line)
    found = lift(found)
    if found.mask:
        fail(f"{what} must return a number, got a mask; use policy.where", line)
    return found


_WEIGHTS = "positive_weight", "negative_weight"
_METHODS = ("positive", "negative", *_WEIGHTS, "finish", "triplet", "regularizer")
#: Methods without which a combination has no kernels.
_SIDES = {
    ("pair", "logsumexp"): ("negative",),
    ("pair", "logsumexps"): ("negative",),
    ("class", "logsumexp"): ("positive", "negative"),
    ("class", "logsumexps"): ("positive", "negative"),
}
#: Nearest columns that kernels find, at most.
_MOST_NEAREST = 64


def _count(k: Parameter) -> Parameter:
    """A number of columns, whatever bounds it was given."""
    most = _MOST_NEAREST if k.maximum is None else min(k.maximum, _MOST_NEAREST)
    return replace(k, minimum=0, maximum=most, integer=True)


def _required(cls: type[Policy], this: Policy, name: str, *arguments: Expression) -> Any:
    found = _call(cls, this, name, *arguments)
    if found is None:
        fail(f"{cls.__name__} combines by {cls.combine!r} and has no {name}")
    for e in _leaves(found) - set(arguments):
        if e.kind not in ("number", "scalar", "row"):
            fail(
                f"{cls.__name__}.{name} may read its arguments, numbers, scalars and what is one "
                f"per row alone, not {e!r}"
            )
    return found


def _check_regularizer(cls: type[Policy], found: Expression | None) -> None:
    if found is None:
        return
    if (cls.topology, cls.combine) != ("class", "logsumexp"):
        fail(
            f"{cls.__name__}.regularizer: only a policy.Class that combines by 'logsumexp' has one"
        )
    for e in _leaves(found):
        if e.kind not in ("number", "scalar", "row"):
            fail(f"{cls.__name__}.regularizer may read numbers, scalars and rows, not {e!r}")


def _reached(error: Exception, method: Line | None) -> Line | None:
    line, trace = method, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if method is not None and code.co_filename == method.file:
            line = Line(code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return line


_KINDS = {
    "Number": Number,
    "Threshold": Threshold,
    "Scalar": Scalar,
    "PerRow": PerRow,
    "PerColumn": PerColumn,
    "PerIdentity": PerIdentity,
}
