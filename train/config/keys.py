"""The metadata of a configuration key: its default, help text, choices and bounds."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any


def about(
    help: str,
    *,
    name: str | None = None,
    choices: Any = None,
    low: float | None = None,
    high: float | None = None,
    once: bool = False,
) -> dict[str, Any]:
    """The metadata of a field. ``choices`` is a sequence, or a function giving one; ``once`` is
    for what is true of one start only: it is neither written into a run nor read from a file.
    """
    return {
        "help": help,
        "name": name,
        "choices": choices,
        "low": low,
        "high": high,
        "once": once,
    }


def key(default: Any, help: str, **bounds: Any) -> Any:
    """A field with this default."""
    return field(default=default, metadata=about(help, **bounds))


def key_name(f: dataclasses.Field[Any]) -> str:
    """The user's name of a field: ``loss.class`` cannot be an attribute in Python."""
    return str(f.metadata.get("name") or f.name)


def choices_of(f: dataclasses.Field[Any]) -> tuple[str, ...]:
    choices = f.metadata["choices"]
    return tuple(choices() if callable(choices) else choices or ())
