"""Calls whose kernels are compiled: the named workloads, and every variant of every kernel.

Small tensors on the CPU stand for large ones on a GPU: kernels are specialized to neither size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from unitsface_kernels import passes
from unitsface_kernels.backends import triton as backend
from unitsface_kernels.backends.streaming import Call, logsumexp_pairs
from unitsface_kernels.backends.triton import engine, launch
from unitsface_kernels.losses import REGISTRY

from ..inputs import make_inputs
from ..workloads import WORKLOADS, Workload, step
from .launches import Launch, recorded

ROWS, COLUMNS, SIZE = 192, 256, 512
#: Rows and columns of an in-batch tile: some are beside the diagonal.
BLOCK = 128
#: What a call compiles. bfloat16 has every variant of every kernel that a loss of the registry
#: launches (a tile on the diagonal of a batch, one beside it, a memory, losses only, row weights);
#: with every loss. The other dtypes differ in element size and in the conversion of gradients: the
#: variant with the most state and the two logsumexp kernels, of the first loss of each driver,
#: stand for the rest, which halves the time. float32 runs on ordinary multiplications, which no
#: architecture does differently: one stands for all.
VARIANTS = {
    "bfloat16": ("batch", "batch losses", "batch weights", "memory", "classes"),
    "float16": ("batch", "classes"),
    "float32": ("batch", "classes"),
}


def variants(architecture: int) -> dict[str, tuple[str, ...]]:
    """By dtype."""
    return {k: v for k, v in VARIANTS.items() if k != "float32" or architecture == 90}


@contextmanager
def _as_on_gpu(architecture: int) -> Iterator[None]:
    """The configuration and the tiles of a GPU, for CPU tensors."""
    with ExitStack() as stack:
        replace = lambda *args: stack.enter_context(patch.object(*args))  # noqa: E731
        replace(launch, "capability", lambda device: architecture)
        replace(backend, "unavailable", lambda device, dtype: None)
        replace(engine.TritonEngine, "sum_block", (BLOCK, BLOCK))
        # Where no label is read: kernels that do not run leave labels unset.
        possible = lambda call, engine, operands: (operands, None)  # noqa: E731
        replace(logsumexp_pairs, "_possible_positives", possible)
        yield


def workload_launches(architecture: int) -> list[Launch]:
    """Those of every kind of step among the named CUDA workloads."""
    with _as_on_gpu(architecture), recorded() as recorder:
        for workload in _kinds():
            recorder.label = workload.name
            small = workload.shrunk(ROWS, COLUMNS)
            inputs = make_inputs(small)
            for name, tensor in inputs.items():
                if name in ("feats", "weight", "memory"):
                    wanted = tensor.detach().to(workload.dtype("cuda"))
                    inputs[name] = wanted.requires_grad_(tensor.requires_grad)
            step(small.fused("triton"), inputs)
    return recorder.launches


def _kinds() -> Iterator[Workload]:
    """The first workload of each loss and topology that runs on CUDA, at the usual depth."""
    seen = set()
    for workload in WORKLOADS.values():
        kind = (workload.loss, workload.topology)
        if "cuda" in workload.on and workload.size == SIZE and kind not in seen:
            seen.add(kind)
            yield workload


def variant_launches(architecture: int) -> list[Launch]:
    """Those of :data:`VARIANTS`, labelled with dtype and variant."""
    with _as_on_gpu(architecture), recorded() as recorder:
        for dtype, names in variants(architecture).items():
            for name in names:
                recorder.label = f"{dtype}, {name}"
                _run_variant(name, getattr(torch, dtype))
            recorder.label = f"{dtype}, largest counts"
            _run_largest(getattr(torch, dtype))
    return recorder.launches


def _run_variant(variant: str, dtype: torch.dtype) -> None:
    seen = set()
    # Thresholds per column are the most state.
    for spec in sorted(REGISTRY.values(), key=lambda spec: spec.threshold != "per_column"):
        if (spec.topology == "class") != (variant == "classes"):
            continue
        # Elsewhere the first of a driver stands for all.
        kind = spec.name if dtype == torch.bfloat16 else (spec.reduction, spec.topology)
        if kind in seen:
            continue
        seen.add(kind)
        call = _call(spec.name, dtype, variant in ("classes", "memory"))
        if variant == "batch losses":
            passes.forward(call, gradients=False)
        elif variant == "batch weights":
            # Of the others, weights are what every backward pass has.
            if spec.reduction == "sum":
                passes.backward(call, torch.zeros(0), torch.ones(ROWS))
        else:
            result = passes.forward(call, gradients=True)
            if result.state is not None:
                passes.backward(call, result.state, torch.ones(ROWS))


def _run_largest(dtype: torch.dtype) -> None:
    """Counts decide the size of tiles: the largest, too."""
    for spec in REGISTRY.values():
        largest = {p.name: p.maximum for p in spec.parameters if p.integer}
        if largest:
            params = spec.pack(spec.defaults() | largest)
            call = dataclasses.replace(_call(spec.name, dtype, True), params=params)
            passes.forward(call, gradients=False)


def _call(loss: str, dtype: torch.dtype, with_columns: bool) -> Call:
    spec = REGISTRY[loss]
    labels, many = torch.arange(ROWS) % 7, torch.arange(COLUMNS) % 7
    columns = torch.zeros(COLUMNS, SIZE, dtype=dtype) if with_columns else None
    return Call(
        spec,
        spec.pack(spec.defaults()),
        "mean",
        "triton",
        dtype,
        rows=torch.zeros(ROWS, SIZE, dtype=dtype),
        row_labels=labels,
        columns=columns,
        column_labels=many if spec.topology == "pair" and columns is not None else None,
        self_offset=None if columns is not None else 0,
        threshold=None if spec.threshold == "none" else torch.zeros(1),
        need_rows=True,
        need_columns=True,
        need_threshold=True,
    )


#: By name, for an architecture.
SETS: dict[str, Callable[[int], list[Launch]]] = {
    "workloads": workload_launches,
    "variants": variant_launches,
}
