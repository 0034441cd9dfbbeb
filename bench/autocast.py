"""``python -m bench.autocast [workload]``: the native backend in float32 and under autocast.

Interleaved with the eager loss under autocast; errors are those against the native float32 result.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .implementations import implementations
from .inputs import make_inputs
from .workloads import WORKLOADS, step

ROUNDS = 7


def _forward(loss: Callable[..., Tensor], enabled: bool, **inputs: Tensor) -> Tensor:
    """Loss under autocast; the backward pass is outside, as in training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return loss(**inputs)


def main() -> None:
    workload = WORKLOADS[sys.argv[1] if len(sys.argv) > 1 else "pair-8k"]
    inputs, losses = make_inputs(workload), implementations(workload)
    runs = {"float32": ("native", False), "bfloat16": ("native", True), "eager": ("eager", True)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(ROUNDS):
        for name, (implementation, enabled) in runs.items():
            start = time.perf_counter()
            loss = step(partial(_forward, losses[implementation], enabled), inputs)
            times[name].append(time.perf_counter() - start)
            found[name] = loss.detach(), inputs["feats"].grad
    want_loss, want = found["float32"]
    for name, samples in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["float32"], samples, strict=True))
        loss, gradient = found[name]
        print(
            f"{workload.name} {name:9} {statistics.median(samples):.3f} s "
            f"({min(samples):.3f}-{max(samples):.3f}), speedup over float32 {ratio:.2f}; "
            f"loss off by {abs(float(loss / want_loss) - 1):.1e}, "
            f"gradient by {float((gradient - want).norm() / want.norm()):.1e}"
        )


if __name__ == "__main__":
    main()
