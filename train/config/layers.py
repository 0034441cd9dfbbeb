"""Layers of a configuration: read, merged over the defaults, and written."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from train.config import text
from train.config.keys import choices_of
from train.config.rules import check
from train.config.sections import Config, iter_keys, kind_of, section_types
from train.errors import UserError, reported

COMMAND_LINE = "command line"
# Sources of timm's models that are fetched.
_NETWORK = re.compile("timm:.*hf[-_]hub", re.IGNORECASE | re.DOTALL)


def _rename(values: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """User keys to attribute names; any unknown key is an error that suggests a near one."""
    known = dict(iter_keys())
    renamed: dict[str, dict[str, Any]] = {}
    for section, entries in values.items():
        if not isinstance(entries, dict):
            raise UserError(f"{source}: unknown key '{section}'{_suggest(str(section), known)}")
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key not in known:
                raise UserError(f"{source}: unknown key '{key}'{_suggest(key, known)}")
            with reported(f"{source}: {key}", ValueError):
                found = _convert(value, str(known[key].type))
            renamed.setdefault(str(section), {})[known[key].name] = found
    return renamed


def _suggest(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else " (--help lists all keys)"


def _convert(value: Any, kind: str) -> Any:
    """``value`` as the type of its key.

    Raises:
        ValueError: it is not one; what was expected.
    """
    if kind.startswith("dict"):
        if not isinstance(value, dict):
            raise ValueError(f"expected {{name: value, ...}}, got {_shown(value)}")
        return copy.deepcopy(value)
    if kind.startswith("list"):
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list such as [a,b], got {_shown(value)}")
        return [_convert(item, kind.removeprefix("list[").removesuffix("]")) for item in value]
    if kind.endswith(" | None") and value is None:
        return None
    types, convert, wanted = _SCALARS[kind.removesuffix(" | None")]
    with suppress(ValueError, OverflowError):
        if type(value) in types and "\0" not in str(value):
            return convert(value)
    raise ValueError(f"expected {wanted}, got {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a section"
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    return "nothing" if value is None else shown if len(shown) < 100 else f"{shown[:100]}..."


_BOOLS = {
    **dict.fromkeys(("yes", "y", "on", "true"), True),
    **dict.fromkeys(("no", "n", "off", "false"), False),
}


def _bool(value: str | int) -> bool:
    found = _BOOLS.get(value.lower()) if isinstance(value, str) else None
    return int(value) != 0 if found is None else found


# The types that are taken, the conversion, and what is expected.
_SCALARS: dict[str, tuple[tuple[type, ...], Callable[[Any], Any], str]] = {
    "str": ((str, int, float, bool), str, "text"),
    "int": ((str, int), int, "a whole number"),
    "float": ((str, int, float), float, "a number"),
    "bool": ((str, int, bool), _bool, "true or false"),
}


def of_a_run(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values without what is true of one start only, as some versions wrote it."""
    once = [key for key, f in iter_keys() if f.metadata["once"]]
    return {
        section: {k: v for k, v in entries.items() if f"{section}.{k}" not in once}
        if isinstance(entries, dict)
        else entries
        for section, entries in values.items()
    }


def read_yaml(path: str | Path) -> dict[str, Any]:
    return of_a_run(text.sections(text.read(path), str(path)))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """``["train.lr=0.1", ...]`` to nested values; right-hand sides by the type of their key."""
    values: dict[str, Any] = {}
    for item in overrides:
        key, separator, given = item.partition("=")
        if not separator or not key:
            raise UserError(f"argument '{item}': expected key=value")
        section, _, rest = key.partition(".")
        if not rest:
            known = dict(iter_keys())
            raise UserError(f"{COMMAND_LINE}: unknown key '{key}'{_suggest(key, known)}")
        name, *path = rest.split(".")
        kind = kind_of(f"{section}.{name}")
        if path and kind and not kind.startswith("dict"):
            raise UserError(f"{COMMAND_LINE}: {section}.{name}: it has no '{'.'.join(path)}'")
        value = text.typed(given, kind, f"argument '{item}'")
        for part in reversed(path):
            value = {part: value}
        _merge(values, {section: {name: value}})
    return values


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """``over`` wins; sections and options are merged, lists replaced."""
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def make_config(*layers: tuple[str, dict[str, Any]]) -> Config:
    """Merge ``(where it came from, nested values)`` layers over the defaults, and check."""
    merged = dataclasses.asdict(Config())
    named, where = "", ""
    for source, values in layers:
        renamed = _rename(values, source)
        named = renamed.get("model", {}).get("name", named)
        where = source if "name" in renamed.get("model", {}) else where
        _merge(merged, renamed)
    if _NETWORK.match(named) and where != COMMAND_LINE:
        raise UserError(
            f"{where}: model.name={named} would be fetched from the network, which is done for a "
            f"name on the command line only (model.name=...)"
        )
    config = Config(**{name: cls(**merged[name]) for name, cls in section_types().items()})
    check(config)
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values under the user's key names; the inverse of :func:`make_config`, but for
    what is true of one start only.
    """
    return of_a_run(_all(config))


def _all(config: Config) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for key, f in iter_keys():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = getattr(getattr(config, section), f.name)
    return values


def to_yaml(config: Config) -> str:
    return yaml.dump(to_dict(config), Dumper=text.Dumper, sort_keys=False)


def describe_keys() -> str:
    """One paragraph per key for ``--help``."""
    defaults = _all(Config())
    lines = []
    for key, f in iter_keys():
        section, name = key.split(".")
        default = yaml.safe_dump(defaults[section][name], default_flow_style=True).split("\n")[0]
        choices = f" ({', '.join(choices_of(f))})" if choices_of(f) else ""
        lines += [f"  {key}={default}", f"      {f.metadata['help']}{choices}"]
    return "\n".join(lines)
