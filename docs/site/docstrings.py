"""An extension of Griffe: docstrings as Markdown, and defaults that formulas have."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from defaults import default_of

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
        if isinstance(obj, griffe.Function) and isinstance(obj.filepath, Path):
            for parameter in obj.parameters:
                known = default_of(obj.filepath, str(parameter.default))
                parameter.default = known or parameter.default
