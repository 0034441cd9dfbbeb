"""``python -m bench.cpu_model``: it counts what a step does, and its formulas behave."""

from __future__ import annotations

import cProfile
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.helpers import ROOT

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import cpu_model
from unitsface_kernels import (
    PartialFC,
    SampledSGD,
    fused_margin_softmax_loss,
    fused_sphereface2_loss,
    fused_uss_loss,
)
from unitsface_kernels.backends.native import cpu_engine, loader

#: Loops over threads of each kernel. A GEMM packs its operands in one and multiplies in another.
KERNELS = {
    "normalize_rows": 1,
    "normalize_rows_backward": 1,
    "logsumexp_tile": 1,
    "logsumexp_gradient_tile": 1,
    "sum_tile": 1,
    "update_rows": 1,
    "gemm": 2,
}
Step = Callable[[], object]


def _softmax(panels: int, need_columns: bool = True) -> Step:
    rows = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8 * panels, 8, requires_grad=need_columns)
    loss = partial(fused_margin_softmax_loss, rows, weight, torch.arange(4), backend="native")
    return lambda: loss().backward()


def _fused_optimizer(panels: int) -> Step:
    head = PartialFC("cosface", 8, 8 * panels, backend="native")
    head.fuse(SampledSGD(head.parameters(), lr=0.1, momentum=0.9))
    rows = torch.randn(4, 8, requires_grad=True)
    return lambda: head(rows, torch.arange(4)).backward()


def _sum_of_classes(panels: int) -> Step:
    rows, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8 * panels, 8)
    labels, weight = torch.arange(4), weight.requires_grad_()
    loss = partial(fused_sphereface2_loss, rows, weight, labels, 0.0, backend="native")
    return lambda: loss().backward()


def _pairs(panels: int) -> Step:
    """A row of tiles on the diagonal more has as many tiles as there are rows of them."""
    rows, labels = torch.randn(4 * panels, 8, requires_grad=True), torch.arange(4 * panels) // 2
    loss = partial(fused_uss_loss, rows, labels, torch.ones(1), backend="native")
    return lambda: loss().backward()


def _counts(step: Step, monkeypatch) -> Counter:
    """Calls of kernels, operators of Torch and calls of Python's functions in a step."""
    found: Counter = Counter()
    step()  # what a first one does alone
    with monkeypatch.context() as patch:
        for name in KERNELS:
            kernel = getattr(loader.extension().cpu, name)

            def counted(*arguments, name: str = name, kernel=kernel):
                found[name] += 1
                return kernel(*arguments)

            patch.setattr(loader.extension().cpu, name, counted)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
    for event in profile.events():
        inner = event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
        found["operators"] += event.name.startswith("aten::") and not inner
    calls = cProfile.Profile()
    calls.runcall(step)
    found["calls"] = sum(entry.callcount for entry in calls.getstats())
    return found


def _of_a_panel(make: Callable[[int], Step], first: int, monkeypatch) -> Counter:
    """What one panel more adds; ``first``: with the panels of the smaller step."""
    monkeypatch.setattr(cpu_engine, "CLASS_BLOCK", (4, 8))
    monkeypatch.setattr(cpu_engine.CpuEngine, "sum_block", (4, 4))
    more, fewer = (_counts(make(panels), monkeypatch) for panels in (first + 1, first))
    more.subtract(fewer)
    return +more


@pytest.mark.skipif(not loader.extension().cpu.has_gemm(0), reason="the library multiplies")
@pytest.mark.parametrize(
    ("make", "kernels", "operators", "most_calls"),
    [
        (_softmax, {"normalize_rows": 2, "normalize_rows_backward": 1, "logsumexp_tile": 1,
                    "logsumexp_gradient_tile": 1, "gemm": 2}, 5, 100),
        (partial(_softmax, need_columns=False), {"normalize_rows": 2, "logsumexp_tile": 1,
                                                 "logsumexp_gradient_tile": 1, "gemm": 3}, 2, 95),
        (_fused_optimizer, {"normalize_rows": 2, "normalize_rows_backward": 1, "logsumexp_tile": 1,
                            "logsumexp_gradient_tile": 1, "gemm": 3, "update_rows": 1}, 5, 160),
        (_sum_of_classes, {"normalize_rows": 1, "normalize_rows_backward": 1, "sum_tile": 1,
                           "gemm": 2}, 9, 66),
        (_pairs, {"sum_tile": 4, "gemm": 8}, 37, 180),
    ],
    ids=["softmax", "no-class-gradient", "fused-optimizer", "sum-of-classes", "pairs"],
)  # fmt: skip
def test_work_of_a_panel(
    make: Callable[[int], Step],
    kernels: dict[str, int],
    operators: int,
    most_calls: int,
    monkeypatch,
) -> None:
    """What the interpreter does for a panel grows only on purpose."""
    found = _of_a_panel(make, 3, monkeypatch)
    assert {name: found[name] for name in KERNELS if found[name]} == kernels
    assert found["operators"] <= operators, found
    assert found["calls"] <= most_calls, found
    if make is _softmax:
        loops = sum(KERNELS[name] * times for name, times in kernels.items())
        assert loops == len(cpu_model.panel(512, 512, 2, cpu_model.Rates(0.0)))


def test_predictions_have_the_limits_that_they_must_have(capsys) -> None:
    free = cpu_model.Rates(0.0, elements=1e30, start_s=0.0, per_thread_s=0.0, memory=1e30)
    alone = cpu_model.prediction(512, 480, 1, free)
    assert alone["total_s"] == pytest.approx(alone["ideal_s"])
    rates = cpu_model.Rates(180e-6)
    several = [cpu_model.prediction(512, 512, cores, rates) for cores in cpu_model.CORES]
    for fewer, more in itertools.pairwise(several):
        assert more["compute_s"] < fewer["compute_s"]
        assert more["fraction"] < fewer["fraction"] < 1.0
        assert more["waits_s"] > fewer["waits_s"]
    slow = cpu_model.prediction(512, 512, 64, cpu_model.Rates(180e-6, memory=1e9))
    assert slow["compute_s"] == cpu_model.panel_bytes(512, 512) / 1e9
    cpu_model.main(["--rows", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert "Predicted" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[4:]] == [str(c) for c in cpu_model.CORES]
    with pytest.raises(SystemExit):
        cpu_model.main(["--rows", "0"])
