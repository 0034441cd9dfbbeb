"""Runs the programs of ``bench.gpu_check`` one after the other on a simulated device.

Arguments: a folder for their reports. Writes ``status.json`` there, the exit statuses by name.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from simulation import simulated

from bench import gpu_profile, gpu_small_cases, isolation
from bench.gpu_check import (
    alternatives,
    compile_kernels,
    counters,
    environment,
    host,
    peers,
    pool,
    rates,
)


def inline(
    function: Callable[..., Any],
    tasks: Sequence[Any],
    jobs: int,
    limit: float,
    report: Callable[..., object],
) -> None:
    """``pool.run`` in this process."""
    for task in tasks:
        try:
            result = function(*task)
        except Exception as error:
            traceback.print_exc()
            result = {"error": pool.describe(error)}
        report(task, result)


def here(work: Any, own_process: bool) -> isolation.Runner:
    return runner(work, own_process=False)


PROGRAMS: dict[str, tuple[Any, list[str]]] = {
    "environment": (environment, []),
    "compile_kernels": (compile_kernels, []),
    "cases": (gpu_small_cases, ["--dtypes", "bfloat16", "--jobs", "1", "--match", "classes, mean"]),
    "host": (host, []),
    "rates": (rates, []),
    "profile": (gpu_profile, ["pair-32k", "class-1m", "partial-fc-1m"]),
    "alternatives": (alternatives, []),
    "counters": (counters, []),
    "peers": (peers, ["--seconds", "0.01", "class-1m"]),
}
folder = Path(sys.argv[1])
status: dict[str, Any] = {}
runner = isolation.Runner
with (
    simulated(),
    mock.patch.object(pool, "run", inline),
    mock.patch.object(isolation, "Runner", here),
    # What is compiled for a dtype does not depend on the others.
    mock.patch.object(compile_kernels, "DTYPES", ("bfloat16",)),
):
    for name, (module, arguments) in PROGRAMS.items():
        print("==", name, round(time.process_time(), 1), flush=True)
        try:
            status[name] = module.main([*arguments, "--out", str(folder / f"{name}.json")])
        except BaseException as error:
            traceback.print_exc()
            status[name] = f"{type(error).__name__}: {error}"
(folder / "status.json").write_text(json.dumps(status))
