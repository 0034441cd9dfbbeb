"""``python -m bench.crossover``: the number of pairs from which native is faster than eager.

``backend="auto"`` is based on the stored result. Forward and backward in one process: below the
crossover the overhead of the calls dominates, and the thread pool has to stay awake.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

from .inputs import make_inputs
from .machine import machine
from .workloads import Workload, step

OUT = Path(__file__).resolve().parent / "results" / "crossover.json"
SIDES = (16, 32, 64, 128, 256, 512, 1024)
SIZES = (128, 512)
LOSSES = ("uss", "margin_softmax")
BACKENDS = ("reference", "native")
# Consecutive steps of one backend.
TURN = 5


def workload(loss: str, side: int, size: int) -> Workload:
    """``side`` x ``side`` pairs."""
    pair = loss == "uss"
    return Workload(f"{loss} {side}", loss, side, 0 if pair else side, size, 1.5 if pair else 4.0)


def medians(work: Workload, seconds: float) -> dict[str, float]:
    """Median seconds of a step of each backend, interleaved."""
    inputs = make_inputs(work)
    losses = {backend: work.fused(backend) for backend in BACKENDS}
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for loss in losses.values():
        step(loss, inputs)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["native"]) < TURN:
        for backend, loss in losses.items():
            for _ in range(TURN):
                start = time.perf_counter()
                step(loss, inputs)
                times[backend].append(time.perf_counter() - start)
    return {backend: statistics.median(samples) for backend, samples in times.items()}


def native_from(points: list[dict]) -> int | None:
    """The least measured number of pairs from which on native is faster throughout."""
    found = None
    for point in sorted(points, key=lambda point: -point["pairs"]):
        if point["native_s"] >= point["reference_s"]:
            break
        found = point["pairs"]
    return found


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.crossover", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per point")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="N, and C of classes")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    results = {
        "command": shlex.join(["python", "-m", "bench.crossover", *argv]),
        "machine": machine(),
        "curves": [],
    }
    for loss in LOSSES:
        for size in SIZES:
            points = []
            for side in arguments.sides:
                found = medians(workload(loss, side, size), arguments.seconds)
                points.append({"pairs": side * side, **{f"{b}_s": t for b, t in found.items()}})
                print(
                    f"{loss:15} D {size:4} {side:4} x {side:<4}"
                    + "".join(f" {b} {1e3 * t:8.3f} ms" for b, t in found.items()),
                    flush=True,
                )
            where = native_from(points)
            print(f"{loss:15} D {size:4}: native is faster from {where or 'nowhere'} pairs on")
            curve = {"loss": loss, "size": size, "points": points, "native_from_pairs": where}
            results["curves"].append(curve)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
