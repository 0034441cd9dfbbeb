"""``python -m bench.gpu_check.host``: is a step bound by the host or by the device?

A step's wall time, the time the host takes to launch it, and the time of the replay of its CUDA
graph, in which the device waits for nothing; beside it what ``python -m bench.gpu_model`` predicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import pool, steps, timing
from .files import write_json

BACKENDS = ("triton", "native")
LAUNCHED, IN_A_ROW = 8, 8
LIMIT_S = 30.0
MODEL = Path(__file__).resolve().parents[1] / "results" / "gpu_model.json"


def predictions(file: Path, architecture: int, triton: str) -> dict[str, float]:
    """Predicted seconds by step; nothing where there is no prediction for such a device.

    Args:
        file: results of ``python -m bench.gpu_model``.
        architecture: such as 90.
        triton: version; where it has not been modeled, any other.
    """
    if not file.exists():
        return {}
    rows = [
        row for row in json.loads(file.read_text())["steps"] if row["architecture"] == architecture
    ]
    # The version at hand last, so that it decides.
    rows.sort(key=lambda row: row["triton"] == triton)
    return {row["step"]: row["predicted_seconds"] for row in rows}


def launch_seconds(run: Callable[[], object]) -> float:
    """Median time until the host has launched a step, with the device idle before it."""
    times = []
    for _ in range(LAUNCHED):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def wall_seconds(run: Callable[[], object]) -> float:
    """Mean time of a step in a row of several, as in training."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(IN_A_ROW):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / IN_A_ROW


def replay_seconds(run: Callable[[], object]) -> float:
    """Median time of a replay of the step's graph.

    Raises:
        RuntimeError: the step cannot be captured. The device may then be of no further use.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(steps.WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timing.median(graph.replay, at_least=0.1)


def measure(name: str, backend: str) -> dict[str, Any]:
    """One step, in a process of its own."""
    one = steps.make(name, backend)
    steps.warm(one)
    found: dict[str, Any] = {
        "wall_s": wall_seconds(one.run),
        "launch_s": launch_seconds(one.run),
        "event_s": timing.median(one.run),
    }
    try:
        found["replay_s"] = replay_seconds(one.run)
        found["host_bound"] = found["launch_s"] > found["replay_s"]
    except Exception as error:  # what was measured before is still of use
        found["capture"] = f"{type(error).__name__}: {error}"[:300]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.host", description=__doc__)
    parser.add_argument("names", nargs="*", default=steps.NAMES, help="of the steps")
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    report: dict[str, dict[str, Any]] = {}
    major, minor = torch.cuda.get_device_capability()
    predicted = predictions(MODEL, 10 * major + minor, metadata.version("triton"))

    def add(task: pool.Task, result: dict[str, Any]) -> None:
        name, backend = task
        if backend == "triton" and name in predicted:
            result["predicted_s"] = predicted[name]
            if "replay_s" in result:
                result["replay_over_predicted"] = result["replay_s"] / predicted[name]
        report[f"{name} {backend}"] = result
        print(*task, result, flush=True)
        if given.out is not None:
            write_json(given.out, report)

    tasks = [(name, backend) for name in given.names for backend in given.backends]
    # One at a time: they are timed.
    pool.run(measure, tasks, jobs=1, limit=LIMIT_S, report=add)
    return 1 if any("error" in row for row in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
