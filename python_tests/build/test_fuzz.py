"""The fuzzer finds what it is for; a short run of every target."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from fuzz import runner
from support.helpers import ROOT

from unitsface_kernels.backends.native.cpu_engine import CpuEngine


def _planted(seed: int) -> str | None:
    if seed == 3:
        raise KeyError("planted")
    if seed == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 7:
        bytearray(2 << 30)
    return "planted text" if seed == 11 else None


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_failure_is_found_with_its_seed(jobs: int) -> None:
    outcome = runner.run(_planted, 0, runs=450, jobs=jobs)
    found = {failure.seed: failure.text for failure in outcome.failures}
    assert outcome.runs == 450
    assert sorted(found) == [3, 5, 7, 11]
    assert found[3].startswith("KeyError: 'planted' (test_fuzz.py:")
    assert found[5] == "the process was ended by SIGSEGV"
    assert found[7].startswith("MemoryError")
    assert found[11] == "planted text"


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CALL_SECONDS", 1)
    monkeypatch.setattr(runner, "CALL_WALL_SECONDS", 2.0)

    def hang(seed: int) -> None:
        while seed == 0:
            pass
        if seed == 1:
            time.sleep(30)

    outcome = runner.run(hang, 0, runs=3)
    assert outcome.runs == 3
    assert [failure.seed for failure in outcome.failures] == [0, 1]


@pytest.mark.parametrize("fault", ["cosine", "column", "gradient"])
def test_planted_errors_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 20 in a cosine of a row, a column that is left out, a gradient without projection."""
    from fuzz import target_differential

    normalize_rows, backward = CpuEngine.normalize_rows, CpuEngine.normalize_rows_backward

    def planted(self, source, start, stop, index=None, reuse=False):
        unit, norms = normalize_rows(self, source, start, stop, index, reuse)
        if len(unit) and fault == "cosine":
            unit[-1] *= 0.95
        if reuse and len(unit) and fault == "column":
            unit[-1] = 0.0
        return unit, norms

    def bare(self, d_unit, source, start, inverse_norms, out, scale=None, index=None, raw=False):
        if fault != "gradient":
            return backward(self, d_unit, source, start, inverse_norms, out, scale, index)
        return out.copy_(d_unit * inverse_norms[:, None] * (1.0 if scale is None else scale))

    monkeypatch.setattr(CpuEngine, "normalize_rows", planted)
    monkeypatch.setattr(CpuEngine, "normalize_rows_backward", bare)
    monkeypatch.setattr(target_differential.torch, "set_num_threads", lambda count: None)
    found = [target_differential.run_one(seed) for seed in range(25)]
    assert sum(text is not None for text in found) >= 3, found


def test_a_short_run_of_every_target() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.fuzz", "--runs", "25", "--seed", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
