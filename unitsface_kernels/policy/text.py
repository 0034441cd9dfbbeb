"""Expressions as infix text."""

from __future__ import annotations

import re

from .expression import Expression, topological, value_of

_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2),
          "lt": ("<", 0), "le": ("<=", 0), "eq": ("==", 0),
          "and": ("&", 0), "or": ("|", 0)}  # fmt: skip


#: Numbers and operations of a line.
_LONGEST = 100


def name_of(text: object) -> str:
    """A name as it may stand in a comment or a docstring of code: a class, a field or a word that
    was made from any string must not end it."""
    return re.sub(r"[^\w .-]", "?", str(text), flags=re.ASCII)


def infix(e: Expression) -> str:
    """``e`` in one line; "..." if that is a long one, as it may be where terms are shared."""
    sizes: dict[Expression, int] = {}
    for inner in topological(e):
        sizes[inner] = 1 + sum(sizes[arg] for arg in inner.args)
    return _text(e)[0] if sizes[e] <= _LONGEST else "..."


def _text(e: Expression) -> tuple[str, int]:
    """Text and its binding strength; 3 binds most."""
    if e.op == "const":
        return (str(e.payload) if e.mask else f"{value_of(e):g}"), 3
    if e.op == "leaf":
        return name_of(e.payload), 3
    compared = comparison(e)
    if compared is not None:
        return compared, 0
    if e.op in _INFIX:
        sign, level = _INFIX[e.op]
        left, right = (_text(arg) for arg in e.args)
        # Subtraction and division do not associate.
        tight = level + (e.op in ("sub", "div"))
        return f"{_in(left, level)} {sign} {_in(right, tight)}", level
    if e.op == "neg":
        return f"-{_in(_text(e.args[0]), 2)}", 1
    return f"{e.op}({', '.join(_text(arg)[0] for arg in e.args)})", 3


def _in(part: tuple[str, int], level: int) -> str:
    return part[0] if part[1] >= level else f"({part[0]})"


def comparison(e: Expression) -> str | None:
    """A number that is one of several words compared with one of them."""
    if e.op == "eq" and e.args[0].choices and e.args[1].op == "const":
        word = e.args[0].choices[int(value_of(e.args[1]))]
        return f'{name_of(e.args[0].payload)} == "{name_of(word)}"'
    return None
