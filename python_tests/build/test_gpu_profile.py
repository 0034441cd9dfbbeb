"""The profile of bench/gpu_profile.py, as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.helpers import run_python

from bench import gpu_profile, heads
from bench.baselines import partial_fc
from bench.gpu_check import pool, rates, steps


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


@pytest.mark.parametrize("name", ["pair-8k", "class-1m-trained", steps.PARTIAL_FC.name])
def test_a_step_computes_every_gradient(name: str) -> None:
    one = steps.make(name, "native", "cpu", rows=32, columns=400)
    first, second = one.run(), one.run()
    assert one.flops > 0
    # A head's step returns nothing: its weights have moved.
    assert first is None or float(first.detach()) == pytest.approx(float(second.detach()))


def test_the_profile_reports_a_missing_device() -> None:
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
    """Everything but the device; what a device measures is simulated elsewhere."""
    shape = gpu_profile.SHAPES["pair-8k"]
    row = {
        "median_s": 0.25,
        "roofline_fraction": 0.5,
        "phases": gpu_profile.breakdown({"sum_kernel": 0.2}, shape, "native", 7e14, 3e12),
    }

    def run(function, tasks, jobs, limit, report) -> None:
        assert function is gpu_profile.measure
        for task in tasks:
            report(task, {"error": "RuntimeError: lost"} if task[1] == "triton" else row)

    monkeypatch.setattr(pool, "run", run)
    monkeypatch.setattr(rates, "ceilings", lambda: {"gemm_flops": 7e14, "copy_bytes": 3e12})
    for name, value in {
        "is_available": True,
        "get_device_name": "some GPU",
        "empty_cache": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    out = tmp_path / "below" / "profile.json"
    assert gpu_profile.main(["pair-8k", "--out", str(out)]) == 1
    results = json.loads(out.read_text())
    assert [step["backend"] for step in results["steps"]] == ["triton", "native"]
    assert "lost" in results["steps"][0]["error"]
    assert results["steps"][1] == {"shape": "pair-8k", "backend": "native", **row}
    assert "failed: RuntimeError: lost" in capsys.readouterr().out
    assert gpu_profile.main(["pair-8k", "--backends", "native"]) == 0


def test_heads_multiply_in_bfloat16_on_cuda_as_training_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not partial_fc.bfloat16_gemms("cpu")._enabled
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    found = partial_fc.bfloat16_gemms("cuda")
    assert (found._enabled, found.fast_dtype) == (True, torch.bfloat16)
    results = {"heads": {}, "machine": {"gpu": "some GPU"}}
    assert "bfloat16 autocast" in heads.page(results)
    assert "bfloat16" not in heads.page(results | {"machine": {}})
