"""Values as they are typed, by the type of their key: text stays as it is, the rest is YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, ScalarNode

from train.config.sections import kind_of
from train.errors import UserError, reported

# No configuration is larger; aliases within it may not expand to more values either.
MAX_CHARACTERS = 100_000
MAX_VALUES = 100_000
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'', re.DOTALL)
_ITEM = re.compile(rf"\s*({_QUOTED.pattern}|[^,]*?)\s*(?:,|$)", re.DOTALL)
# YAML 1.1 takes 1e3 for text.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")
_TAG = "tag:yaml.org,2002:"


_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class Loader(yaml.SafeLoader):
    """Finds the types of scalars: only those that a configuration is made of."""


class Dumper(yaml.SafeDumper):
    """Quotes what :class:`Loader` would not take for text."""


for _cls in (Loader, Dumper):
    _cls.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] in (*_TAGS, f"{_TAG}merge")]
        for first, pairs in _cls.yaml_implicit_resolvers.items()
    }
    _cls.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


@contextmanager
def _parsing(what: str) -> Iterator[None]:
    """Errors of YAML in one line; ``what`` is named."""
    kinds = yaml.YAMLError, ValueError, LookupError, TypeError, OverflowError
    try:
        with reported(f"{what} is not valid YAML", *kinds):
            yield
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply") from error


def load(text: str, what: str) -> yaml.Node | None:
    """The nodes of a document in YAML."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{what}: more than {MAX_CHARACTERS} characters are no configuration")
    with _parsing(what):
        return yaml.compose(text, Loader)


def read(path: str | Path) -> yaml.Node | None:
    """:func:`load` of a file."""
    what = f"configuration {path}"
    with (
        reported(f"cannot read {what}", OSError, ValueError),  # ValueError: a zero in the path
        reported(f"{what} is not valid YAML", UnicodeDecodeError),
        open(path, encoding="utf-8") as file,
    ):
        text = file.read(MAX_CHARACTERS + 1)
    return load(text, what)


def by_type(node: yaml.Node | None, kind: str, what: str) -> Any:
    """Plain values out of :func:`load` for a key of this type; see ``kind_of``."""
    left = [MAX_VALUES]
    constructor = yaml.constructor.SafeConstructor()

    def plain(node: yaml.Node) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise UserError(f"{what}: more than {MAX_VALUES} values are no configuration")
        if node.tag not in _TAGS:
            raise yaml.MarkedYAMLError(f"it has a {node.tag}", node.start_mark)
        if isinstance(node, ScalarNode):
            texts = kind in ("str", "list[str]")
            return node.value if texts else constructor.construct_object(node)
        if isinstance(node, MappingNode):
            return {name: plain(item) for name, item in _items(node).items()}
        return [plain(item) for item in node.value]

    with _parsing(what):
        return None if node is None else plain(node)


def _items(node: MappingNode) -> dict[str, yaml.Node]:
    """Its values by name, with those of the mappings that it merges; no name is there twice."""
    names = [str(key.value) for key, _ in node.value]
    for name in names:
        if names.count(name) > 1 and name != "<<":
            raise yaml.MarkedYAMLError(f"'{name}' is there twice", node.start_mark)
    merged = MappingNode(node.tag, [*node.value])
    yaml.constructor.SafeConstructor().flatten_mapping(merged)
    return {str(key.value): value for key, value in merged.value}


def sections(node: yaml.Node | None, source: str) -> dict[str, Any]:
    """Nested plain values of a whole file, every key's by its own type."""
    if node is None or (isinstance(node, ScalarNode) and node.tag == f"{_TAG}null"):
        return {}
    if not isinstance(node, MappingNode):
        kind = "text" if isinstance(node, ScalarNode) else "a list"
        raise UserError(f"{source}: expected sections of keys, got {kind}")
    found: dict[str, Any] = {}
    with _parsing(f"configuration {source}"):
        for section, entries in _items(node).items():
            if isinstance(entries, MappingNode):
                found[section] = {
                    name: by_type(value, kind_of(f"{section}.{name}"), source)
                    for name, value in _items(entries).items()
                }
            else:
                found[section] = by_type(entries, "", source)
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
