"""The programs of bench/gpu_check.sh, on a simulated device without what a bare machine lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import ROOT

from bench.gpu_check import (
    alternatives,
    build,
    compile_kernels,
    counters,
    device_tests,
    host,
    page,
    pool,
    rates,
    steps,
)
from bench.gpu_check.reread import reread_kernel
from bench.gpu_check.stages import TESTS as TESTS_BIT
from bench.gpu_check.stages import Options, stages

SIMULATED = ROOT / "python_tests" / "support" / "simulated_device"
TESTS = ROOT / "python_tests"
NCU = """#!/usr/bin/env bash
echo '==PROF== Connected to process 1'
[[ "$*" == *--section* ]] || { echo '==ERROR== Failed to find metric x'; exit 1; }
echo '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","sum_kernel","Memory","lts__t_bytes.sum.per_second","byte/s","7,000"'
echo '"1","sum_kernel","Memory","lts__t_bytes.sum.per_second","byte/s","n/a"'
"""
SMI = """#!/usr/bin/env bash
echo '1980, 3201, 1980, 3201, 700.00, 580.0'
"""


def bare(*arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter as on the simulated machine."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("TRITON_")},
            "PYTHONPATH": f"{SIMULATED}:{ROOT}",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


#: They run once for all of these tests.
of_every_program = pytest.mark.extended


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tools of a CUDA machine, as stand-ins."""
    folder = tmp_path_factory.mktemp("tools")
    for name, text in {"ncu": NCU, "nvidia-smi": SMI, "nvcc": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA_HOME": "/none"}


@pytest.fixture(scope="module")
def reports(machine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What every program reports, by name; "status" has their exit statuses."""
    out = tmp_path_factory.mktemp("reports")
    done = bare(str(SIMULATED / "run_programs.py"), str(out), **machine)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in out.iterdir()}


@of_every_program
def test_every_program_succeeds_on_a_bare_machine(reports: dict[str, dict]) -> None:
    assert set(reports["status"].values()) == {0}, reports["status"]
    missing = reports["environment"]["packages"]
    assert missing["hypothesis"] is missing["pytest-xdist"] is None
    assert missing["torch"]
    assert reports["environment"]["device"]["multi_processor_count"] == 132
    assert reports["environment"]["clocks"]["clocks.sm"] == "1980"


@of_every_program
def test_kernels_of_steps_alternatives_and_cases_are_compiled(reports: dict[str, dict]) -> None:
    report = reports["compile_kernels"]
    assert report["done"] == report["tasks"] > 15
    assert report["failures"] == {}
    by_kernel: dict[str, list[str]] = {}
    for row in report["kernels"]:
        by_kernel.setdefault(row["kernel"], []).append(row["first_in"])
    assert len(by_kernel) > 8
    found = " ".join(where for places in by_kernel.values() for where in places)
    for kind in ("step pair-8k", "alternative pair-32k", "alternative class-1m", "cases fused_"):
        assert kind in found


@of_every_program
def test_the_small_cases_ran(reports: dict[str, dict]) -> None:
    assert reports["cases"]["ran"] == reports["cases"]["cases"] > 4
    assert reports["cases"]["failed"] == {}


@of_every_program
def test_host_and_device_are_compared_for_every_step(reports: dict[str, dict]) -> None:
    wanted = {f"{name} {backend}" for name in steps.NAMES for backend in ("triton", "native")}
    assert set(reports["host"]) == wanted
    for row in reports["host"].values():
        assert row["replay_s"] > 0
        assert row["host_bound"] == (row["launch_s"] > row["replay_s"])


def test_predictions_are_those_for_the_device_and_its_triton(tmp_path: Path) -> None:
    def row(triton: str, architecture: int, seconds: float) -> dict:
        step = {"step": "pair-8k", "triton": triton, "architecture": architecture}
        return {**step, "predicted_seconds": seconds}

    file = tmp_path / "gpu_model.json"
    assert host.predictions(file, 90, "3.6.0") == {}
    rows = [row("3.9.0", 90, 1.0), row("3.6.0", 90, 2.0), row("3.9.0", 80, 3.0)]
    file.write_text(json.dumps({"steps": rows}))
    assert host.predictions(file, 90, "3.6.0") == {"pair-8k": 2.0}
    assert host.predictions(file, 90, "3.9.0") == {"pair-8k": 1.0}
    assert host.predictions(file, 80, "3.6.0") == {"pair-8k": 3.0}
    assert host.predictions(file, 120, "3.6.0") == {}


@of_every_program
def test_rates_are_of_the_shapes_that_losses_use(reports: dict[str, dict]) -> None:
    report = reports["rates"]
    assert report["clock_mhz"] == 1980
    shapes = {(g["m"], g["n"], g["k"]) for g in report["gemms"].values()}
    assert {(4096, 512, 4096), (8192, 512, 8192), (1024, 512, 16384)} <= shapes
    assert all(g["warm"] > 0 and g["cold"] > 0 for g in report["gemms"].values())
    for name, value in report["l2_bytes"].items():
        clocked = value / 132 / 1980e6
        assert report["l2_bytes_per_clock"][name] == pytest.approx(clocked)


@of_every_program
def test_steps_are_profiled_against_alternatives_and_peers(reports: dict[str, dict]) -> None:
    profiled = {(row["shape"], row["backend"]) for row in reports["profile"]["steps"]}
    assert profiled == {
        (name, backend)
        for name in ("pair-32k", "class-1m", "partial-fc-1m")
        for backend in ("triton", "native")
    }
    for rows in reports["alternatives"].values():
        assert {"shipped", "shipped, again"} <= set(rows)
        assert any("waves" in name for name in rows)
        assert len(rows) >= 6
        assert not any(row["wrong"] for row in rows.values())
    rows = reports["peers"]["class-1m"]["implementations"]
    assert rows["triton"]["median_s"] > 0
    assert "No module" in rows["liger-kernel"]["failed"]


@of_every_program
def test_counters_fall_back_on_the_sections_of_ncu(reports: dict[str, dict]) -> None:
    first, second = reports["counters"]["launches"]
    assert first["lts__t_bytes.sum.per_second [byte/s]"] == 7000.0
    assert second["lts__t_bytes.sum.per_second [byte/s]"] == "n/a"


@of_every_program
def test_the_page_shows_every_report(reports: dict[str, dict]) -> None:
    found = {key: value for key, value in reports.items() if key != "status"}
    stage = {"name": "env", "verdict": "ok", "seconds": 1.0, "limit": 2.0}
    text = page.page({"command": "x", "finished": True, "stages": [stage], **found})
    assert "Not complete" not in text
    for key in found:
        assert f"## {page.SECTIONS[key][0]}\n" in text
    # A report that has only begun is no error.
    for key in page.SECTIONS:
        assert "## " in page.page({"command": "x", "finished": False, "stages": [], key: {}})


@pytest.mark.extended
def test_the_default_run_on_a_bare_machine(machine: dict[str, str], tmp_path: Path) -> None:
    """The whole command, with processes as they are; installers and pytest are stand-ins."""
    out = tmp_path / "out"
    environment = machine | {"UNITSFACE_SIMULATED": "none", "PYTHON": sys.executable}
    script = str(SIMULATED / "run_default.py")
    done = bare(script, "--out", str(out), timeout=900, **environment)
    stored = json.loads((out / "gpu_check.json").read_text())
    assert stored["finished"], done.stderr
    # Every test file fails with pytest's stand-in.
    assert done.returncode == TESTS_BIT, (out / "checks.log").read_text()[-4000:]
    verdicts = {stage["name"]: stage["verdict"] for stage in stored["stages"]}
    names = [stage.name for stage in stages(Options("", "")) if stage.by_default]
    assert verdicts == dict.fromkeys(names, "ok") | {"tests": "FAILED"}
    assert "-e . 90" in (out / "build.log").read_text()
    assert set(stored["device_tests"]) == set(device_tests.FILES)
    assert stored["cases"]["ran"] == stored["cases"]["cases"] > 60
    assert len(list(out.iterdir())) <= 8


@pytest.mark.extended
def test_a_step_is_compiled_for_the_device(tmp_path: Path) -> None:
    """By the real compiler: arguments and launches are those of a device that is not there."""
    code = "from bench.gpu_check import compile_kernels as c, files; from pathlib import Path; "
    out = tmp_path / "found.json"
    code += f"files.write_json(Path({str(out)!r}), c.work('step', 'pair-8k', ''))"
    cache = str(tmp_path / "cache")
    done = bare("-c", code, UNITSFACE_SIMULATED="triton", TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert "error" not in found
    rows = list(found["kernels"].values())
    assert {"sum_total_kernel", "normalize_rows_kernel"} <= {row["kernel"] for row in rows}
    assert all(row["registers"] > 0 and row["seconds"] > 0 for row in rows)
    assert all(row["stack"] == row["local"] == 0 for row in rows)


# The build


@pytest.mark.parametrize(
    ("failing", "tried", "status"),
    [
        ((), [("install", "ON")], 0),
        (("pip",), [("install", "ON"), ("in place", "ON")], 0),
        (("pip", "ON"), [("install", "ON"), ("in place", "ON"), ("CPU", "OFF")], 1),
    ],
)
def test_the_build_falls_back_and_reports_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    failing: tuple[str, ...],
    tried: list[tuple[str, str]],
    status: int,
) -> None:
    calls = []

    def run(command: list[str], env: dict[str, str] | None = None, **options: object):
        cuda = (env or {}).get("UNITSFACE_CUDA", "")
        fails = any(word in (*command, cuda) for word in failing)
        if env is not None:
            calls.append(cuda)
            assert env["UNITSFACE_CUDA_ARCHS"] == "90"
        return subprocess.CompletedProcess(command, int(fails), "90\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "build.json"
    assert build.main(["--out", str(out)]) == status
    report = json.loads(out.read_text())
    names = [attempt["name"] for attempt in report["attempts"]]
    assert list(zip(names, calls, strict=True)) == tried
    assert report["architecture"] == "90"


# The tests of the device


#: Imports or phrases of the tests that use a device.
_SHARED = r"\b(TARGETS|FUSED|DEVICES|each_target|each_device|for_all|calls)\b"
DEVICE = re.compile(
    rf"^from support\.\w+ import ([^\n]*|\([^)]*){_SHARED}"
    r"|^from support\.triton_tiles import"
    r"|not torch\.cuda\.is_available\(\)|\"cuda\" if torch\.cuda\.is_available\(\)",
    re.MULTILINE,
)


def test_every_file_with_tests_of_a_device_is_listed() -> None:
    found = set()
    for path in TESTS.rglob("test_*.py"):
        name = path.relative_to(TESTS).as_posix()
        if DEVICE.search(path.read_text()):
            found.add(name)
    # All but the tests that take minutes or gigabytes, which pytest leaves out.
    assert found - {"kernels/test_limits.py"} == set(device_tests.FILES)
    assert len(set(device_tests.FILES)) == len(device_tests.FILES)
    for part in device_tests.WHOLE:
        assert any(part in name for name in device_tests.FILES), part


@pytest.mark.extended
def test_listed_files_are_collected_on_a_bare_machine() -> None:
    """Neither they nor what they import need hypothesis, xdist or a package of training."""
    files = [f"python_tests/{name}" for name in device_tests.FILES]
    options = ["--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
    done = bare("-m", "pytest", *options, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    collected = set(re.findall(r"^(python_tests/\S+\.py)(?:::|: )", done.stdout, re.MULTILINE))
    # One needs hypothesis for all that it does.
    assert set(files) - collected <= {"python_tests/kernels/test_properties.py"}


def test_a_file_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_cuda():\n    assert False\ndef test_other(): ...")
    (tmp_path / "test_b.py").write_text("def test_cuda(): ...")
    (tmp_path / "test_c.py").write_text("def test_other(): ...")
    out = tmp_path / "tests.json"
    files = [os.path.relpath(path, TESTS) for path in sorted(tmp_path.glob("test_*.py"))]
    done = bare("-m", "bench.gpu_check.device_tests", *files, "--out", str(out), "--jobs", "2")
    assert done.returncode == 1, done.stderr
    first, second, third = (json.loads(out.read_text())[name] for name in files)
    assert (first["failed"], first["deselected"]) == (1, 1)
    assert "test_cuda" in first["failures"][0]
    assert (second["status"], second["passed"]) == (0, 1)
    # No test of the device is no failure.
    assert third["status"] == device_tests.NO_TESTS


# Kernels and choices


def test_the_rereading_kernel_adds_up_what_it_loads() -> None:
    """In the interpreter: a wrong address would be a wrong sum."""
    blocks, turns, programs, size = 5, 7, 3, 64
    source = torch.randn(blocks * size)
    out = torch.empty(programs)
    reread_kernel[(programs,)](source, out, blocks, turns, BLOCK=size, num_warps=4)
    parts = source.view(blocks, size).sum(dim=1)
    for program in range(programs):
        places = [(program * 7 + turn) % blocks for turn in range(turns)]
        assert float(out[program]) == pytest.approx(float(parts[places].sum()), abs=1e-4)


def test_alternatives_change_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    base = alternatives.configs.select(90, torch.bfloat16, False)
    workspace, key = alternatives.workspace, (torch.device("cuda", 0), torch.bfloat16, False)
    monkeypatch.setattr(workspace, "device_config", lambda *key: base)
    for step in alternatives.KINDS:
        found = alternatives.changes(step, base)
        configs = [change(base) for change in found.values()]
        assert configs[0] == base
        assert len(set(configs)) == len(configs)
        assert all(config != base for config in configs[1:])
        assert list(found) == alternatives.names(step, 90)
        with alternatives.selected(alternatives.change_of(step, list(found)[1])):
            assert workspace.device_config(*key) == configs[1]
        assert workspace.device_config(*key) == base


def test_ncu_runs_one_step_and_leaves_the_clocks() -> None:
    command = counters.command("--metrics", "a,b")
    assert command[:5] == ["ncu", "--csv", "--print-units", "base", "--clock-control"]
    assert command[5] == "none"
    assert command[-3:] == ["bench.gpu_check.steps", counters.STEP, counters.BACKEND]
    assert counters.parse("==PROF== nothing\n") == []
    assert rates.GEMMS["large"].flops == 2.0 * 8192**3


def test_a_refused_launch_is_no_lost_device() -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    error = ValueError("out of resource: shared memory")
    assert pool.refusal(error, lambda: None) == {"refused": f"ValueError: {error}"}
    with pytest.raises(ValueError, match="out of resource"):
        pool.refusal(error, lost)


def test_a_kernel_that_does_not_compile_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: object, *arguments: object, **options: object) -> None:
        raise RuntimeError("ptxas failed")

    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="some_kernel"))
    monkeypatch.setattr(compile_kernels, "compile_kernel", refuse)
    found: dict[str, dict] = {}
    with compile_kernels.compiling(found):
        with pytest.raises(RuntimeError, match="ptxas"):
            compile_kernels.launch.run(kernel, 1)
        # No programs, no kernel.
        assert compile_kernels.launch.run(kernel, 0) is None
    assert list(found.values()) == [
        {"kernel": "some_kernel", "error": "RuntimeError: ptxas failed"},
    ]
