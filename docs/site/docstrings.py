"""Docstrings as Markdown: an extension of Griffe for roles and formulas of reStructuredText."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
DISPLAYED = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<tex>[^\n]*(?:\n(?P=indent) +\S[^\n]*)*)", re.MULTILINE
)
#: "a, b,\n    c: text" documents several arguments at once.
SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+): (?P<text>.*)$", re.MULTILINE)


def as_markdown(text: str) -> str:
    def displayed(match: re.Match[str]) -> str:
        tex = " ".join(line.strip() for line in match["tex"].splitlines()).strip()
        return f"\n{match['indent']}$${tex}$$\n"

    def one_by_one(match: re.Match[str]) -> str:
        names = re.split(r",\s+", match["names"])
        return "\n".join(f"{match['indent']}{name}: {match['text']}" for name in names)

    text = DISPLAYED.sub(displayed, text)
    text = INLINE.sub(r"$\1$", ROLE.sub(r"`\1`", text))
    return SEVERAL.sub(one_by_one, text)


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
