"""``python -m bench.scaling``: time and memory against N (pairs) and C (classes), eager beside it.

Every point runs in a process of its own. A line ``a + b N M D`` is fitted to our times, by least
squares of relative errors, and its largest deviation reported: the throughput must not fall as the
matrix that is never stored outgrows caches and memory.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from . import harness, plots
from .implementations import PRIMARY
from .machine import gemm_rate, machine
from .session import ImplementationFailedError, start
from .workloads import Workload

RESULTS = Path(__file__).resolve().parent / "results"
PAIR_ROWS = tuple(1024 << k for k in range(7))
CLASSES = (10_000, 40_000, 100_000, 400_000, 1_000_000, 4_000_000)
CLASS_ROWS, SIZE = 512, 512
CURVES = {
    "pair": [Workload(f"uss, N = {n}", "uss", n, 0, SIZE, 1.5) for n in PAIR_ROWS],
    "class": [
        Workload(f"cosface, C = {c}", "margin_softmax", CLASS_ROWS, c, SIZE, 3.0) for c in CLASSES
    ],
}


def volume(point: dict) -> float:
    """N M D."""
    return float(point["rows"]) * (point["columns"] or point["rows"]) * point["size"]


def fit(volumes: list[float], seconds: list[float]) -> dict[str, float]:
    """``a + b x`` with the least squares of relative errors: of a/t + b x/t - 1.

    A negative ``a`` is replaced by 0.
    """
    ones = [1.0 / t for t in seconds]
    slopes = [x / t for x, t in zip(volumes, seconds, strict=True)]
    aa, ab, bb = (
        sum(p * q for p, q in zip(left, right, strict=True))
        for left, right in ((ones, ones), (ones, slopes), (slopes, slopes))
    )
    determinant = aa * bb - ab * ab
    a, b = 0.0, sum(slopes) / bb
    # Sizes that are equal up to rounding do not determine a line.
    if determinant > 1e-12 * aa * bb:
        free = (sum(ones) * bb - sum(slopes) * ab) / determinant
        if free > 0.0:
            a, b = free, (aa * sum(slopes) - ab * sum(ones)) / determinant
    deviations = [(a + b * x) / t - 1.0 for x, t in zip(volumes, seconds, strict=True)]
    return {
        "a_s": a,
        "b_s_per_nmd": b,
        "largest_deviation": max(abs(deviation) for deviation in deviations),
    }


def measure(workload: Workload, name: str, device: str, seconds: float) -> dict[str, object]:
    """Median time of ``seconds`` of steps, one at least, and peak memory above gradients."""
    reason = harness.misfit(workload, name, device)
    if reason is not None:
        return {"skipped": reason}
    session = start(workload, name, device)
    try:
        session.call("warm_up")
        first = session.call("first")
        # As in the rounds of the workloads, a long first step is a sample.
        times = [first["seconds"]] if first["seconds"] > seconds else []
        while sum(times) < seconds:
            times.append(session.call("step"))
    except ImplementationFailedError as error:
        return {"failed": str(error)}
    finally:
        session.close()
    return {
        "median_s": statistics.median(times),
        "samples": len(times),
        "above_gradients_mb": first["above_gradients_mb"],
    }


def run_curve(workloads: list[Workload], device: str, seconds: float, save) -> dict[str, object]:
    """Points in the order given; ``save`` is called with the curve after each."""
    primary = PRIMARY[device]
    curve: dict[str, object] = {"primary": primary, "points": []}
    points: list[dict] = curve["points"]
    for workload in workloads:
        point = {
            "rows": workload.rows,
            "columns": workload.columns,
            "size": workload.size,
            "roofline_s": workload.flops_on(device)
            / gemm_rate(SIZE, device, workload.dtype(device)),
            "implementations": {},
        }
        points.append(point)
        for name in (primary, "eager"):
            harness.say(f"scaling: {workload.name}: {name}")
            point["implementations"][name] = measure(workload, name, device, seconds)
        known = [p for p in points if "median_s" in p["implementations"][primary]]
        if len(known) > 2:
            times = [p["implementations"][primary]["median_s"] for p in known]
            curve["fit"] = fit([volume(p) for p in known], times)
        save(curve)
    return curve


def _table(curves: dict[str, dict]) -> str:
    lines = []
    for name, curve in curves.items():
        for point in curve["points"]:
            cells = [f"{name:6} N {point['rows']:>6} M {point['columns'] or point['rows']:>8}"]
            for implementation, row in point["implementations"].items():
                if "median_s" in row:
                    memory = row["above_gradients_mb"]
                    cells.append(f"{implementation} {row['median_s']:.4g} s, {memory:.0f} MB")
                else:
                    cells.append(f"{implementation} {row.get('skipped') or row['failed']}")
            lines.append("; ".join(cells))
        if "fit" in curve:
            a, b, deviation = curve["fit"].values()
            lines.append(f"{name:6} {a:.3g} s + {b:.3g} s N M D, off by {deviation:.0%} at most")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("curves", nargs="*", help=f"of {', '.join(CURVES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="per point, at least one step")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--out", type=Path, help="folder; bench/results, or scaling-cuda there")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.curves if name not in CURVES]
    if unknown:
        parser.error(f"unknown curve {', '.join(unknown)}; known: {', '.join(CURVES)}")
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: its measurements are meaningless")
    default = RESULTS if arguments.device == "cpu" else RESULTS / "scaling-cuda"
    folder = arguments.out or default
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "command": shlex.join(["python", "-m", "bench.scaling", *argv]),
        "machine": machine(arguments.device),
        "curves": {},
    }
    for name in arguments.curves or CURVES:
        workloads = CURVES[name]
        if arguments.quick:
            # Different sizes, which the fit needs.
            workloads = [w.shrunk(64 * (k + 1), 256 * (k + 1)) for k, w in enumerate(workloads)]

        def save(curve: dict, name: str = name) -> None:
            results["curves"][name] = curve
            (folder / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")

        curve = run_curve(workloads, arguments.device, arguments.seconds, save)
        plots.draw(name, curve, folder / f"scaling_{name}.png")
    print(_table(results["curves"]))


if __name__ == "__main__":
    main()
