"""pytest-benchmark: ``pytest bench --benchmark-only``; groups compare implementations per workload.

For publishable numbers use ``python -m bench``, which interleaves the implementations.
"""

from __future__ import annotations

import pytest

from .implementations import implementations
from .inputs import make_inputs
from .workloads import QUICK, WORKLOADS, step

IMPLEMENTATIONS = ("native", "eager", "published")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", QUICK)
def test_forward_backward(benchmark, name: str, implementation: str) -> None:
    workload = WORKLOADS[name]
    inputs, loss = make_inputs(workload), implementations(workload)[implementation]
    benchmark.group = name
    rounds = 20 if workload.flops < 1e10 else 5
    value = benchmark.pedantic(
        step, args=(loss, inputs), rounds=rounds, warmup_rounds=1, iterations=1
    )
    assert value.isfinite()
