"""pytest-benchmark: ``pytest bench --benchmark-only``; groups compare implementations per workload.

Every workload of the device and every implementation of it that fits in memory; ``-k`` selects,
``--device`` names the device. ``extra_info`` of a benchmark, in ``--benchmark-json`` and in the
table at the end:

- ``peak_mb``: peak memory of a step above the inputs, gradients included;
- ``pairs_per_s``: N M / median;
- ``tflops``: FLOPs of the fused algorithm per second, whichever implementation ran;
- ``roofline_fraction``: time of the fused algorithm's GEMMs, or of its inputs and gradients through
  memory, at rates measured beside it, over the median;
- ``errors``: relative, of the loss and each gradient against float64 on a small shape; ``error`` is
  the largest.

Implementations run one after the other. For publishable numbers use ``python -m bench``, which
interleaves them and gives each a process of its own on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import harness
from .implementations import implementations
from .machine import has_bfloat16_gemm
from .session import Session
from .workloads import WORKLOADS

ROUNDS = (3, 50)
#: Seconds of a benchmark's rounds, beyond the least number.
SECONDS = 2.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    cases = [
        (name, implementation)
        for name, workload in WORKLOADS.items()
        if device in workload.on
        for implementation in implementations(workload, device)
    ]
    metafunc.parametrize(("name", "implementation"), cases)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def session(name: str, implementation: str, device: str) -> Iterator[Session]:
    workload = WORKLOADS[name]
    if workload.autocast and device == "cpu" and not has_bfloat16_gemm():
        pytest.skip("this processor has no bfloat16 matmul")
    reason = harness.misfit(workload, implementation, device)
    if reason is not None:
        pytest.skip(reason)
    session = Session(workload, implementation, device)
    yield session
    session.close()


def test_forward_backward(benchmark, name: str, implementation: str, session: Session) -> None:
    workload, device = session.workload, session.device
    benchmark.group = f"{name} ({device})"
    try:
        # In the order of bench/harness.py, so that the peak is that of a step alone.
        if session.implementation.compiled:
            errors, first = session.check(), session.first()
        else:
            session.warm_up()
            first, errors = session.first(), session.check()
    except (ImportError, torch.OutOfMemoryError) as error:
        pytest.skip(str(error))
    least, most = ROUNDS
    rounds = max(least, min(most, int(SECONDS / first["seconds"])))
    # A step ends with the device's: it reads the loss.
    benchmark.pedantic(session.run, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return
    rates = harness.Rates(workload, device)
    rates.measure()
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "workload": name,
        "implementation": implementation,
        "peak_mb": first["peak_mb"],
        "pairs_per_s": workload.rows * (workload.columns or workload.rows) / median,
        "tflops": workload.flops_on(device) / median / 1e12,
        "roofline_fraction": rates.roofline() / median,
        "errors": errors,
        "error": max(errors.values()),
    }
