"""``python -m bench.cpu_model``: it counts what a step does, and its formulas behave."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import pytest
import torch
from support.helpers import ROOT

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import cpu_model
from unitsface_kernels import fused_margin_softmax_loss
from unitsface_kernels.backends.native import loader
from unitsface_kernels.backends.native.cpu_engine import CLASS_BLOCK

KERNELS = (
    "normalize_rows",
    "normalize_rows_backward",
    "logsumexp_tile",
    "logsumexp_gradient_tile",
    "gemm",
)


def _calls(panels: int, monkeypatch) -> Counter:
    """Calls of kernels in a step against this many panels of classes."""
    found: Counter = Counter()
    for name in KERNELS:
        kernel = getattr(loader.extension().cpu, name)

        def counted(*arguments, name: str = name, kernel=kernel):
            found[name] += 1
            return kernel(*arguments)

        monkeypatch.setattr(loader.extension().cpu, name, counted)
    feats = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(panels * CLASS_BLOCK[1], 8, requires_grad=True)
    fused_margin_softmax_loss(feats, weight, torch.arange(5), backend="native").backward()
    monkeypatch.undo()
    return found


@pytest.mark.skipif(not loader.extension().cpu.has_gemm(0), reason="the library multiplies")
def test_loops_of_a_panel_are_those_of_a_step(monkeypatch) -> None:
    assert cpu_model.CLASS_BLOCK == CLASS_BLOCK
    more = _calls(3, monkeypatch)
    more.subtract(_calls(2, monkeypatch))
    assert more == {
        "normalize_rows": 2,
        "normalize_rows_backward": 1,
        "logsumexp_tile": 1,
        "logsumexp_gradient_tile": 1,
        "gemm": 3,
    }
    # A GEMM packs its operands in one loop and multiplies in another.
    loops = sum(more.values()) + more["gemm"]
    assert loops == len(cpu_model.panel(512, 512, 2, cpu_model.Rates()))


def test_predictions_have_the_limits_that_they_must_have(capsys) -> None:
    free = cpu_model.Rates(elements=1e30, python_s=0.0, start_s=0.0, per_thread_s=0.0, memory=1e30)
    alone = cpu_model.prediction(512, 480, 1, free)
    assert alone["total_s"] == pytest.approx(alone["ideal_s"])
    rates = cpu_model.Rates()
    several = [cpu_model.prediction(512, 512, cores, rates) for cores in cpu_model.CORES]
    for fewer, more in itertools.pairwise(several):
        assert more["compute_s"] < fewer["compute_s"]
        assert more["fraction"] < fewer["fraction"] < 1.0
        assert more["waits_s"] > fewer["waits_s"]
    slow = cpu_model.prediction(512, 512, 64, cpu_model.Rates(memory=1e9))
    assert slow["compute_s"] == cpu_model.panel_bytes(512, 512) / 1e9
    cpu_model.main(["--rows", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert "Predicted" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[4:]] == [str(c) for c in cpu_model.CORES]
    with pytest.raises(SystemExit):
        cpu_model.main(["--rows", "0"])
