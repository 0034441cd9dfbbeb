"""``python -m bench``: time and memory of every workload, to JSON and a Markdown table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import harness, report
from .workloads import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"
CONTESTANTS = ("native", "eager", "torch.compile", "published")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"default: all of {', '.join(WORKLOADS)}")
    parser.add_argument("--seconds", type=float, default=30.0, help="per workload, at least")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="path without suffix")
    arguments = parser.parse_args()
    unknown = set(arguments.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}")
    names = list(dict.fromkeys(["native", *arguments.contestants]))
    results = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "machine": harness.machine(),
        "workloads": {},
    }
    for name in arguments.workloads or WORKLOADS:
        workload = WORKLOADS[name]
        print(f"{name}: timing", file=sys.stderr, flush=True)
        result = harness.time_interleaved(workload, arguments.seconds, names)
        if not arguments.no_memory:
            for contestant in names:
                print(f"{name}: memory of {contestant}", file=sys.stderr, flush=True)
                result["contestants"][contestant] |= harness.peak_memory(workload, contestant)
        results["workloads"][name] = result
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    table = report.markdown(results)
    arguments.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
