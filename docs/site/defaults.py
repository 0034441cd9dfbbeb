"""Defaults that a signature takes from a loss's formula, read from the sources.

``scale: float = _USS.scale`` with ``_USS = REGISTRY["uss"].default`` is the field ``scale`` of the
policy in ``losses/uss.py``. The site is built without Torch, so nothing is imported.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

LOSSES = Path(__file__).resolve().parents[2] / "unitsface_kernels" / "losses"


def default_of(path: Path, expression: str) -> str | None:
    """What ``_NAME.field`` in the file ``path`` is, as source; None: not such a default."""
    name, _, field = expression.partition(".")
    loss = _losses_of(path).get(name)
    return _fields(loss).get(field) if loss else None


@cache
def _losses_of(path: Path) -> dict[str, str]:
    """Files of ``losses/`` by the names of their defaults."""
    tree, found = ast.parse(path.read_text()), {}
    imported = {
        alias.asname or alias.name: (node.module or "").rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "losses" in (node.module or "")
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = _values(node.value)
            for left, loss in zip(names, values, strict=False):
                if isinstance(left, ast.Name) and loss is not None:
                    known = imported.get(loss, loss)
                    found[left.id] = loss if known == "losses" else known
    return found


def _values(value: ast.expr) -> list[str | None]:
    """The losses whose defaults an expression is: several, of a tuple or a generator."""
    if isinstance(value, ast.Tuple):
        return [loss for element in value.elts for loss in _values(element)]
    if isinstance(value, ast.GeneratorExp) and isinstance(value.generators[0].iter, ast.Tuple):
        return [_named(element) for element in value.generators[0].iter.elts]
    if isinstance(value, ast.Attribute) and value.attr == "default":
        spec = value.value
        if isinstance(spec, ast.Subscript):
            return [_named(spec.slice)]
        return [_named(spec.value if isinstance(spec, ast.Attribute) else spec)]
    return [None]


def _named(node: ast.expr) -> str | None:
    """A loss by its name, its file or what is imported from it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.id if isinstance(node, ast.Name) else None


@cache
def _fields(loss: str) -> dict[str, str]:
    """Defaults of a file's policy, those that it inherits first."""
    path = LOSSES / f"{loss}.py"
    if not path.is_file():
        return {}
    fields: dict[str, str] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            # A formula that derives from another one, or is another one.
            for other in [node.module] if node.module else [alias.name for alias in node.names]:
                fields |= _fields(other)
        elif isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and field.value is not None:
                    assert isinstance(field.target, ast.Name)
                    fields[field.target.id] = _written(field.value)
    return fields


def _written(value: ast.expr) -> str:
    """``policy.number(64.0, above=0.0)`` is 64.0."""
    if isinstance(value, ast.Call) and value.args:
        value = value.args[0]
    return ast.unparse(value)
