"""Time of the host per step, without the driver: counted launches, timed code."""

from __future__ import annotations

import time
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from unitsface_kernels.backends.triton import launch as backend

from ..fake_device import Chip, Tape
from ..fake_device.host_time import host_time
from .launches import Launch, Pointer
from .steps import SIZE, Step

REPETITIONS, CALLS = 5, 20


def host_seconds(step: Step, chip: Chip, tape: Tape) -> float | None:
    """Host time of Python and Torch and of Triton's part of each launch, each the least of several.

    None if the launches depend on the data.
    """
    try:
        found = host_time(step.build, step.rows, step.columns, SIZE, chip=chip, repeats=REPETITIONS)
    except RuntimeError:
        return None
    return found.fastest + sum(_launch_seconds(Launch.of(work)) for work in tape.of("triton"))


_seconds: dict[tuple, float] = {}


def _launch_seconds(launch: Launch) -> float:
    """Time from the package's call of a compiled kernel to Triton's call of the driver."""
    if launch.identity not in _seconds:
        args = [
            torch.empty(0, dtype=arg.dtype) if isinstance(arg, Pointer) else arg
            for arg in launch.args
        ]
        compiled = launch.compile()
        # Triton takes it for loaded.
        compiled.module, compiled.function, compiled._run = True, 0, lambda *_: None
        times = []
        with patch.dict(backend._ready, clear=True):
            with patch.object(JITFunction, "run", lambda *_, **__: compiled):
                backend.run(launch.kernel, launch.programs, *args, **launch.options)
            for _ in range(REPETITIONS):
                start = time.thread_time()
                for _ in range(CALLS):
                    backend.run(launch.kernel, launch.programs, *args, **launch.options)
                times.append((time.thread_time() - start) / CALLS)
        _seconds[launch.identity] = min(times)
    return _seconds[launch.identity]
