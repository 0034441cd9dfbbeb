"""Hyper-parameters of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Topology = Literal["pair", "class"]


@dataclass(frozen=True)
class Parameter:
    """One scalar hyper-parameter of a loss.

    Attributes:
        name: keyword of the public function.
        default: in the public function and in the module.
        minimum: exclusive lower bound, or None.
        at_least, maximum: inclusive bounds, or None.
        choices: for a keyword that is one of several words; the kernels receive its index.
        integer: only whole numbers, given as int, are accepted.
    """

    name: str
    default: float | str
    minimum: float | None = None
    at_least: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    integer: bool = False
