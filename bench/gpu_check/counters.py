"""``python -m bench.gpu_check.counters``: hardware counters of the in-batch pair kernel.

Needs ``ncu`` and the permission to read counters; where one is missing, that is the result. The
clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .files import write_json

STEP, BACKEND, KERNEL = "pair-32k", "triton", r"regex:sum\w*_kernel"
#: Tiles on and off the diagonal are launches of their own.
SKIPPED, PROFILED = 4, 3
#: Time; data from the second-level cache to the multiprocessors, and the most it can be; its own
#: throughput; device memory; use of issue slots and of the tensor pipe; occupancy.
METRICS = (
    "gpu__time_duration.sum",
    "l1tex__m_xbar2l1tex_read_bytes.sum",
    "l1tex__m_xbar2l1tex_read_bytes.sum.per_second",
    "l1tex__m_xbar2l1tex_read_bytes.sum.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum.per_second",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum.per_second",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__cycles_elapsed.max",
    "launch__registers_per_thread",
    "launch__grid_size",
)
#: Where this ncu does not know one of the metrics: what its own sections contain.
SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "SchedulerStats"),
    *("LaunchStats", "Occupancy"),
)
#: Seconds of all runs of ncu.
LIMIT_S = 26.0


def command(*selection: str) -> list[str]:
    """One run of ncu over a step."""
    return [
        *("ncu", "--csv", "--print-units", "base", "--clock-control", "none"),
        *("--target-processes", "application-only", "--kernel-name", KERNEL),
        *("--launch-skip", str(SKIPPED), "--launch-count", str(PROFILED), *selection),
        *(sys.executable, "-m", f"{__package__}.steps", STEP, BACKEND),
    ]


def parse(text: str) -> list[dict[str, Any]]:
    """Metrics by launch, from ncu's CSV, which is preceded by what the program prints."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[first:]):
        if not row.get("Metric Name"):
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:80]})
        unit = f" [{row['Metric Unit']}]" if row.get("Metric Unit") else ""
        try:
            launch[row["Metric Name"] + unit] = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            launch[row["Metric Name"] + unit] = row["Metric Value"]
    return list(launches.values())


def measure() -> dict[str, Any]:
    """Counters, or why there are none."""
    if shutil.which("ncu") is None:
        return {"skipped": "ncu is not on the PATH"}
    deadline = time.monotonic() + LIMIT_S
    sections = [option for name in SECTIONS for option in ("--section", name)]
    for selection in (["--metrics", ",".join(METRICS)], sections):
        try:
            done = subprocess.run(
                command(*selection),
                capture_output=True,
                text=True,
                timeout=max(deadline - time.monotonic(), 1.0),
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"ncu took longer than {LIMIT_S:g} s"}
        launches = parse(done.stdout)
        if launches:
            return {"step": f"{STEP} {BACKEND}", "launches": launches}
        # Either stream may have the reason: not permitted, an unknown metric, no such kernel.
        text = done.stdout + done.stderr
        print(text[-4000:], flush=True)
        reasons = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        if any("ERR_NVGPUCTRPERM" in line for line in reasons):
            break
    return {"skipped": (reasons or [f"ncu ended with status {done.returncode}"])[0][:300]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.counters", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args(arguments).out
    report = measure()
    for launch in report.get("launches", [report]):
        print(launch, flush=True)
    if out is not None:
        write_json(out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
