"""Expressions as straight-line code, in C++ or in Triton."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .expression import Expression, is_const, topological, value_of
from .text import comparison

# How tightly a piece of text binds: the level of an operand has to be at least the required one.
_CHOICE, _MASKS, _COMPARISON, _SUM, _PRODUCT, _CALL = range(6)
#: Own level, and what the arguments need: no operation may be reordered.
_LEVELS = {
    "add": (_SUM, (_SUM, _PRODUCT)),
    "sub": (_SUM, (_SUM, _PRODUCT)),
    "mul": (_PRODUCT, (_PRODUCT, _CALL)),
    "div": (_PRODUCT, (_PRODUCT, _CALL)),
    "neg": (_PRODUCT, (_CALL,)),
    "lt": (_COMPARISON, (_SUM, _SUM)),
    "le": (_COMPARISON, (_SUM, _SUM)),
    "eq": (_COMPARISON, (_SUM, _SUM)),
    "and": (_MASKS, (_CALL, _CALL)),
    "or": (_MASKS, (_CALL, _CALL)),
    "not": (_COMPARISON, (_CALL,)),
}
#: Spellings with the constant on the right.
_FLIPPED = {"lt": "{1} > {0}", "le": "{1} >= {0}"}
#: Names, parts and numbers, which a spelling may have twice.
_REPEATABLE = re.compile(r"[-\w.\[\]]+")
#: ``function(arguments)`` of which one of several results is meant: ``.part`` or ``[part]``.
_PART = re.compile(r"(\w+\(.*\))(?:\.(\w+)|\[(\d)\])$")


@dataclass(frozen=True)
class Dialect:
    """A language.

    Attributes:
        spelling: of each operation, ``Operation.cpp`` or ``Operation.triton``.
        literal: of a number, or of True or False.
        declare: a line that gives a name to a number or a mask: (name, text, is a mask).
        declare_parts: a line that calls a function with several results: (name, call, its parts).
        part: how one of these results is read: (name, part).
        uniform: for masks that numbers alone decide: how a mask is read from what a kernel
            receives, and a selection by it. None: as any other mask.
        longest: parts of longer expressions have lines of their own.
        compared: spellings of selections whose result a comparison reads, where they differ.
    """

    spelling: Callable[[str], str]
    literal: Callable[[float | bool], str]
    declare: Callable[[str, str, bool], str]
    declare_parts: Callable[[str, str], str]
    part: Callable[[str, str], str]
    uniform: tuple[str, str] | None = None
    longest: int = 76
    compared: Mapping[str, str] = field(default_factory=dict)


def _levels(e: Expression) -> tuple[int, tuple[int, ...]]:
    return _LEVELS.get(e.op, (_CALL, (_CHOICE,) * len(e.args)))


@dataclass
class _Piece:
    text: str
    level: int


def straight_line(
    dialect: Dialect, outputs: Mapping[str, Expression], names: Mapping[Expression, str]
) -> tuple[list[str], dict[str, str]]:
    """Lines that compute ``outputs``, and the text of each output.

    ``names``: leaves and constants that have one already.
    """
    return _Writer(dialect, outputs, names).run()


class _Writer:
    def __init__(
        self, dialect: Dialect, outputs: Mapping[str, Expression], names: Mapping[Expression, str]
    ) -> None:
        self._dialect = dialect
        self._outputs = outputs
        self._masks = {e: name for e, name in names.items() if e.mask and e.uniform}
        self._pieces = {e: _Piece(name, _CALL) for e, name in names.items()}
        if dialect.uniform is not None:
            for e, name in self._masks.items():
                self._pieces[e] = _Piece(dialect.uniform[0].format(name), _CALL)
        self._lines: list[str] = []
        self._calls: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        nodes = topological(*outputs.values(), above=self._pieces)
        self._nodes = [e for e in nodes if e not in self._pieces]
        compared = [e for e in self._nodes if e.op in ("lt", "le", "eq", "max", "min")]
        self._compared = set(topological(*(arg for e in compared for arg in e.args)))
        self._uses = Counter(arg for e in self._nodes for arg in e.args)
        self._uses.update(outputs.values())

    def run(self) -> tuple[list[str], dict[str, str]]:
        for e in self._nodes:
            self._pieces[e] = self._piece(e)
        if sum(len(self._pieces[e].text) for e in self._outputs.values()) > self._dialect.longest:
            for name, e in self._outputs.items():
                if not _REPEATABLE.fullmatch(self._pieces[e].text):
                    self._named(e, name)
        return self._lines, {name: self._pieces[e].text for name, e in self._outputs.items()}

    def _piece(self, e: Expression) -> _Piece:
        if e.op == "const":
            text = self._dialect.literal(e.mask and bool(e.payload) if e.mask else value_of(e))
            return _Piece(text, _PRODUCT if text.startswith("-") else _CALL)
        spelling = self._spelling(e)
        for place, arg in enumerate(e.args):
            repeated = spelling.count(f"{{{place}}}") > 1
            if repeated and not _REPEATABLE.fullmatch(self._pieces[arg].text):
                self._named(arg)
        for arg in sorted(e.args, key=lambda arg: -len(self._pieces[arg].text)):
            too_long = len(self._text(e, spelling)) > self._dialect.longest
            if too_long and not _REPEATABLE.fullmatch(self._pieces[arg].text):
                self._named(arg)
        level, _ = _levels(e)
        text = self._text(e, spelling)
        parts = _PART.match(text)
        if parts:
            call, part = parts[1], parts[2] or parts[3]
            if call not in self._calls:
                self._calls[call] = self._name("part")
                self._lines.append(self._dialect.declare_parts(self._calls[call], call))
            return _Piece(self._dialect.part(self._calls[call], part), _CALL)
        self._pieces[e] = _Piece(text, level)
        if self._uses[e] > 1:
            return self._named(e)
        return self._pieces[e]

    def _spelling(self, e: Expression) -> str:
        if e.op == "where" and e.args[0] in self._masks and self._dialect.uniform is not None:
            # Without the spelling of a mask.
            return self._dialect.uniform[1].replace("{0}", self._masks[e.args[0]])
        if e in self._compared and e.op in self._dialect.compared:
            return self._dialect.compared[e.op]
        if e.op in _FLIPPED and e.args[0].op == "const":
            return _FLIPPED[e.op]
        return self._dialect.spelling(e.op)

    def _text(self, e: Expression, spelling: str) -> str:
        _, wanted = _levels(e)
        pieces = [self._pieces[arg] for arg in e.args]
        texts = (
            piece.text if piece.level >= least else f"({piece.text})"
            for piece, least in zip(pieces, wanted, strict=True)
        )
        return spelling.format(*texts)

    def _named(self, e: Expression, name: str | None = None) -> _Piece:
        name = name or self._name("is" if e.mask else "x")
        self._lines.append(self._dialect.declare(name, self._pieces[e].text, e.mask))
        self._pieces[e] = _Piece(name, _CALL)
        return self._pieces[e]

    def _name(self, kind: str) -> str:
        self._count[kind] += 1
        return f"{kind}{self._count[kind] - 1}"


def names_of_constants(
    uniforms: tuple[Expression, ...], taken: frozenset[str]
) -> dict[Expression, str]:
    """A name for each constant: that of the number, or what it is made of, or its place."""
    names: dict[Expression, str] = {}
    for place, e in enumerate(uniforms):
        name = _describe(e) or ""
        usable = _IDENTIFIER.fullmatch(name) and not _TEMPORARY.fullmatch(name)
        unused = name not in taken and name not in names.values()
        names[e] = name if usable and unused else f"k{place}"
    return names


#: Names of users that may stand in generated code, and names that this module gives.
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,60}")
_TEMPORARY = re.compile(r"(x|is|part|k|slope)\d+")


def _describe(e: Expression) -> str | None:
    if e.op == "leaf":
        return str(e.payload)
    if e.op == "neg":
        inner = _describe(e.args[0])
        return inner and f"minus_{inner}"
    args = [str(arg.payload) for arg in e.args]
    if e.op in ("cos", "sin", "exp", "log", "sqrt") and e.args[0].op == "leaf":
        return f"{e.op}_{args[0]}"
    if e.op == "mul" and all(arg.op == "leaf" for arg in e.args):
        return "_times_".join(args)
    if e.op == "sub" and is_const(e.args[0], 1.0) and e.args[1].op == "leaf":
        return f"one_minus_{args[1]}"
    if comparison(e) is not None:
        name, _, word = str(comparison(e)).split(maxsplit=2)
        return f"{name}_is_{word.strip(chr(34))}"
    return None
