"""The metadata of a configuration key: its default, help text, choices and bounds."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field
from typing import Any

# A class of the user's own, package.module:Class.
_CLASS = re.compile(r"[a-z_]\w*(\.[a-z_]\w*)*:[a-z_]\w*", re.ASCII | re.IGNORECASE)


def key(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    choices: Any = None,
    low: float | None = None,
    high: float | None = None,
    once: bool = False,
    own: bool = False,
) -> Any:
    """A field with this default, or a new list or dict of that type.

    ``choices`` is a sequence, or a function giving one; ``once`` is for what is true of one start
    only: it is neither written into a run nor read from a file. ``own``: beside the choices, the
    name of a class of the user's own.
    """
    about = {"help": help, "name": name, "choices": choices, "low": low, "high": high}
    about |= {"once": once, "own": own}
    if isinstance(default, type):
        return field(default_factory=default, metadata=about)
    return field(default=default, metadata=about)


def share(default: float, help: str) -> Any:
    """A field for a number between 0 and 1."""
    return key(default, help, low=0.0, high=1.0)


def key_name(f: dataclasses.Field[Any]) -> str:
    """The user's name of a field: ``loss.class`` cannot be an attribute in Python."""
    return str(f.metadata.get("name") or f.name)


def choices_of(f: dataclasses.Field[Any]) -> tuple[str, ...]:
    choices = f.metadata["choices"]
    return tuple(choices() if callable(choices) else choices or ())


def names_class(value: object) -> bool:
    """Whether a choice is the name of a class of the user's own, which need not exist."""
    return isinstance(value, str) and _CLASS.fullmatch(value) is not None
