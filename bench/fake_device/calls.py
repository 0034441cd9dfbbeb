"""Calls of Python and of C functions that a step makes, launches stubbed: time without a clock.

Counted on the tensors of :mod:`.host_time`. A stand-in for a part of ``torch.cuda``, an operator or
a launch is one call of C, whatever it does. The counts depend on the versions of Python and Torch,
not on the machine or its load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from .chips import H200, Chip
from .host_time import small_step
from .steps import Build

_STANDS_IN = str(Path(__file__).parent)


class Calls(NamedTuple):
    """Calls of Python functions, generators' resumptions included, and of C functions."""

    python: int
    c: int


def calls(build: Build, rows: int, columns: int, size: int = 512, *, chip: Chip = H200) -> Calls:
    """Calls in a step of ``rows`` against ``columns`` (0: in-batch) of ``size`` features."""
    with small_step(build, (rows, columns, size), chip) as (step, _):
        return counted(step)


def counted(step: Callable[[], object]) -> Calls:
    """Calls that this thread makes in ``step``."""
    python = c = 0

    def stands_in(frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(_STANDS_IN)

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal python, c
        if event == "call" and not stands_in(frame.f_back):
            if stands_in(frame):
                c += 1
            else:
                python += 1
        elif event == "c_call" and not stands_in(frame):
            c += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(before)
    return Calls(python, c)
