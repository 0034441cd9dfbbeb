"""Every variant of every Triton kernel, for the code generation tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import torch

from unitsface_kernels import passes
from unitsface_kernels.backends.streaming import (
    Call,
    ForwardCache,
    TileVariables,
    logsumexp_pairs,
)
from unitsface_kernels.backends.triton import draws, norms
from unitsface_kernels.backends.triton.engine import TritonEngine
from unitsface_kernels.backends.triton.scaling import set_scale
from unitsface_kernels.backends.triton.workspace import Workspace, shipped_config
from unitsface_kernels.losses import REGISTRY, LossSpec, custom

from ..fake_device import Chip, Tape, fake_device
from .policies import POLICIES

ROWS, COLUMNS, SIZE = 192, 256, 512
#: Rows and columns of an in-batch tile: some are beside the diagonal.
BLOCK = 128
#: What a call compiles. bfloat16 has every variant of every kernel that a loss of the registry
#: launches (a tile on the diagonal of a batch, one beside it, a memory, losses only, row weights),
#: those of policies.py included. The other dtypes differ in element size and in the conversion of
#: gradients: the variant with the most state and the two logsumexp kernels stand for the rest. All
#: are of the first loss of each driver and, on request, in bfloat16 of every loss. Where dtypes
#: differ, no architecture does anything of its own (float16 has bfloat16's tensor-core instructions
#: and registers, float32 runs on ordinary multiplications): one architecture stands for all.
VARIANTS = {
    "bfloat16": (
        "batch",
        "batch losses",
        "batch weights",
        "memory",
        "classes",
        "filtered batch",
        "filtered classes",
        "centered classes",
    ),
    "float16": ("batch", "classes", "filtered batch", "filtered classes", "centered classes"),
    "float32": ("batch", "classes", "filtered batch", "filtered classes", "centered classes"),
}


def dtypes(architecture: int) -> list[str]:
    return list(VARIANTS) if architecture == 90 else ["bfloat16"]


def record(chip: Chip, names: Iterable[str], every: bool = False) -> Tape:
    """Launches of all variants of some dtypes; sections are "dtype, variant".

    ``every``: of every loss in bfloat16; else the first of each driver stands for all.
    """
    # Labels are not read: the driver may not wait for which rows have positives.
    possible = patch.object(
        logsumexp_pairs, "_possible_positives", lambda call, engine, operands: (operands, None)
    )
    # The same kernels: a small batch has tiles beside the diagonal too.
    small = patch.object(TritonEngine, "sum_block", (BLOCK, BLOCK))
    with possible, small, fake_device(chip) as device, device.recording() as tape:
        for name in names:
            dtype = getattr(torch, name)
            for variant in VARIANTS[name]:
                with device.section(f"{name}, {variant}"):
                    for call in _calls(variant, dtype, every and dtype == torch.bfloat16):
                        _run(call, variant)
            with device.section(f"{name}, beside tiles"):
                _beside_tiles(dtype)
            with device.section(f"{name}, largest counts"):
                for call in _largest(dtype):
                    passes.forward(call, gradients=False)
    return tape


def _calls(variant: str, dtype: torch.dtype, every: bool) -> Iterator[Call]:
    seen = set()
    own = [custom.spec(policy()) for policy in POLICIES]
    own += [custom.per_column(spec) for spec in own if spec.threshold == "scalar"]
    # Thresholds per column are the most state.
    specs = sorted([*REGISTRY.values(), *own], key=lambda spec: spec.threshold != "per_column")
    for spec in specs:
        # Of the others, the first of a driver and kind of threshold stands for all.
        kind: tuple[object, ...] = (spec.reduction, spec.topology, spec.threshold)
        # Kernels of the rows are generated from those that read variables.
        kind += (any(v.streamed for v in spec.variables), bool(spec.variables))
        if variant == "centered classes":
            # Formulas are those of one center.
            kind = (spec.reduction, spec.topology)
        elif every:
            kind = (spec.name,)
        if (spec.topology == "class") == variant.endswith("classes") and kind not in seen:
            seen.add(kind)
            call = _call(spec, dtype, variant.endswith(("classes", "memory")))
            if variant.startswith("filtered"):
                call = dataclasses.replace(call, skip_tolerance=1e-4, cache=ForwardCache())
            elif variant.startswith("centered"):
                call = dataclasses.replace(call, centers=2)
            yield call


def _run(call: Call, variant: str) -> None:
    weights = torch.empty(ROWS, device="cuda")
    if variant == "batch losses":
        passes.forward(call, gradients=False)
    elif variant == "batch weights":
        # Other reductions have weights in every backward pass.
        if call.spec.reduction == "sum":
            passes.backward(call, torch.empty(0, device="cuda"), weights)
    else:
        result = passes.forward(call, gradients=True)
        if result.state is not None:
            passes.backward(call, result.state, weights)


def _beside_tiles(dtype: torch.dtype) -> None:
    """Statistics and draws of modules, and factors of float16 tiles."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    sums = norms.norm_sums(empty(ROWS, SIZE, dtype=dtype), empty(ROWS, dtype=torch.int64), 0.1, 9.0)
    norms.moved_statistics(sums, empty(), empty(), 0.1)
    draws.centered(0, empty(dtype=torch.int64), 0, ROWS)
    for policy in POLICIES:
        spec = custom.spec(policy())
        streamed = [variable.side for variable in spec.variables if variable.streamed]
        if not streamed:
            continue
        classes = spec.topology == "class"
        space = Workspace(call := _call(spec, torch.float16, classes), shipped_config(call))
        scalars, rows, columns = map(streamed.count, ("scalar", "row", "column"))
        values = TileVariables(empty(scalars), empty(rows, ROWS), empty(columns, call.num_columns))
        if not classes:
            values = values._replace(b_rows=values.a_rows, a_columns=values.b_columns)
        threshold = call.threshold if spec.threshold != "none" else None
        set_scale(space, 2, values, (threshold, threshold), empty(ROWS) if classes else None)


def _largest(dtype: torch.dtype) -> Iterator[Call]:
    """Counts decide the size of tiles: the largest, too."""
    for spec in REGISTRY.values():
        largest = {p.name: p.maximum for p in spec.parameters if p.integer}
        if largest:
            params = spec.pack(spec.defaults() | largest)
            yield dataclasses.replace(_call(spec, dtype, True), params=params)


def _call(spec: LossSpec, dtype: torch.dtype, with_columns: bool) -> Call:
    def vectors(count: int) -> torch.Tensor:
        return torch.empty(count, SIZE, dtype=dtype, device="cuda")

    def labels(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64, device="cuda")

    labeled = spec.topology == "pair" and with_columns
    columns = COLUMNS if with_columns else ROWS
    thresholds = columns if spec.threshold == "per_column" else 1
    sizes = {"scalar": 1, "row": ROWS, "column": columns}
    given = sum(sizes[variable.side] for variable in spec.variables if variable.given)
    return Call(
        spec,
        spec.pack(spec.defaults()),
        "mean",
        "triton",
        dtype,
        rows=vectors(ROWS),
        row_labels=labels(ROWS),
        columns=vectors(COLUMNS) if with_columns else None,
        column_labels=labels(COLUMNS) if labeled else None,
        self_offset=None if with_columns else 0,
        threshold=None if spec.threshold == "none" else torch.empty(thresholds, device="cuda"),
        variables=torch.empty(given, device="cuda") if given else None,
        need_rows=True,
        need_columns=True,
        need_threshold=True,
        need_variables=bool(given),
    )
