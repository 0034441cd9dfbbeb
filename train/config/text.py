"""Values as they are typed, by the type of their key: text stays as it is, the rest is YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from train.config.sections import kind_of
from train.errors import UserError

# No configuration is larger; aliases within it may not expand to more values either.
MAX_CHARACTERS = 100_000
MAX_VALUES = 100_000
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'', re.DOTALL)
_ITEM = re.compile(rf"\s*({_QUOTED.pattern}|[^,]*?)\s*(?:,|$)", re.DOTALL)
# YAML 1.1 takes 1e3 for text.
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|\.(?:inf|Inf|INF))$
    |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_TAG = "tag:yaml.org,2002:"


class Scalar(NamedTuple):
    text: str
    value: Any  # what YAML makes of it


class Loader(yaml.SafeLoader):
    """Scalars keep their text; only what a configuration is made of, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen and key != "<<":
                raise yaml.MarkedYAMLError(f"'{key}' is there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what :class:`Loader` would not take for text."""


def _scalar(kind: str) -> Any:
    construct = yaml.SafeLoader.yaml_constructors[_TAG + kind]
    return lambda loader, node: Scalar(node.value, construct(loader, node))


_KINDS = {name: yaml.SafeLoader.yaml_constructors[_TAG + name] for name in ("seq", "map")}
_KINDS.update({name: _scalar(name) for name in ("null", "bool", "int", "float", "str")})
Loader.yaml_constructors = {
    None: yaml.SafeLoader.yaml_constructors[None],
    **{_TAG + name: construct for name, construct in _KINDS.items()},
}
for _cls in (Loader, Dumper):
    _cls.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].removeprefix(_TAG) in (*_KINDS, "merge")]
        for first, pairs in _cls.yaml_implicit_resolvers.items()
    }
    _cls.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def load(text: str, what: str) -> Any:
    """YAML with a :class:`Scalar` for every scalar; ``what`` is named in errors."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{what}: more than {MAX_CHARACTERS} characters are no configuration")
    try:
        return yaml.load(text, Loader)  # of SafeLoader
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"{what} is not valid YAML: {error}") from error


def read(path: str | Path) -> Any:
    """:func:`load` of a file."""
    what = f"configuration {path}"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not valid YAML: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what}: {reason}") from error
    return load(text, what)


def by_type(value: Any, kind: str, what: str) -> Any:
    """Plain values out of :func:`load` for a key of this type; see ``kind_of``."""
    left = [MAX_VALUES]

    def plain(value: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise UserError(f"{what}: more than {MAX_VALUES} values are no configuration")
        if isinstance(value, Scalar):
            return value.text if kind in ("str", "list[str]") else value.value
        if value is None:  # of an empty document
            return None
        if isinstance(value, dict):
            return {_name(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value]

    try:
        return plain(value)
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply") from error


def _name(key: Any) -> str:
    return key.text if isinstance(key, Scalar) else str(key)


def sections(values: Any, source: str) -> dict[str, Any]:
    """Nested plain values of a whole file, every key's by its own type."""
    if values is None or values == {} or (isinstance(values, Scalar) and values.value is None):
        return {}
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "text"
        raise UserError(f"{source}: expected sections of keys, got {kind}")
    found: dict[str, Any] = {}
    for name, entries in values.items():
        section = _name(name)
        if not isinstance(entries, dict):
            found[section] = by_type(entries, "", source)
            continue
        found[section] = {
            _name(key): by_type(value, kind_of(f"{section}.{_name(key)}"), source)
            for key, value in entries.items()
        }
    return found


def typed(text: str, kind: str, what: str) -> Any:
    """The right-hand side of ``key=value`` for a key of this type.

    Text is what stands there, without quotes around all of it; so are the items of a list of texts,
    between brackets.
    """
    if kind == "str":
        return _unquote(text)
    if kind == "list[str]":
        inner = text.strip()
        if not (inner.startswith("[") and inner.endswith("]")):
            raise UserError(f"{what}: expected a list such as [a,b]")
        inner = inner[1:-1]
        return [_unquote(item[1]) for item in _ITEM.finditer(inner) if item[1]]
    return by_type(load(text, what), kind, what)


def _unquote(text: str) -> str:
    if not _QUOTED.fullmatch(text):
        return text
    for parse in (json.loads, lambda text: yaml.load(text, yaml.SafeLoader)):
        try:
            return str(parse(text))
        except (ValueError, yaml.YAMLError):
            continue
    return text
