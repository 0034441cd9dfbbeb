"""Losses whose state follows the batches: the same on all ranks as in one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support import partial_fc
from support.partial_fc import COUNTS, SIZE, Run, batch, compare, joined, own_part, sharded
from support.ranks import run_ranks

import unitsface_kernels as uk
from unitsface_kernels.distributed.collectives import world_size

RUNS = [
    Run("curricularface", {}, 1.0, steps=6),
    Run("curricularface", {"alpha": 0.5}, 0.4, fuse="step", steps=4),
    Run("mv_softmax", {"margin_type": "arc"}, 0.4, fuse="backward", steps=4),
    Run("adacos", {}, 1.0, steps=6),
    Run("adacos", {}, 0.4, "adamw", fuse="backward", steps=4),
    # A shard without classes.
    Run("adacos", {}, 1.0, classes=3, steps=4),
    Run("cosface", {"interclass_filtering_threshold": 0.2}, 1.0, steps=4),
]
CLASSES = 23
STATES = {"curricularface": "t", "adacos": "scale"}


def _data_parallel(name: str, rows) -> list[float]:
    """The state after each of three batches, of which ``rows`` takes a process's own."""
    torch.manual_seed(4)
    module = uk.CLASS_LOSSES[name](SIZE, CLASSES)
    found = []
    for step in range(3):
        feats, labels = (rows(t) for t in batch(step, CLASSES))
        module(feats, labels)
        found.append(float(getattr(module, STATES[name])))
    return found


def _all_runs(rank: int) -> tuple[list[dict], list[list[float]]]:
    counts = COUNTS[world_size()]
    states = [_data_parallel(name, lambda t: own_part(t, rank, counts)) for name in STATES]
    return [sharded(rank, run) for run in RUNS], states


@cache
def _single(number: int, ranks: int) -> dict:
    return partial_fc.single(RUNS[number], ranks)


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1, marks=pytest.mark.extended),
        2,
        pytest.param(3, marks=pytest.mark.extended),
    ],
)
def test_ranks_agree_with_one_process(ranks: int) -> None:
    """Classes in shards, and batches of data parallelism."""
    found = run_ranks(ranks, _all_runs)
    for number, run in enumerate(RUNS):
        together = joined([parts[0][number] for parts in found], run.classes)
        expected = _single(number, 1 if run.sample_rate == 1.0 else ranks)
        compare(together, expected, run.name())
    want = [_data_parallel(name, lambda t: t) for name in STATES]
    for _, states in found:
        assert states == found[0][1]
        for got, expected in zip(states, want, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)
