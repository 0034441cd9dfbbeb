"""Steps on a fake CUDA device (bench/fake_device), and what every one of them must satisfy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.cases import Case, Problem, build

from bench.fake_device import FakeDevice, Tape, fake_device
from bench.fake_device.operators import is_aligned, refusals
from unitsface_kernels.losses import LossSpec

BACKENDS = ("triton", "native")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Several tiles of every kind.
_BATCH, _COLUMNS = {"rows": 7000, "dim": 64}, {"rows": 4500, "columns": 10_000, "dim": 64}
KINDS = {
    "in-batch": Case("in-batch", topology="pair", **_BATCH),
    "in-batch, none": Case("in-batch, none", topology="pair", reduction="none", **_BATCH),
    "in-batch, sum": Case("in-batch, sum", topology="pair", reduction="sum", **_BATCH),
    "memory": Case("memory", topology="pair", column_gradient=False, **_COLUMNS),
    "memory, none": Case(
        "memory, none", topology="pair", column_gradient=False, reduction="none", **_COLUMNS
    ),
    "memory with gradient": Case("memory with gradient", topology="pair", **_COLUMNS),
    "classes": Case("classes", topology="class", **_COLUMNS),
    "classes, none": Case("classes, none", topology="class", reduction="none", **_COLUMNS),
    "classes, sum": Case("classes, sum", topology="class", reduction="sum", **_COLUMNS),
    "classes without gradient": Case(
        "classes without gradient", topology="class", column_gradient=False, **_COLUMNS
    ),
    "class subset": Case("class subset", topology="class", subset=True, **_COLUMNS),
    "odd sizes": Case("odd sizes", rows=333, columns=415, dim=513),
}


@dataclass(frozen=True)
class Recorded:
    """A step that was recorded, and what it was given."""

    tape: Tape
    problem: Problem
    device: FakeDevice
    stream: int


def record(
    spec: LossSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    capturing: bool = False,
    make: Callable[..., Problem] = build,
) -> Recorded:
    """Forward and backward of a case, the second time that it runs; ``make``: its problem."""
    with fake_device(capturing=capturing) as device:
        problem = make(case, spec, None, dtype, "cuda")
        problem.evaluate(backend)
        leaves = problem.leaves()
        stream = torch.cuda.current_stream().cuda_stream
        with device.recording() as tape:
            loss = problem.loss(backend, **leaves)
            loss.backward(problem.upstream.to(loss.dtype))
    assert all(leaf.grad is not None for leaf in leaves.values())
    return Recorded(tape, problem, device, stream)


def check_matmuls(tape: Tape, aligned: bool = True) -> None:
    """The library takes every matmul as it is; with ``aligned``, in its fast layout."""
    for work, gemm in tape.gemms():
        assert refusals(gemm) == [], f"{work.name} {gemm}"
        # What float32 sums are for: products of 16 bits are never rounded to them.
        assert gemm.out_dtype == torch.float32, f"{work.name} {gemm}"
        if aligned:
            assert is_aligned(gemm), f"{work.name} {gemm}"


def check_streams(tape: Tape, stream: int) -> None:
    """Everything is on the current stream, in the order of the calls."""
    assert stream != 0
    assert {work.stream for work in tape.work} == {stream}
    assert [work.order for work in tape.work] == list(range(len(tape.work)))


#: What a capture of a CUDA graph may hold. Events would have to be of the captured stream, and
#: copies to the host would be made again with every replay, into memory that is not read.
CAPTURABLE = {
    *("triton", "native", "gemm", "copy", "fill", "elementwise", "reduction", "index", "sort")
}


def check_capturable(tape: Tape) -> None:
    for work in tape.work:
        assert work.kind in CAPTURABLE, f"{work.kind} {work.name}"
        assert work.call is not None, work.name


# Tiles, unit columns and partial results, whatever the number of rows and columns. Small matrices
# fit in: that memory does not grow with N x M is a test with larger ones.
TILES = 768 << 20


def allowed_bytes(problem: Problem) -> int:
    """Peak above the inputs: the gradients, a few numbers per feature, and tiles.

    Rows: at unit length, their gradient in float32, that in their dtype, and the same once more
    while it is scaled. Columns: their gradient, of a subset in addition to that of all. Labels,
    losses and statistics: a few hundred bytes for each row and column.
    """
    size = problem.rows.shape[1]
    of_rows = problem.rows.shape[0] * (4 * 4 * (size + 64) + 256)
    of_columns = 0
    if problem.columns is not None:
        of_columns = problem.columns.shape[0] * (3 * 4 * size + 256)
    return of_rows + of_columns + TILES


def of_step(make: Callable[[FakeDevice], Callable[[], object]]) -> Tape:
    """The tape of a step, the second time that it runs."""
    with fake_device() as device:
        step = make(device)
        step()
        with device.recording() as tape:
            step()
    return tape
