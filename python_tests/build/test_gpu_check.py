"""The logic of bench/gpu_check.sh and of what it runs, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from support.helpers import ROOT, run_python

import unitsface_kernels
from bench import gpu_profile, gpu_small_cases
from unitsface_kernels.losses import REGISTRY

STAGES = ("env", "build", "tests", "sanitize", "profile", "bench")
# In place of every program: says what it was called with, and fails or hangs where it should.
STAND_IN = """#!/usr/bin/env bash
echo "called $*"
[[ -n ${FAIL:-} && "$*" =~ $FAIL ]] && exit 3
[[ -n ${HANG:-} && "$*" =~ $HANG ]] && exec sleep 30
exit 0
"""


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_check.sh"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which the programs that the script runs are stand-ins."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("python3", "nvidia-smi", "nvcc", "compute-sanitizer"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python3", "CUDA_HOME": "/none"}


def test_a_dry_run_names_every_stage_with_its_limit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = check("--dry-run", "--out", str(out), "pair-8k")
    assert done.returncode == 0, done.stderr
    assert tuple(re.findall(r"^== (\w+)", done.stdout, re.MULTILINE)) == STAGES
    assert not out.exists()
    commands = re.findall(r"^ +(\d+) s  (\S+) +(.*)", done.stdout, re.MULTILINE)
    assert len(commands) >= 8
    assert all(0 < int(limit) <= 530 for limit, _, _ in commands)
    # At most eight files: logs, and what the last two stages write beside theirs.
    assert len({log for _, log, _ in commands}) <= 5
    last = commands[-1][2]
    assert "-m bench --device cuda --seconds 2" in last
    assert last.endswith(" pair-8k")
    # Modules that are run exist.
    for module in re.findall(r"-m (bench\.\w+)", done.stdout):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def test_everything_runs_and_leaves_few_files(programs: dict[str, str], tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl"):
        (wheels / name).touch()
    out = tmp_path / "out"
    done = check("--out", str(out), "--wheels", str(wheels), FAIL="a-1-py3", **programs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+) +ok", done.stdout, re.MULTILINE) == list(STAGES)
    assert len(list(out.iterdir())) <= 5
    build = (out / "build.log").read_text()
    assert "not installed" in build  # the first wheel; the second came all the same
    assert "b-1-py3-none-any.whl" in build
    assert "--no-build-isolation --no-deps -e ." in build
    sanitize = (out / "sanitize.log").read_text()
    assert "--tool memcheck" in sanitize
    assert "--tool racecheck" in sanitize
    # A second run does not append to the first.
    again = check("--out", str(out), "--only", "env", **programs)
    assert again.returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["environment.txt"]


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        ("^--version", 1),
        ("unitsface_kernels$", 2),
        ("-m pytest", 4),
        ("memcheck", 8),
        ("gpu_profile", 16),
        ("device cuda", 32),
        ("racecheck|-m pytest", 12),
    ],
)
def test_the_exit_status_says_what_failed_and_the_rest_runs(
    programs: dict[str, str], tmp_path: Path, pattern: str, status: int
) -> None:
    done = check("--out", str(tmp_path / "out"), FAIL=pattern, **programs)
    assert done.returncode == status, done.stdout + done.stderr
    assert len(re.findall(r"^\w+ +(?:ok|FAILED) +\d+ s$", done.stdout, re.MULTILINE)) == 6


def test_what_hangs_is_ended_and_the_budget_holds(programs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--out", str(out), "--budget", "2", "--only", "env,profile,bench")
    done = check(*options, HANG="gpu_profile", **programs)
    assert done.returncode == 16 + 32
    assert re.search(r"^profile +out of time", done.stdout, re.MULTILINE)
    assert "the budget is spent" in (out / "bench.log").read_text()


def test_a_missing_sanitizer_is_said(programs: dict[str, str], tmp_path: Path) -> None:
    Path(programs["PATH"].split(":")[0], "compute-sanitizer").unlink()
    out = tmp_path / "out"
    done = check("--out", str(out), "--only", "sanitize", **programs)
    assert done.returncode == 8
    assert "compute-sanitizer is not" in (out / "sanitize.log").read_text()


@pytest.mark.parametrize(
    "options",
    [("--only", "tests,nothing"), ("--fast",), ("--out",), ("--budget", "x"), ("--wheels", "/no")],
)
def test_wrong_options_are_refused_before_anything_runs(options: tuple[str, ...]) -> None:
    done = check("--dry-run", *options)
    assert done.returncode == 64
    assert done.stdout == ""
    assert "usage:" in done.stderr


# The small cases


def test_small_cases_cover_every_loss_and_kind_of_columns() -> None:
    found = list(gpu_small_cases.cases())
    assert {case.function for case in found} == {spec.function for spec in REGISTRY.values()}
    assert {case.columns for case in found} == {"batch", "memory", "classes", "subset"}
    each = {case.function for case in found if case.threshold == "each"}
    wanted = {spec.function for spec in REGISTRY.values() if spec.threshold == "per_column"}
    assert each == wanted
    assert len(set(found)) == len(found)


def test_small_cases_pass_on_a_backend_that_is_right(capsys: pytest.CaptureFixture) -> None:
    options = ["--device", "cpu", "--backends", "native", "--dtypes", "float32"]
    try:
        assert gpu_small_cases.main([*options, "--match", "mean"]) == 0
        assert gpu_small_cases.main([*options, "--match", "histogram"]) == 0
        assert gpu_small_cases.main([*options, "--match", "rows"]) == 0
        # Nothing to run is no success.
        assert gpu_small_cases.main([*options, "--match", "no such case"]) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient", "error"])
def test_small_cases_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    right = unitsface_kernels.fused_uss_loss

    def wrong(feats, labels, b, *, backend: str, **options):
        if backend == "reference":
            return right(feats, labels, b, backend=backend, **options)
        if what == "error":
            raise RuntimeError("launch failed")
        if what == "gradient":
            feats = feats + torch.zeros_like(feats)
            feats.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([138]), 0.0))
        loss = right(feats, labels, b, backend=backend, **options)
        return loss * 1.001 if what == "loss" else loss

    monkeypatch.setitem(gpu_small_cases.FUNCTIONS, "fused_uss_loss", wrong)
    # signature() follows it to the parameters of the original.
    monkeypatch.setattr(wrong, "__wrapped__", right, raising=False)
    case = gpu_small_cases.SmallCase("fused_uss_loss", "batch", "one", "mean")
    if what == "error":
        with pytest.raises(RuntimeError):
            gpu_small_cases.check(case, torch.float32, "native", "cpu")
        return
    found = gpu_small_cases.check(case, torch.float32, "native", "cpu")
    assert found is not None
    assert ("loss" in found) == (what == "loss")


# The profile


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("name", gpu_profile.SHAPES)
def test_kernels_are_counted_in_their_phases(name: str, backend: str) -> None:
    shape = gpu_profile.SHAPES[name]
    kernel = "sum_kernel" if not shape.columns else "statistics_kernel"
    tile = "void unitsface::cuda::sum_tile_kernel<unitsface::Uss, false, true>(unitsface::X)"
    if shape.columns:
        tile = "void unitsface::cuda::logsumexp_tile_kernel<unitsface::P>(unitsface::X, float*)"
    other = "void at::native::reduce_kernel<512, 1, at::native::sum_functor<float> >(float)"
    times = {
        kernel if backend == "triton" else tile: 4e-3,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN": 5e-3,
        "normalize_rows_kernel"
        if backend == "triton"
        else "unitsface::cuda::normalize_rows_kernel": 1e-3,
        other: 2e-3,
        "Memset (Device)": 1e-3,
    }
    rows = gpu_profile.breakdown(times, shape, backend, gemm_flops=7e14, copy_bytes=3e12)
    by_name = {row["phase"]: row for row in rows}
    assert len(rows) == 4
    assert sum(row["seconds"] for row in rows) == pytest.approx(13e-3)
    assert sum(row["fraction"] for row in rows) == pytest.approx(1.0)
    assert by_name["everything else"]["seconds"] == pytest.approx(3e-3)
    assert other[:100] in by_name["everything else"]["largest"]
    gemms = next(row for name, row in by_name.items() if "GEMMs" in name)
    assert gemms["of_gemm"] == pytest.approx(gemms["tflops"] * 1e12 / 7e14)


def test_operations_of_a_step_are_those_of_its_phases() -> None:
    for shape in gpu_profile.SHAPES.values():
        pair = 2.0 * shape.rows * (shape.columns or shape.rows) * shape.size
        assert shape.flops == pair * (4.0 if shape.columns else 1.5)
        flops = {p.name: p.flops for p in gpu_profile.phases(shape, "triton")}
        others = ("sum",) if shape.columns else ("statistics", "gradients")
        of_step = [flops[name] for name in flops if not name.startswith(others)]
        assert sum(of_step) == shape.flops
        native = sum(p.flops for p in gpu_profile.phases(shape, "native"))
        assert native == shape.flops


def test_the_inputs_of_a_shape_are_a_step() -> None:
    for small in (gpu_profile.Shape("a", 32, 0, 16), gpu_profile.Shape("b", 32, 40, 16)):
        function, inputs = small.inputs("cpu")
        function(**inputs, backend="native").backward()
        assert all(t.grad is not None for t in inputs.values() if t.requires_grad)


def test_without_a_device_the_profile_says_so() -> None:
    done = run_python("-m", "bench.gpu_profile", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr


def test_the_table_has_every_phase() -> None:
    shape = gpu_profile.SHAPES["class-1m"]
    times = {"statistics_kernel": 1e-3, "normalize_rows_kernel": 1e-3, "other": 1e-3}
    row = {
        "shape": shape.name,
        "backend": "triton",
        "median_s": 1e-2,
        "roofline_fraction": 0.5,
        "phases": gpu_profile.breakdown(times, shape, "triton", 7e14, 3e12),
    }
    failed = {"shape": "x", "backend": "native", "error": "OutOfMemoryError: too large"}
    text = gpu_profile.table([row, failed])
    assert "50.0 % of the roofline" in text
    assert "% of GEMM" in text
    assert "% of copy" in text
    assert "failed: OutOfMemoryError" in text


def test_the_profile_goes_on_after_a_failure_and_writes_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Everything but the device: small shapes on the CPU, with times that are given."""
    shapes = {"pair-8k": gpu_profile.Shape("pair-8k", 32, 0, 16)}
    inputs = gpu_profile.Shape.inputs
    monkeypatch.setattr(gpu_profile, "SHAPES", shapes)
    monkeypatch.setattr(gpu_profile.Shape, "inputs", lambda self, device: inputs(self, "cpu"))
    monkeypatch.setattr(gpu_profile, "_seconds", lambda run: [run() or 0.25] * 5)
    monkeypatch.setattr(gpu_profile, "kernel_seconds", lambda step: step() or {"sum_kernel": 0.2})
    monkeypatch.setattr(gpu_profile, "ceilings", lambda: {"gemm_flops": 7e14, "copy_bytes": 3e12})
    for name, value in {
        "is_available": True,
        "get_device_name": "some GPU",
        "memory_allocated": 100,
        "max_memory_allocated": 350,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    out = tmp_path / "below" / "profile.json"
    # No such backend: a failure of the first, not of the second.
    status = gpu_profile.main(["--backends", "absent", "native", "--out", str(out)])
    assert status == 1
    results = json.loads(out.read_text())
    failed, row = results["steps"]
    assert "absent" in failed["error"]
    assert row["median_s"] == 0.25
    assert row["peak_bytes_above_inputs_and_gradients"] == 250
    assert row["roofline_s"] == pytest.approx(shapes["pair-8k"].flops / 7e14)
    assert "failed" in capsys.readouterr().out
    assert gpu_profile.main(["--backends", "native"]) == 0
