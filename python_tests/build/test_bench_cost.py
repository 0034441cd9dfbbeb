"""The cost of a partial-FC step: formulas against what PartialFC does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.partial_fc import COUNTS
from support.ranks import forkserver, run_ranks
from torch import distributed as dist

import unitsface_kernels as uk
from bench import heads, predict, predict_training
from bench.cost import Machine, Step
from train.backbones import build_backbone
from train.config import make_config
from train.tools import dry_run
from unitsface_kernels.distributed.collectives import world_size


@pytest.mark.extended
def test_the_tables_are_those_of_the_formulas_and_results():
    for name in predict.TABLES:
        text = (predict.DOCS / name).read_text()
        assert predict.page(name, text) == text


def test_what_a_backbone_costs_is_counted():
    config = make_config(("test", {"model": {"name": "iresnet18", "input_size": 32}}))
    found = predict_training.count(config)
    model = build_backbone("iresnet18", 32)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    multiplications = 0

    def add(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal multiplications
        multiplications += output.numel() // len(output) * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(add)
    model(torch.zeros(2, 3, 32, 32))
    assert found.operations == 2 * multiplications
    # The first activations alone, of 2 bytes, are kept and moved more than once.
    assert found.moved > found.saved > 2 * 64 * 32 * 32 * 2


class _Counted:
    """Bytes that this rank's collectives receive, by their own algorithms' volumes."""

    def __init__(self) -> None:
        self.bytes = {"gather": 0.0, "scatter": 0.0, "reduce": 0.0}

    def wrap(self, name: str, kind: str, volume) -> None:
        real = getattr(dist, name)

        def counting(*arguments, **keywords):
            self.bytes[kind] += volume(*arguments)
            return real(*arguments, **keywords)

        setattr(dist, name, counting)


def _exchanged(rank: int) -> dict[str, float]:
    ranks = world_size()
    counted = _Counted()
    others = (ranks - 1) / ranks
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else None
    counted.wrap(gather or "all_gather_into_tensor", "gather", lambda out, _: others * out.nbytes)
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else None
    counted.wrap(
        scatter or "reduce_scatter_tensor", "scatter", lambda out, _: (ranks - 1) * out.nbytes
    )
    counted.wrap("all_reduce", "reduce", lambda tensor, *_: 2 * others * tensor.nbytes)
    head = uk.PartialFC("cosface", 16, 40)
    feats = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    head(feats, torch.arange(6)).backward()
    return counted.bytes


def test_exchanged_bytes_follow_the_formulas():
    for ranks in (2, 3):
        assert ranks in COUNTS
        step = Step(ranks, 6, 40, size=16, feature_bytes=2)
        for found in run_ranks(ranks, _exchanged):
            assert found["gather"] == pytest.approx(step.gathered())
            assert found["reduce"] == pytest.approx(step.merged())
            assert found["scatter"] == pytest.approx(step.returned())


def test_held_and_largest_agree():
    machine = Machine("any", 1e12, 1e12, capacity=80e9)
    for mode, rate in (("fused", 1.0), ("separate", 1.0), ("separate", 0.1)):
        step = Step(8, 128, 1, sample_rate=rate, mode=mode)
        most = machine.largest(step, reserved=20e9)
        held = Step(8, 128, most, sample_rate=rate, mode=mode).held()
        assert 0.97 * 52e9 < held <= 52e9
    assert machine.largest(Step(1, 128, 1), reserved=80e9) == 0


def test_time_grows_with_what_is_done():
    machine = Machine("any", 1e12, 1e11, link=1e9, latency=1e-5)
    step = Step(8, 128, 1_000_000)
    assert machine.compute_seconds(step) == pytest.approx(
        4 * 2 * 1024 * 125_000 * 512 / 1e12 + 2048 * 125_000 * 6 / 1e11
    )
    sampled = Step(8, 128, 1_000_000, sample_rate=0.1)
    assert machine.compute_seconds(sampled) == pytest.approx(machine.compute_seconds(step) / 10)
    assert machine.exchange_seconds(sampled) == machine.exchange_seconds(step) > 0
    assert machine.exchange_seconds(Step(1, 128, 1_000_000)) == 0


@pytest.mark.extended
def test_heads_run_and_agree_on_the_loss(tmp_path):
    forkserver()
    out = ["--rounds", "2", "--out", str(tmp_path / "heads")]
    heads.main(["head-400k", "shard-10m-sampled", "--quick", *out])
    results = json.loads((tmp_path / "heads.json").read_text())["heads"]
    for name, head in results.items():
        rows = head["implementations"]
        assert set(rows) == set(heads.IMPLEMENTATIONS)
        assert not [row for row in rows.values() if "failed" in row]
        losses = {key: row["loss"] for key, row in rows.items()}
        assert losses["fused"] == losses["fused-step"] == losses["separate"]
        # Draws of its own.
        close = 1e-5 if name == "head-400k" else 0.3
        assert losses["eager"] == pytest.approx(losses["fused"], rel=close)
    assert "fused-step" in (tmp_path / "heads.md").read_text()


def test_the_stored_page_is_that_of_the_stored_results():
    results = json.loads(predict.HEADS.read_text())
    assert predict.HEADS.with_suffix(".md").read_text() == heads.page(results)


def test_the_table_and_a_dry_run_count_the_same_memory() -> None:
    """In the run's precision, on whatever device the dry run takes its step."""
    small = {"model": {"name": "iresnet18", "input_size": 32}, "train": {"amp": "bf16"}}
    config = make_config(("test", small))
    kept = dry_run.kept_per_image(config)
    assert kept == predict_training.count(config).saved
    config.train.amp = "none"
    assert 1.7 * kept < dry_run.kept_per_image(config) < 2.1 * kept
