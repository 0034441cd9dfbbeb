"""``python -m bench.gpu_check.peers``: other packages' kernels beside ours, without memory.

What ``python -m bench`` measures, without the implementations in ``SLOW``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .. import __main__ as bench
from ..implementations import implementations
from ..workloads import WORKLOADS
from .files import write_json

#: Implementations that are left out: they store the matrix, or take long to compile.
SLOW = ("eager", "torch.compile", "published", "sharded", "metric-learning")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.peers", description=__doc__)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--seconds", default="2", help="per workload, at least")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    report: dict[str, object] = {}
    status = 0
    for workload in given.workloads:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "peers"
            known = implementations(WORKLOADS[workload], "cuda")
            names = [name for name in known if name not in SLOW]
            options = ["--device", "cuda", "--seconds", given.seconds, "--no-memory"]
            bench.main([workload, *options, "--out", str(out), "--implementations", *names])
            found = json.loads(out.with_suffix(".json").read_text())
        report["machine"] = found["machine"]
        report[workload] = found["workloads"][workload]
        # A package that is missing is no failure; ours are.
        rows = found["workloads"][workload].get("implementations", {})
        ours = [rows.get(name, {}) for name in ("native", "triton")]
        status |= int(any("median_s" not in row for row in ours))
        if given.out is not None:
            write_json(given.out, report)
    return status


if __name__ == "__main__":
    sys.exit(main())
