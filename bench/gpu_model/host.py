"""Time of the host per step, without the driver: counted launches, timed code."""

from __future__ import annotations

import time

import torch
from triton.runtime.jit import JITFunction

from ..fake_device import Chip, Tape
from ..fake_device.host_time import host_time
from .launches import Launch, Pointer
from .steps import SIZE, Step

REPETITIONS, CALLS = 5, 20


def host_seconds(step: Step, chip: Chip, tape: Tape) -> float | None:
    """Of Python and Torch, and of Triton's part of each launch, each the least of several.

    None if other data than the true ones change what is launched.
    """
    try:
        found = host_time(step.build, step.rows, step.columns, SIZE, chip=chip, repeats=REPETITIONS)
    except RuntimeError:
        return None
    return found.fastest + sum(_launch_seconds(Launch.of(work)) for work in tape.of("triton"))


_seconds: dict[tuple, float] = {}


def _launch_seconds(launch: Launch) -> float:
    """From the call of a compiled kernel to that of the driver."""
    if launch.identity not in _seconds:
        args = [
            torch.empty(0, dtype=arg.dtype) if isinstance(arg, Pointer) else arg
            for arg in launch.args
        ]
        times = []
        for _ in range(REPETITIONS):
            start = time.thread_time()
            for _ in range(CALLS):
                JITFunction.run(launch.kernel, *args, **launch.options_of_launch)
            times.append((time.thread_time() - start) / CALLS)
        _seconds[launch.identity] = min(times)
    return _seconds[launch.identity]
