"""The benchmark suite on tiny shapes: implementations do the same work, reports are complete."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.helpers import ROOT
from support.ranks import forkserver

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import accuracy, crossover, harness, inputs, isolation, plots, report, scaling
from bench.__main__ import main
from bench.baselines.eager import uss_eager
from bench.implementations import EAGER, NAMES, PUBLISHED, Implementation, implementations
from bench.inputs import make_inputs
from bench.report import TIMES
from bench.session import DeviceLostError, ImplementationFailedError, Local, Remote, Session
from bench.targets import TARGETS, Target
from bench.workloads import FUSED, WORKLOADS, Workload, step

CPU = [name for name, workload in WORKLOADS.items() if "cpu" in workload.on]
# Without the compiler, which compiles the code of "eager" and takes seconds.
PAIRS_OF_NAMES = [
    (workload, name)
    for workload in CPU
    for name in implementations(WORKLOADS[workload])
    if name != "torch.compile"
]


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Implementations come from the server of all tests, which would otherwise be theirs alone."""
    forkserver()


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "implementation"), PAIRS_OF_NAMES)
def test_implementations_agree_with_float64(name: str, implementation: str) -> None:
    workload = WORKLOADS[name].shrunk(48, 160)
    try:
        found = accuracy.errors(workload, implementations(workload)[implementation], "cpu")
    except ImportError as error:  # a package that is not installed, or of an earlier version
        pytest.skip(str(error))
    assert found.keys() >= {"loss", "feats"}


@pytest.mark.parametrize("name", ["small", "memory-casia", "class-casia", "uce-100k"])
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_other_work_does_not_pass_the_check(name: str, part: str) -> None:
    workload = WORKLOADS[name].shrunk(16, 40)
    eager = implementations(workload)["eager"]

    def changed(**tensors: torch.Tensor) -> torch.Tensor:
        value = eager(**tensors)
        return 1.001 * value if part == "loss" else value + 0.01 * (value - value.detach())

    with pytest.raises(ArithmeticError, match="off by"):
        accuracy.errors(workload, Implementation(changed, eager.formula), "cpu")


def test_a_gradient_that_is_missing_does_not_pass_the_check() -> None:
    workload = WORKLOADS["class-casia"].shrunk(16, 40)
    eager = implementations(workload)["eager"]

    def detached(feats, weight, labels):
        return eager(feats=feats, weight=weight.detach(), labels=labels)

    with pytest.raises(ArithmeticError, match="weight"):
        accuracy.errors(workload, Implementation(detached, eager.formula), "cpu")


@pytest.mark.parametrize("loss", FUSED)
def test_formulas_of_implementations_are_those_of_the_package(loss: str) -> None:
    """float64: the reference backend, whose formulas are tied to published values."""
    columns = 0 if loss == "uss" else 40
    workload = Workload("", loss, 24, columns, 512, 1.0)
    towers = workload.topology == "towers"
    if towers:
        workload = replace(workload, columns=24)
    tensors = {
        name: t.detach().double() if t.is_floating_point() else t
        for name, t in make_inputs(workload).items()
    }
    want = workload.fused("reference")(**tensors)
    options = {} if towers else {"scale": 64.0, "margin": workload.margin}
    torch.testing.assert_close(EAGER[loss](**tensors, **options), want, rtol=1e-6, atol=0.0)
    # The published code computes its logits in float32.
    published = PUBLISHED[loss](**tensors, **options).double()
    torch.testing.assert_close(published, want, rtol=1e-4, atol=0.0)


def test_trained_inputs_are_as_described() -> None:
    workload = replace(WORKLOADS["pair-1k"].shrunk(256, 0), target_cosine=0.7)
    tensors = make_inputs(workload)
    cosines, positive = inputs.sample_cosines(workload, tensors)
    pairs = positive & ~cosines.isnan()
    assert float(cosines[pairs].mean()) == pytest.approx(0.7, abs=0.05)
    assert abs(float(cosines[~positive].mean())) < 0.02
    # On all rows, though found on a sample: the terms of the derivative by b cancel.
    value = step(lambda **t: uss_eager(**t, scale=64.0, margin=0.1), tensors)
    assert abs(float(tensors["b"].grad)) < 0.3 * float(value.detach())
    fresh = make_inputs(replace(workload, target_cosine=None))
    step(lambda **t: uss_eager(**t, scale=64.0, margin=0.1), fresh)
    assert abs(float(fresh["b"].grad)) > 0.3


def test_probability_of_the_negatives_in_the_softmax() -> None:
    workload = replace(WORKLOADS["class-casia"].shrunk(24, 40), target_cosine=0.7)
    tensors = make_inputs(workload)
    unit = torch.nn.functional.normalize(tensors["feats"].detach(), dim=1)
    columns = torch.nn.functional.normalize(tensors["weight"].detach(), dim=1)
    logits = 64.0 * unit @ columns.T
    rows = torch.arange(24)
    logits[rows, tensors["labels"]] -= 64.0 * workload.margin
    probability = 1.0 - logits.softmax(dim=1)[rows, tensors["labels"]]
    want = float(probability.mean())
    assert inputs.negative_prob(workload, tensors) == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_a_run_records_times_memory_errors_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One workload end to end, in processes of their own; a baseline that cannot run is data."""
    monkeypatch.setattr(harness, "copy_rate", lambda device: 1e10)
    arguments = ["small", "--quick", "--seconds", "0.01", "--implementations", "eager"]
    main([*arguments, "--out", str(tmp_path / "v1.0")])
    results = json.loads((tmp_path / "v1.0.json").read_text())
    assert results["command"].startswith("python -m bench small")
    rows = results["workloads"]["small"]["implementations"]
    assert rows.keys() == {"native", "eager"}
    for row in rows.values():
        assert row["median_s"] > 0.0
        assert row["samples"] >= 1
        assert {"loss", "feats", "b"} <= row["errors"].keys()
        assert "above_gradients_mb" in row
    assert rows["eager"]["speedup"] > 0.0
    assert rows["native"]["roofline_fraction"] > 0.0
    assert "small: uss, N = 64" in (tmp_path / "v1.0.md").read_text()
    # A later run adds to the file and records what it was; elsewhere it must not.
    arguments = ["memory-casia", "--quick", "--seconds", "0.01", "--implementations", "native"]
    arguments += ["--update", "--out", str(tmp_path / "v1.0")]
    main(arguments)
    results = json.loads((tmp_path / "v1.0.json").read_text())
    assert results["workloads"].keys() == {"small", "memory-casia"}
    assert "python -m bench memory-casia" in (tmp_path / "v1.0.md").read_text()
    results["machine"]["threads"] = -1
    (tmp_path / "v1.0.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="another machine"):
        main(arguments)

    # An implementation without enough memory is not started.
    monkeypatch.setattr(harness, "available_bytes", lambda device: 1e4)
    row = harness.run(WORKLOADS["small"], "cpu", 0.01, ["eager"])["implementations"]["eager"]
    assert row["skipped"].startswith("does not fit")


def test_a_failed_or_killed_session_raises() -> None:
    session = Remote(Session, replace(WORKLOADS["small"], skip_tolerance=-1.0), "native", "cpu")
    try:
        with pytest.raises(ImplementationFailedError, match="skip_tolerance"):
            session.call("check")
        os.kill(session._process.pid, 9)
        with pytest.raises(ImplementationFailedError, match="status -9"):
            session.call("check")
    finally:
        session.close()


def broken_by_eager(
    workload: Workload, device: str, seconds: float, names: list[str], memory: bool
) -> dict:
    """Work of :class:`isolation.Runner`, which it sends to another process."""
    if "eager" in names:
        raise DeviceLostError("eager", "illegal access")
    if "published" in names:
        os._exit(1)
    return {"process": os.getpid(), "implementations": {name: {} for name in names}}


def test_a_broken_device_affects_one_implementation() -> None:
    runner = isolation.Runner(broken_by_eager, own_process=True)
    run = partial(runner.run, WORKLOADS["small"], "cpu", 0.0)
    try:
        result = run(["native", "eager"], False)
        assert result["implementations"] == {"native": {}, "eager": {"failed": "illegal access"}}
        assert result["process"] != os.getpid()
        assert run(["native"], False)["process"] == result["process"]
        with pytest.raises(BrokenProcessPool):
            run(["published"], False)
        assert run(["native"], False)["process"] != result["process"]
    finally:
        runner.close()


def test_a_lost_device_is_distinguished_from_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = Local(replace(WORKLOADS["small"], skip_tolerance=-1.0), "native", "cpu")
    with pytest.raises(ImplementationFailedError, match="skip_tolerance"):
        failing.call("check")
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.empty(0).view(1))
    with pytest.raises(DeviceLostError, match="skip_tolerance"):
        failing.call("check")


def test_memory_of_eager_code_is_seen_and_of_fused_is_not() -> None:
    workload = replace(WORKLOADS["pair-1k"], rows=768, size=16)
    matrix = 4 * workload.rows**2 / 2**20
    found = {}
    for name in ("native", "published"):
        session = Remote(Session, workload, name, "cpu")
        session.call("warm_up")
        found[name] = session.call("first")["above_gradients_mb"]
        session.close()
    assert found["published"] > 2 * matrix
    assert found["published"] > 2 * found["native"]


def test_predictions_of_memory_grow_with_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "available_bytes", lambda device: 20e9)
    assert harness.misfit(WORKLOADS["pair-8k"], "eager", "cpu") is None
    assert "does not fit" in harness.misfit(WORKLOADS["pair-32k"], "eager", "cpu")
    assert harness.misfit(WORKLOADS["pair-32k"], "native", "cpu") is None
    largest = scaling.CURVES["class"][-1]
    assert harness.misfit(largest, "native", "cpu") is None
    monkeypatch.setattr(harness, "available_bytes", lambda device: 16e9)
    assert "does not fit" in harness.misfit(largest, "native", "cpu")


def test_the_fit_recovers_known_coefficients() -> None:
    volumes = [1e6, 1e7, 1e8, 1e9]
    found = scaling.fit(volumes, [2e-3 + 3e-10 * x for x in volumes])
    assert found["a_s"] == pytest.approx(2e-3)
    assert found["b_s_per_nmd"] == pytest.approx(3e-10)
    assert found["largest_deviation"] < 1e-9
    # No overhead below zero, and a point off the line is seen.
    bent = scaling.fit(volumes, [x**1.2 * 1e-11 for x in volumes])
    assert bent["a_s"] == 0.0
    assert bent["largest_deviation"] > 0.3
    assert scaling.fit([5.0, 5.0], [1.0, 1.0])["b_s_per_nmd"] == pytest.approx(0.2)


def test_a_scaling_curve_and_its_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(workload: Workload, name: str, device: str, seconds: float) -> dict:
        if name == "eager" and workload.columns > 300:
            return {"skipped": "does not fit"}
        return {"median_s": 1e-9 * workload.flops, "samples": 1, "above_gradients_mb": 0.0}

    monkeypatch.setattr(scaling, "measure", measured)
    monkeypatch.setattr(scaling, "gemm_rate", lambda *_: 1e10)
    saved = []
    workloads = [w.shrunk(64, 100 * (k + 1)) for k, w in enumerate(scaling.CURVES["class"])]
    curve = scaling.run_curve(workloads, "cpu", 0.1, lambda c: saved.append(json.dumps(c)))
    assert len(saved) == len(workloads)
    assert curve["fit"]["b_s_per_nmd"] == pytest.approx(6e-9)
    assert "does not fit" in scaling._table({"class": curve})
    plots.draw("class", curve, tmp_path / "class.png")
    assert (tmp_path / "class.png").read_bytes()[:4] == b"\x89PNG"


def test_a_point_of_a_scaling_curve_is_measured() -> None:
    found = scaling.measure(scaling.CURVES["pair"][0].shrunk(64, 0), "native", "cpu", 0.01)
    assert found["median_s"] > 0.0
    assert found["samples"] >= 1


def test_crossover_is_where_native_stays_ahead(tmp_path: Path) -> None:
    def points(*native: float) -> list[dict]:
        return [
            {"pairs": 4**k, "reference_s": 1.0, "native_s": seconds}
            for k, seconds in enumerate(native)
        ]

    assert crossover.native_from(points(2.0, 0.5, 2.0, 0.5, 0.5)) == 4**3
    assert crossover.native_from(points(0.5, 0.5)) == 1
    assert crossover.native_from(points(0.5, 2.0)) is None
    out = tmp_path / "crossover.json"
    crossover.main(["--seconds", "0", "--sides", "8", "--out", str(out)])
    curves = json.loads(out.read_text())["curves"]
    assert {(c["loss"], c["size"]) for c in curves} == {
        (loss, size) for loss in crossover.LOSSES for size in crossover.SIZES
    }


def test_targets_and_tables_name_what_exists() -> None:
    for target in TARGETS:
        workload = WORKLOADS[target.workload]
        assert target.device in workload.on
        assert target.speedup is not None or target.memory_mb is not None
        if target.device == "cpu":
            assert {target.against, target.ours or "native"} <= implementations(workload).keys()
        # Their names and formulas are known without a device.
        else:
            assert (target.ours or "auto") in implementations(workload, "cuda")
    assert "liger-kernel" in implementations(WORKLOADS["class-1m"], "cuda")
    assert report.README_ROWS.keys() <= WORKLOADS.keys()
    assert report.README_COLUMNS.keys() <= set(NAMES)
    for name, workload in WORKLOADS.items():
        assert workload.name == name
        assert workload.loss in FUSED


def test_reports_cope_with_whatever_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Not measured" in report.readme_section(tmp_path)
    assert "not measured" in report.targets_section(tmp_path)
    shape = {"loss": "uss", "rows": 2000, "columns": 0, "size": 500, "gemms": 1.5}
    ours = {"median_s": 2.0, "samples": 3, "above_gradients_mb": 50.0, "roofline_fraction": 0.5}
    eager = {"median_s": 6.0, "speedup": 3.0, "speedup_quartiles": [2.9, 3.1]}
    results = {
        "command": "python -m bench",
        "device": "cpu",
        "machine": {"processor": "P", "threads": 2, "torch": "T"},
        "workloads": {
            "pair-8k": {
                **shape,
                "primary": "native",
                "implementations": {"native": ours, "eager": eager},
            },
            "class-100k": {
                **shape,
                "implementations": {
                    "native": {**ours, "above_gradients_mb": 70.0},
                    "eager": {"skipped": "does not fit: 9 GB"},
                    "torch.compile": {"failed": "no | compiler"},
                },
            },
            "pair-32k": {"failed": "all of it"},
            "pair-8k-bf16": {"skipped": "no bfloat16"},
        },
    }
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    table = report.page(results)
    assert f"3.00{TIMES} (2.90-3.10)" in table
    assert "failed: no \\| compiler" in table
    # Throughput of both, FLOPs of the fused algorithm alone.
    assert "| 2.00 s (3) |  | 2 M pairs/s, 0.003 TFLOP/s | 50 MB | 50% |" in table
    assert "| 0.667 M pairs/s |" in table
    assert "failed: all of it" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(report.COLUMNS) + 1}
    readme = report.readme_section(tmp_path)
    assert f"| USS in-batch, N = 8192 | 2.00 s, 50 MB | 3.00{TIMES} |" in readme
    assert "does not fit" in readme
    targets = (
        Target("pair-8k", speedup=2.5, memory_mb=100.0),
        Target("pair-8k", speedup=3.5, memory_fraction=0.1, roofline_fraction=0.5),
        Target("class-100k", speedup=1.5, memory_mb=60.0),
    )
    monkeypatch.setattr(report, "TARGETS", targets)
    lines = report.targets_section(tmp_path).splitlines()
    wanted = "speedup 2.5 over eager, peak memory below 100 MB"
    measured = f"3.00{TIMES} (2.90-3.10); 50 MB"
    assert lines[2] == f"| `pair-8k` | {wanted} | {measured} | yes |"
    assert lines[3].endswith("| no |")
    assert lines[4].endswith("eager: does not fit: 9 GB; 70 MB | no |")


def test_generated_parts_of_the_readmes_are_those_of_the_results() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "bench.report", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_the_roofline_counts_gemms_or_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = WORKLOADS["class-400k"]
    monkeypatch.setattr(harness, "gemm_rate", lambda *_: 1e12)
    monkeypatch.setattr(harness, "copy_rate", lambda *_: 1e9)
    rates = harness.Rates(workload, "cpu")
    rates.measure()
    features, weights = 128 * 512, 400_000 * 512
    assert rates.roofline() == pytest.approx(4 * (2 * features + 2 * weights) / 1e9)
    monkeypatch.setattr(harness, "copy_rate", lambda *_: 1e15)
    rates = harness.Rates(workload, "cpu")
    rates.measure()
    assert rates.roofline() == pytest.approx(3 * 2 * 128 * weights / 1e12)
    # Where cosines are not kept the same work takes one more GEMM.
    assert workload.flops_on("cuda") == pytest.approx(workload.flops * 4 / 3)


def test_short_steps_are_repeated() -> None:
    session = Session(WORKLOADS["small"].shrunk(8, 0), "eager", "cpu")
    first = session.first()
    assert math.isfinite(session.loss)
    count = 0
    single = session.run

    def counted() -> float:
        nonlocal count
        count += 1
        return min(single(), 0.01)

    session.run = counted
    assert 0.0 < session.step() <= 0.01
    assert count >= 5
    assert first["seconds"] > 0.0


@pytest.mark.parametrize("option", ["--contestants", "--implementations"])
def test_an_option_of_earlier_versions_names_its_replacement(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([option, "absent"])
    told = capsys.readouterr().err
    assert "unknown implementation absent" in told
    assert ("--contestants is deprecated, use --implementations" in told) == (
        option == "--contestants"
    )
