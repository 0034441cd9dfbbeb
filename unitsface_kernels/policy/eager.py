"""Formulas as plain Torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .expression import Expression, topological
from .operations import OPERATIONS


def evaluate(e: Expression, bindings: Mapping[Expression, Tensor | float]) -> Tensor:
    """The value of ``e`` with its leaves at ``bindings``."""
    like = next(value for value in bindings.values() if isinstance(value, Tensor))
    found: dict[Expression, Tensor] = {}
    for node in topological(e):
        if node in bindings:
            value = bindings[node]
            found[node] = value if isinstance(value, Tensor) else like.new_full((), float(value))
        elif node.op == "const":
            dtype = torch.bool if node.mask else like.dtype
            found[node] = torch.full((), node.payload, dtype=dtype, device=like.device)
        else:
            found[node] = OPERATIONS[node.op].eager(*(found[arg] for arg in node.args))
    return found[e]
