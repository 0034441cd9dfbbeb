"""Parts used by :func:`torch.compile` only; importing this module imports Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .losses import from_policy, row_formulas

R = TypeVar("R")


@torch.compiler.assume_constant_result
def constant(function: Callable[..., R], *arguments: object) -> R:
    """The result of ``function``, which a graph may contain as a constant."""
    return function(*arguments)


#: A formula's graph is not traced; the operations that it comes to are.
row_value = torch.compiler.allow_in_graph(row_formulas.row_value)
evaluate_term = torch.compiler.allow_in_graph(from_policy.evaluate)
