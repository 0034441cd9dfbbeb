"""``python -m bench.tile_sizes``: interleaved comparison of tile sizes on the CPU.

Sets the engine's block sizes, below the public API.
"""

from __future__ import annotations

import statistics
import time

from unitsface_kernels.backends.native.cpu_engine import CpuEngine

from .implementations import implementations
from .inputs import make_inputs
from .workloads import WORKLOADS, step

PAIR_BLOCKS = (512, 1024, 1536, 2048)
CLASS_BLOCKS = ((512, 1024), (512, 2048), (512, 4096), (512, 8192), (1024, 4096))
ROUNDS = 7


def compare(workload_name: str, attribute: str, blocks: tuple) -> None:
    workload = WORKLOADS[workload_name]
    inputs, loss = make_inputs(workload), implementations(workload)["native"]
    times: dict[tuple, list[float]] = {block: [] for block in blocks}
    for _ in range(ROUNDS):
        for block in blocks:
            setattr(CpuEngine, attribute, block)
            start = time.perf_counter()
            step(loss, inputs)
            times[block].append(time.perf_counter() - start)
    for block, samples in times.items():
        low, high = min(samples), max(samples)
        median = statistics.median(samples)
        print(f"{workload_name:12} {block}: {median:.3f} s ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    compare("pair-8k", "sum_block", tuple((b, b) for b in PAIR_BLOCKS))
    compare("class-100k", "class_block", CLASS_BLOCKS)
