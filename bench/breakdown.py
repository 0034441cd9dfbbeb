"""``python -m bench.breakdown [workload]``: time of the native backend by engine method.

Wraps methods of the engine, below the public API.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from functools import wraps

from unitsface_kernels.backends.native.cpu_engine import CpuEngine

from .implementations import implementations
from .inputs import make_inputs
from .workloads import WORKLOADS, step

METHODS = (
    "cosines",
    "addmm",
    "matmul",
    "both_products",
    "normalize_rows",
    "normalize_rows_backward",
    "sum_tile",
    "logsumexp_tile",
    "logsumexp_gradient_tile",
)
ROUNDS = 7


def instrument(spent: dict[str, float]) -> None:
    """Adds each method's own time, without the matmul it calls, to ``spent``."""

    def timed(name: str, method):
        @wraps(method)
        def wrapper(*args, **kwargs):
            start, matmul = time.perf_counter(), spent["cosines"]
            result = method(*args, **kwargs)
            inner = 0.0 if name == "cosines" else spent["cosines"] - matmul
            spent[name] += time.perf_counter() - start - inner
            return result

        return wrapper

    for name in METHODS:
        setattr(CpuEngine, name, timed(name, getattr(CpuEngine, name)))


def main() -> None:
    workload = WORKLOADS[sys.argv[1] if len(sys.argv) > 1 else "class-100k"]
    inputs, loss = make_inputs(workload), implementations(workload)["native"]
    spent: dict[str, float] = defaultdict(float)
    instrument(spent)
    step(loss, inputs)
    shares: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        spent.clear()
        start = time.perf_counter()
        step(loss, inputs)
        total = time.perf_counter() - start
        for name in METHODS:
            shares[name].append(spent[name] / total)
        shares["everything else"].append(1.0 - sum(spent[name] for name in METHODS) / total)
    for name, values in shares.items():
        print(f"{name:24} {100 * statistics.median(values):5.1f} %")


if __name__ == "__main__":
    main()
