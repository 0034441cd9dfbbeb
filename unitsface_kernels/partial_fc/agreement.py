"""Ranks find out before a step that they agree, and that no one has made a mistake.

A rank that raised an error on its own would leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from .. import validate
from ..collectives import Group, gather_numbers, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Agreement:
    """What the ranks told each other.

    Attributes:
        counts: rows of every rank.
        wanted: per rank, whether its features want a gradient.
    """

    counts: list[int]
    wanted: list[bool]


def agree(
    check: Callable[[], int],
    wants_gradient: Callable[[], bool],
    configuration: dict[str, int],
    device: torch.device,
    group: Group,
) -> Agreement:
    """Exchanges a few numbers; waits for the device if there is more than one rank.

    Args:
        check: raises for this rank's mistakes, and returns its number of rows.
        wants_gradient: of its features; asked after the check.
        configuration: numbers that must be the same on every rank, by name.

    Raises:
        TypeError, ValueError: on the rank at fault what ``check`` raised; on the others, and
            where configurations differ, a ValueError that names the ranks.
    """
    if world_size(group) == 1:
        return Agreement([check()], [wants_gradient()])
    mistake: Exception | None = None
    own = [0, 0, 0]
    try:
        own = [1, check(), int(wants_gradient())]
    except (TypeError, ValueError) as error:
        mistake = error
    told = gather_numbers([*own, *configuration.values()], device, group)
    if mistake is not None:
        raise mistake
    validate.ranks_are_well(told[:, 0].tolist())
    for name, values in zip(configuration, told[:, 3:].T.tolist(), strict=True):
        validate.ranks_agree(name, values)
    return Agreement(told[:, 1].tolist(), told[:, 2].bool().tolist())


def together(what: str, work: Callable[[], T], device: torch.device, group: Group) -> T:
    """What ``work`` returns, if it succeeds on every rank; it must not communicate.

    Raises:
        Exception: on a rank that failed what it raised; on the others a ValueError naming ``what``
            and the rank.
    """
    mistake: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        mistake = error
    well = gather_numbers([int(mistake is None)], device, group)[:, 0].tolist()
    if mistake is not None:
        raise mistake
    validate.ranks_succeeded(what, well)
    return result  # type: ignore[return-value]
