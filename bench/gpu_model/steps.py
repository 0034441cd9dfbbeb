"""The steps that are modeled: named workloads at their size, run on the fake device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unitsface_kernels import fused_circle_loss

from ..fake_device import Chip, Tape, fake_device
from ..fake_device.steps import Build, HeadStep, loss_step
from ..workloads import WORKLOADS, Workload, step

SIZE = 512


@dataclass(frozen=True)
class Step:
    """Forward, backward and, where it is fused, the optimizer.

    Attributes:
        rows, columns: in-batch no columns.
        flops: of its GEMMs.
        build: makes tensors of (rows, columns, features) and returns the step.
    """

    name: str
    rows: int
    columns: int
    flops: float
    build: Build


def _workload(workload: Workload) -> Step:
    build = loss_step(workload, "triton")
    return Step(workload.name, workload.rows, workload.columns, workload.flops_on("cuda"), build)


def _circle(name: str, rows: int) -> Step:
    """The batch's pairs by two log-sum-exps: statistics, and gradients, on half of the tiles."""

    def build(count: int, columns: int, size: int) -> Callable[[], object]:
        feats = torch.ones(count, size, dtype=torch.bfloat16, device="cuda").requires_grad_()
        labels = torch.zeros(count, dtype=torch.int64, device="cuda")
        inputs = {"feats": feats, "labels": labels}
        return lambda: step(partial(fused_circle_loss, backend="triton"), inputs)

    return Step(name, rows, 0, 2.0 * 2.0 * rows * rows * SIZE, build)


def _partial_fc(name: str, classes: int, rate: float, rows: int) -> Step:
    """A fused step of SGD with momentum on sampled float32 class weights, on one rank."""
    build = HeadStep(sample_rate=rate, when="backward").build("triton")
    return Step(name, rows, classes, 4 * 2.0 * rows * int(rate * classes) * SIZE, build)


STEPS = {
    step.name: step
    for step in (
        *(_workload(w) for w in WORKLOADS.values() if "cuda" in w.on and w.size == SIZE),
        _circle("circle-32k", 32_768),
        _partial_fc("partial-fc-1m", 1_000_000, 0.1, 1024),
    )
}
#: Whose time is predicted.
MODELED = (
    "pair-8k",
    "pair-32k",
    "class-100k",
    "class-1m",
    "class-1m-trained",
    "partial-fc-1m",
)
#: Together they launch every kernel of the named CUDA workloads: the smallest of each loss, kind of
#: columns and filtering that has more than one tile.
KERNELS = (
    "pair-32k",
    "memory-glint",
    "memory-glint-trained",
    "class-100k",
    "class-100k-trained",
    "uce-100k",
    "circle-32k",
    "partial-fc-1m",
)


def record(step: Step, chip: Chip) -> Tape:
    """The work of one step after a first; sections are named after the step."""
    with fake_device(chip, answer=_keep_everything) as device:
        run = step.build(step.rows, step.columns, SIZE)
        run()
        with device.recording() as tape, device.section(step.name):
            run()
    return tape


def _keep_everything(name: str, args: tuple[Any, ...]) -> Any:
    """What a step that waits for the device learns: that nothing can be left out."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    subject = args[0]
    operator = name.split(".")[1] if name.startswith("aten.") else name
    if operator == "nonzero":
        return empty(subject.numel(), subject.dim())
    if operator == "index":
        mask = args[1][0]
        return empty(mask.numel(), *subject.shape[mask.dim() :], dtype=subject.dtype)
    if operator == "_unique2":
        count = subject.numel()
        return empty(count, dtype=subject.dtype), empty(*subject.shape), empty(count)
    if operator == "copy to the host":
        return torch.zeros(subject.shape, dtype=subject.dtype)
    if operator == "_local_scalar_dense":
        return 0
    raise NotImplementedError(f"a step waits for {name}")
