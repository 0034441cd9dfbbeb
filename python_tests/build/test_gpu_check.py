"""bench/gpu_check.sh: stages, limits, the budget, results; programs are stand-ins."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.helpers import ROOT, run_python

from bench.gpu_check import page, processes
from bench.gpu_check.stages import BUDGET, Options, stages

STAGES = {stage.name: stage for stage in stages(Options("python3", "/out"))}
DEFAULT = [name for name, stage in STAGES.items() if stage.by_default]
# In place of every program: prints its arguments, reports if REPORT is set, and fails or hangs
# where it should.
STAND_IN = """#!/usr/bin/env bash
echo "called $*"
while (($#)); do
  [[ $1 == --out && $2 == *.json ]] && echo '{"reported": 1}' >"$2"
  all+=" $1"
  shift
done
[[ -n ${FAIL:-} && "$all" =~ $FAIL ]] && exit 3
[[ -n ${HANG:-} && "$all" =~ $HANG ]] && exec sleep 30
exit 0
"""
PROGRAMS = ("python3", "nvidia-smi", "nvcc", "compute-sanitizer")


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def results(out: Path) -> dict:
    return json.loads((out / "gpu_check.json").read_text())


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which the programs that the stages run are stand-ins."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python3", "CUDA_HOME": "/none"}


def test_the_stages_are_in_order_and_fit_the_budget() -> None:
    order = ["env", "build", "compile", "cases", "host", "profile", "peers", "tests"]
    assert order == DEFAULT
    assert list(STAGES) == [*order, "bench", "sanitize"]
    assert sum(STAGES[name].limit for name in DEFAULT) <= BUDGET < 480
    # What does not run by default is a call of its own, of at most ten minutes.
    assert all(stage.limit <= 480 for stage in STAGES.values())
    names = [command.name for stage in STAGES.values() for command in stage.commands]
    assert len(set(names)) == len(names)
    assert {name for name in names if name in page.SECTIONS} == set(page.SECTIONS)


def test_a_dry_run_names_every_stage_with_its_limits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The script itself, which stands in the documentation.
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_check.sh"), "--dry-run", "--out", str(out), "pair-8k"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert re.findall(r"^== (\w+)", done.stdout, re.MULTILINE) == DEFAULT
    assert not out.exists()
    commands = re.findall(r"^ +(\d+) s  (\S+) +(.*)", done.stdout, re.MULTILINE)
    assert sum(int(limit) for limit, _, _ in commands) <= BUDGET
    peers = next(line for _, _, line in commands if "peers" in line)
    assert peers.endswith("--seconds 2 pair-8k")
    # Modules that are run exist.
    for name in re.findall(r"-m (bench[.\w]*)", done.stdout):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_everything_runs_and_leaves_few_files(programs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = check("--out", str(out), **programs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+) +ok", done.stdout, re.MULTILINE) == DEFAULT
    found = sorted(path.name for path in out.iterdir())
    logs = ["build.log", "checks.log", "environment.txt", "tests.log"]
    assert found == sorted([*logs, "gpu_check.json", "gpu_check.md"])
    stored = results(out)
    assert stored["finished"]
    assert [stage["name"] for stage in stored["stages"]] == DEFAULT
    for stage in DEFAULT:
        for command in STAGES[stage].commands:
            assert (stored.get(command.name) == {"reported": 1}) == command.reports
    assert "| tests | ok |" in (out / "gpu_check.md").read_text()
    # A second run does not append to the first.
    again = check("--out", str(out), "--only", "env", **programs)
    assert again.returncode == 0
    assert [s["name"] for s in results(out)["stages"]] == ["env"]
    assert "build.log" not in [path.name for path in out.iterdir()]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_alone(name: str, programs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = check("--out", str(out), "--only", name, "--wheels", str(tmp_path), **programs)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = results(out)
    assert [stage["name"] for stage in stored["stages"]] == [name]
    assert stored["budget_s"] == round(STAGES[name].limit)
    called = "".join(path.read_text() for path in out.iterdir() if path.suffix in (".log", ".txt"))
    assert called.count("called") == len(STAGES[name].commands)


@pytest.mark.parametrize(
    ("pattern", "stage", "status"),
    [
        ("^ --version", "env", 1),
        pytest.param(*("gpu_check.build", "build", 2), marks=pytest.mark.extended),
        ("compile_kernels", "compile", 2),
        pytest.param(*("small_cases", "cases", 4), marks=pytest.mark.extended),
        pytest.param(*("gpu_check.host", "host", 16), marks=pytest.mark.extended),
        ("gpu_profile|counters", "profile", 16),
        pytest.param(*("gpu_check.peers", "peers", 32), marks=pytest.mark.extended),
        ("device_tests|peers", "peers,tests", 36),
        ("racecheck", "sanitize", 8),
        pytest.param(*("-m bench ", "bench", 32), marks=pytest.mark.extended),
    ],
)
def test_the_exit_status_has_what_failed_and_the_rest_runs(
    programs: dict[str, str], tmp_path: Path, pattern: str, stage: str, status: int
) -> None:
    out, only = tmp_path / "out", []
    if stage in ("sanitize", "bench"):
        only = ["--only", stage]
    done = check("--out", str(out), *only, FAIL=pattern, **programs)
    assert done.returncode == status, done.stdout + done.stderr
    found = {one["name"]: one["verdict"] for one in results(out)["stages"]}
    assert list(found) == ([stage] if only else DEFAULT)
    assert {name for name in found if found[name] == "FAILED"} == set(stage.split(","))


def test_a_program_that_is_missing_is_a_failure(programs: dict[str, str], tmp_path: Path) -> None:
    Path(programs["PATH"].split(":")[0], "compute-sanitizer").unlink()
    out = tmp_path / "out"
    programs["PATH"] = programs["PATH"].split(":")[0] + ":/usr/bin:/bin"
    done = check("--out", str(out), "--only", "sanitize", **programs)
    assert done.returncode == 8
    assert "compute-sanitizer" in (out / "sanitize.log").read_text()


def test_what_hangs_is_ended_and_its_report_is_kept(
    programs: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--out", str(out), "--budget", "4", "--only", "env,host,peers")
    start = time.monotonic()
    done = check(*options, HANG="gpu_check.host", **programs)
    assert time.monotonic() - start < 20
    assert done.returncode == 16 + 32
    stored = results(out)
    verdicts = [stage["verdict"] for stage in stored["stages"]]
    assert verdicts == ["ok", "out of time", "out of time"]
    assert sum(stage["seconds"] for stage in stored["stages"]) < 6
    assert stored["host"] == {"reported": 1}
    assert "the budget is spent" in (out / "checks.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_found_survives_the_end_of_the_run(
    programs: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    marker = f"sleep {30 + number}.0625"
    script = Path(programs["PATH"].split(":")[0], "python3")
    script.write_text(STAND_IN.replace("sleep 30", marker))
    run = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu_check", "--out", str(out), "--only", "env,host"],
        cwd=ROOT,
        env={**os.environ, **programs, "HANG": "gpu_check.host"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (out / "gpu_check.json").exists() and "host" in results(out):
            break
        time.sleep(0.05)
    os.kill(run.pid, number)
    run.wait()
    stored = results(out)
    assert stored["host"] == {"reported": 1}
    assert not stored["finished"]
    assert [stage["verdict"] for stage in stored["stages"]] == ["ok", "running"]
    assert "Not finished" in (out / "gpu_check.md").read_text()
    # The program that was running has ended, too.
    while time.monotonic() < deadline and _running(marker):
        time.sleep(0.05)
    assert not _running(marker)


def _running(command: str) -> bool:
    words = command.replace(" ", "\0").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize(
    "options",
    [("--only", "tests,nothing"), ("--fast",), ("--out",), ("--budget", "x"), ("--wheels", "/no")],
)
def test_wrong_options_are_refused_before_anything_runs(options: tuple[str, ...]) -> None:
    done = check("--dry-run", *options)
    assert done.returncode == 64
    assert done.stdout == ""
    assert "usage:" in done.stderr


def test_a_limit_holds_for_a_program_that_ignores_an_interrupt() -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(30)"
    log = io.StringIO()
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere:
        nowhere_log = _Both(log, nowhere)
        status = processes.run([sys.executable, "-c", code], 1.5, nowhere_log)
    assert status == processes.TIMED_OUT
    assert 1.4 < time.monotonic() - start < 10
    assert "its limit of 2 s" in log.getvalue()


class _Both(io.StringIO):
    """A log that a program can write to."""

    def __init__(self, log: io.StringIO, file: io.TextIOBase) -> None:
        super().__init__()
        self._log, self._file = log, file

    def write(self, text: str) -> int:
        return self._log.write(text)

    def fileno(self) -> int:
        return self._file.fileno()


# Run as a module, without what takes seconds to import.
TASKS = """
import json, os, sys, time
from bench.gpu_check import pool

def work(how, value):
    if how == "raise":
        raise RuntimeError("an illegal memory access")
    if how == "die":
        os._exit(7)
    if how == "hang":
        time.sleep(30)
    return {"value": 2 * value, "process": os.getpid()}

if __name__ == "__main__":
    tasks = [("work", 1), ("raise", 0), ("die", 0), ("hang", 0), ("work", 2), ("work", 3)]
    found = []
    pool.PRELOADED = []
    pool.run(work, tasks, jobs=1, limit=3.0, report=lambda task, result: found.append(result))
    print(json.dumps(found))
"""


def test_a_worker_that_breaks_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    done = run_python("-m", "tasks", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
    first, raised, died, hung, *rest = json.loads(done.stdout)
    assert "illegal memory access" in raised["error"]
    assert "status 7" in died["error"]
    assert "longer than 3 s" in hung["error"]
    assert [one["value"] for one in (first, *rest)] == [2, 4, 6]
    # One process until it breaks.
    assert first["process"] != rest[0]["process"] == rest[1]["process"]
