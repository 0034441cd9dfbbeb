"""``python -m bench.gpu_check.device_tests``: the test files that need a device, side by side.

One pytest process per file, as many at once as ``--jobs``: no plugin of pytest is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from .files import write_json

ROOT = Path(__file__).resolve().parents[2]
TESTS = "python_tests"
#: Files whose tests a device runs or changes: those that no CPU can run first, then the longest.
FILES = (
    "kernels/test_cuda_graphs.py",
    "distributed/test_partial_fc.py",
    "kernels/test_triton_kernels.py",
    "kernels/test_triton_sum_tile.py",
    "kernels/test_triton_reductions.py",
    "kernels/test_triton_row_kernels.py",
    "kernels/test_triton_scaling.py",
    "kernels/test_filtered_matmul.py",
    "kernels/test_raw_columns.py",
    "kernels/test_parity.py",
    "kernels/test_autotune.py",
    "policy/test_policy_triton_losses.py",
    "policy/test_row_formulas.py",
    "policy/test_policy_modules.py",
    "policy/test_policy_triton.py",
    "policy/test_policy_two_passes.py",
    "policy/test_scalar_functions.py",
    "kernels/test_gradients.py",
    "kernels/test_transforms.py",
    "kernels/test_not_finite.py",
    "kernels/test_extremes.py",
    "kernels/test_operands.py",
    "kernels/test_filtering.py",
    "kernels/test_filtering_device.py",
    "kernels/test_checked.py",
    "kernels/test_errors.py",
    "kernels/test_logsumexp_pairs.py",
    "kernels/test_nearest.py",
    "kernels/test_memory.py",
    "kernels/test_modules.py",
    "kernels/test_state.py",
    "kernels/test_semantics.py",
    "kernels/test_reference_values.py",
    "kernels/test_published.py",
    "kernels/test_row_margins.py",
    "kernels/test_row_margins_published.py",
    "kernels/test_row_optimizers.py",
    "kernels/test_tolerances.py",
    "kernels/test_properties.py",
    "kernels/test_hybrids.py",
    "kernels/test_centers.py",
    "kernels/test_centers_of_losses.py",
    "kernels/test_mixing.py",
    "kernels/test_hard_negatives.py",
    "kernels/test_towers.py",
    "policy/test_policy_variables_triton.py",
    "kernels/test_adapters.py",
    "kernels/test_adapters_mining.py",
    "kernels/test_adapters_towers.py",
    "kernels/test_adapters_metric_learning.py",
    "kernels/test_adapters_supcon.py",
    "kernels/test_adapters_compiled.py",
    "metrics/test_histogram_kernel.py",
    "metrics/test_metrics.py",
    "metrics/test_metrics_thresholds.py",
    "distributed/test_sampling.py",
    "build/test_build.py",
    "build/test_bench_peers.py",
)
#: Parts of the names of files that are run whole: their tests do not have the device in theirs.
WHOLE = (
    "test_triton",
    "filtered_matmul",
    "raw_columns",
    "test_autotune",
    "test_build",
    "test_histogram_kernel",
    "peers",
)
#: Tests of the device in the other files.
EXPRESSION = " or ".join(("cuda", *WHOLE))
NO_TESTS = 5  # pytest's status
LISTED = 20
_COUNTS = re.compile(r"(\d+) (passed|failed|error|errors|skipped|deselected)")


def summary(text: str) -> dict[str, Any]:
    """Counts and the first failures of a run of pytest, from what it printed."""
    last = next((line for line in reversed(text.splitlines()) if _COUNTS.search(line)), "")
    counts = {name.removesuffix("s"): int(count) for count, name in _COUNTS.findall(last)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)", text, re.MULTILINE)
    return counts | ({"failures": [one[:200] for one in failures[:LISTED]]} if failures else {})


class _File:
    """pytest on one file."""

    def __init__(self, name: str, expression: str) -> None:
        self.name = name
        self.output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._start = time.monotonic()
        command = [sys.executable, "-m", "pytest", f"{TESTS}/{name}", "-q", "--tb=short", "-rfE"]
        command += [
            "-p",
            "no:cacheprovider",
            "--maxfail=50",
            *(["-k", expression] * bool(expression)),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            # The files share the cores.
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )

    def result(self) -> tuple[str, dict[str, Any]]:
        """Its output, and what came of it."""
        self.output.seek(0)
        text = self.output.read()
        seconds = round(time.monotonic() - self._start, 1)
        return text, {"status": self.process.returncode, "seconds": seconds, **summary(text)}


def run(files: tuple[str, ...], expression: str, jobs: int, report: Any) -> bool:
    """Whether all tests passed; calls ``report(results by file)`` after each file."""
    waiting, running = list(files), []
    found: dict[str, dict[str, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_File(waiting.pop(0), expression))
            time.sleep(0.05)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                text, found[one.name] = one.result()
                print(f"== {one.name}\n{text}", flush=True)
                report(found)
    except KeyboardInterrupt:
        # At the limit: what is running has been interrupted, too, and prints its summary.
        for one in running:
            try:
                one.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            text, found[one.name] = one.result()
            found[one.name]["interrupted"] = True
            print(f"== {one.name}\n{text}", flush=True)
        found |= {name: {"interrupted": True} for name in waiting}
        report(found)
        return False
    return all(one["status"] in (0, NO_TESTS) for one in found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.device_tests")
    parser.add_argument("files", nargs="*", default=FILES, help=f"below {TESTS}/")
    parser.add_argument("-k", dest="expression", default=EXPRESSION, help="of pytest")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 12))
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)

    def report(found: dict[str, Any]) -> None:
        if given.out is not None:
            write_json(given.out, found)

    return 0 if run(tuple(given.files), given.expression, given.jobs, report) else 1


if __name__ == "__main__":
    sys.exit(main())
