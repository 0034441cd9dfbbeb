"""pytest-benchmark: ``pytest bench --benchmark-only``; groups compare contestants per workload.

For figures to quote use ``python -m bench``, which runs the contestants in turns.
"""

from __future__ import annotations

import pytest

from .workloads import QUICK, WORKLOADS, step

CONTESTANTS = ("native", "eager", "published")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", QUICK)
def test_forward_backward(benchmark, name: str, contestant: str) -> None:
    workload = WORKLOADS[name]
    inputs, loss = workload.inputs(), workload.contestants()[contestant]
    benchmark.group = name
    rounds = 20 if workload.flops < 1e10 else 5
    value = benchmark.pedantic(
        step, args=(loss, inputs), rounds=rounds, warmup_rounds=1, iterations=1
    )
    assert value.isfinite()
