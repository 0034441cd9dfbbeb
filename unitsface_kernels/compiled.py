"""Parts used by :func:`torch.compile` only; importing this module imports Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


@torch.compiler.assume_constant_result
def constant(function: Callable[..., R], *arguments: object) -> R:
    """The result of ``function``, which a graph may contain as a constant."""
    return function(*arguments)
