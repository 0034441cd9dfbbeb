"""The training steps that are measured on a device, by name.

``python -m bench.gpu_check.steps NAME BACKEND`` runs one a few times, for a profiler around it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import unitsface_kernels as uk

from ..baselines.partial_fc import bfloat16_gemms
from ..heads import MARGIN, SCALE, SGD, Head
from ..inputs import make_inputs
from ..workloads import WORKLOADS, step

#: Runs of a step before it is measured: libraries load, kernels compile, workspaces grow.
WARM_UP = 3
PARTIAL_FC = Head("partial-fc-1m", 1024, 1_000_000, 0.1)
NAMES = (
    *("pair-8k", "pair-32k", "class-100k", "class-1m", "class-1m-trained"),
    PARTIAL_FC.name,
)


class _PartialFC(uk.PartialFC):
    """Draws its weights on the device, in a moment; any will do."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.01)


@dataclass(frozen=True)
class Step:
    """Forward, backward and, with a head, the optimizer's step.

    Attributes:
        run: a whole step on the current stream.
        flops: of its GEMMs.
    """

    name: str
    backend: str
    run: Callable[[], object]
    flops: float


def make(name: str, backend: str, device: str = "cuda", rows: int = 0, columns: int = 0) -> Step:
    """The step of a name; ``rows`` and ``columns``: at most so many."""
    if name == PARTIAL_FC.name:
        return _sampled(backend, device, rows, columns)
    workload = WORKLOADS[name]
    if rows:
        workload = workload.shrunk(rows, columns)
    inputs, loss = make_inputs(workload, device), workload.fused(backend)
    return Step(name, backend, lambda: step(loss, inputs), workload.flops_on("cuda"))


def _sampled(backend: str, device: str, rows: int, columns: int) -> Step:
    """CosFace over a sample of the classes, with the optimizer's step in the backward pass."""
    head = PARTIAL_FC
    count = min(rows or head.rows, head.rows)
    classes = min(columns or head.classes, head.classes)
    options = {"scale": SCALE, "margin": MARGIN, "device": device, "backend": backend}
    module = _PartialFC("cosface", head.size, classes, head.sample_rate, **options)
    optimizer = uk.SampledSGD(module.parameters(), **SGD)
    module.fuse(optimizer, "backward")
    generator = torch.Generator(device).manual_seed(0)
    feats = torch.randn(count, head.size, generator=generator, device=device).requires_grad_()
    labels = torch.randint(classes, (count,), generator=generator, device=device)

    def run() -> None:
        feats.grad = None
        with bfloat16_gemms(device):
            loss = module(feats, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    sampled = int(head.sample_rate * classes)
    return Step(head.name, backend, run, 4 * 2.0 * count * sampled * head.size)


def warm(one: Step) -> None:
    """Runs it until it is as fast as it will be, and waits."""
    for _ in range(WARM_UP):
        one.run()
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.steps", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("backend", choices=("triton", "native"))
    given = parser.parse_args(arguments)
    warm(make(given.name, given.backend))
    return 0


if __name__ == "__main__":
    sys.exit(main())
