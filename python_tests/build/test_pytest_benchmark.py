"""``pytest bench/ --benchmark-only``: what it records beside the times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT

from bench.workloads import WORKLOADS


@pytest.mark.extended
def test_memory_throughput_and_errors_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "--device=cpu"]
    # pytest-benchmark does not measure in a worker of xdist, which it finds by the environment.
    own = {name: text for name, text in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [*command, "-k", "small and (native or eager)", f"--benchmark-json={out}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=own | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        b["extra_info"]["implementation"]: b for b in json.loads(out.read_text())["benchmarks"]
    }
    assert found.keys() == {"native", "eager"}
    pairs = WORKLOADS["small"].rows ** 2
    for benchmark in found.values():
        info, median = benchmark["extra_info"], benchmark["stats"]["median"]
        assert benchmark["group"] == "small (cpu)"
        assert info["pairs_per_s"] == pytest.approx(pairs / median)
        assert info["tflops"] == pytest.approx(WORKLOADS["small"].flops / median / 1e12)
        assert 0.0 < info["roofline_fraction"] < 1.0
        assert info["peak_mb"] >= 0.0
        assert 0.0 < info["error"] == max(info["errors"].values()) < 1e-3
    assert "memory, throughput and accuracy" in done.stdout
