"""Host time of a step with stubbed launches: what Python and Torch's dispatcher take.

The fake device cannot time itself, as fake tensors cost a hundred times what real ones do. So the
step is timed on small tensors of the CPU that report CUDA as their device, with tiles that are
smaller in the same proportion: the same tiles, operators and launches, in the same order, on hardly
any numbers. Kernels of the package are not launched, and mixed-precision matmuls, which the CPU
does not have, are one operator on their result.

Not in it, to be added for each launch: the driver, the launcher of Triton, and what the library's
matmuls decide on the host. A few tenths of a microsecond too much for each tensor that is created
(the device's name has to be changed).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from unitsface_kernels.backends.native import loader
from unitsface_kernels.backends.native.cuda_engine import LEAST_ROWS, CudaEngine
from unitsface_kernels.backends.triton.engine import TritonEngine
from unitsface_kernels.optim import optimizers

from . import cuda
from .chips import H200, Chip
from .device import fake_device, package_patches
from .launches import KERNELS, WORKSPACES
from .records import Tape
from .steps import Build

ENGINES = (TritonEngine, CudaEngine)
BLOCKS = ("sum_block", "class_block")
#: Rows or columns of the smallest tile that is timed, and features of a row.
SMALLEST, WIDTH = 32, 64


@dataclass(frozen=True)
class HostTime:
    """Host time of a step, in seconds of its thread on a processor: others on it do not count.

    Attributes:
        seconds: median over the repeats.
        fastest: of the repeats; on a busy machine closer to the time of an idle one.
        repeats: their number.
        tape: of the step in its true size.
    """

    seconds: float
    fastest: float
    repeats: int
    tape: Tape = field(repr=False)


def host_time(
    build: Build,
    rows: int,
    columns: int,
    size: int = 512,
    *,
    chip: Chip = H200,
    repeats: int = 20,
) -> HostTime:
    """Times a step of ``rows`` against ``columns`` (0: in-batch) of ``size`` features."""
    times = []
    with small_step(build, (rows, columns, size), chip) as (step, tape):
        for _ in range(repeats):
            start = time.thread_time()
            step()
            times.append(time.thread_time() - start)
    return HostTime(statistics.median(times), min(times), repeats, tape)


@contextmanager
def small_step(
    build: Build, shape: tuple[int, int, int], chip: Chip
) -> Iterator[tuple[Callable[[], object], Tape]]:
    """Yields a step of ``shape`` on small tensors, run three times, and its tape in true size."""
    rows, columns, size = shape
    tape, blocks = _recorded(build, shape, chip)
    heights = [min(height, rows) for height, _ in blocks]
    widths = [min(width, columns or rows) for _, width in blocks]
    by_rows = max(min(heights, default=SMALLEST) / SMALLEST, 1.0)
    by_columns = max(min(widths, default=SMALLEST) / SMALLEST, 1.0)
    if not columns:
        by_columns = by_rows
    small = ceil(rows / by_rows), ceil(columns / by_columns), min(size, WIDTH)
    with _posing(chip, (by_rows, by_columns), shape) as launched:
        step = build(*small)
        for _ in range(3):
            launched.clear()
            step()
        want = [work.name for work in tape.of("triton", "native")]
        if launched != want:
            raise RuntimeError(
                f"small tensors take {len(launched)} launches, the true ones {len(want)}"
            )
        yield step, tape


def _recorded(
    build: Build, shape: tuple[int, int, int], chip: Chip
) -> tuple[Tape, list[tuple[int, int]]]:
    """The tape of the step, and the blocks of its tiles."""
    blocks: list[tuple[int, int]] = []

    def watched(original: property) -> property:
        def block(engine: Any) -> tuple[int, int]:
            found = original.fget(engine)  # type: ignore[misc]
            blocks.append(found)
            return found

        return property(block)

    with fake_device(chip) as device, _blocks(watched):
        step = build(*shape)
        step()
        with device.recording() as tape:
            step()
    return tape, blocks


@contextmanager
def _blocks(replacement: Callable[[property], property]) -> Iterator[None]:
    """Replaces the sizes of tiles of all engines."""
    with ExitStack() as stack:
        for engine in ENGINES:
            for name in BLOCKS:
                found = engine.__dict__[name]
                if isinstance(found, cached_property):
                    found = property(found.func)
                elif not isinstance(found, property):
                    found = property(lambda _, constant=found: constant)
                stack.enter_context(mock.patch.object(engine, name, replacement(found)))
        yield


@contextmanager
def _posing(
    chip: Chip, by: tuple[float, float], shape: tuple[int, int, int]
) -> Iterator[list[str]]:
    """Tensors of the CPU are on CUDA, launches do nothing, and tiles are smaller.

    Yields:
        The names of kernels, as they are launched.
    """
    launched: list[str] = []

    def run_triton(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        if programs > 0:
            launched.append(kernel.fn.__name__)

    def scaled(original: property) -> property:
        # The sizes of the true step, which depend on its shape.
        known: dict[str, tuple[int, int]] = {}

        def block(engine: Any) -> tuple[int, int]:
            key = _stage(engine)
            if key not in known:
                with _true_shape(engine, shape, by[1]):
                    height, width = original.fget(engine)  # type: ignore[misc]
                known[key] = max(int(height / by[0]), 1), max(int(width / by[1]), 1)
            return known[key]

        return property(block)

    with ExitStack() as stack:

        def patch(target: Any, **attributes: Any) -> None:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(target, name, value, create=True))

        patch(torch.cuda, **cuda.attributes(chip, _NOTHING, capturing=False))
        patch(Tensor, is_cuda=True, is_cpu=False, device=cuda.DEVICE)
        patch(Tensor, to=_to_host(Tensor.to))
        patch(torch, **{name: _on_host(getattr(torch, name)) for name in FACTORIES})
        # What kernels would have written are indices, too.
        patch(torch, empty=_on_host(torch.zeros), empty_like=torch.zeros_like)
        patch(Tensor, new_empty=Tensor.new_zeros)
        patch(torch, mm=_mm(torch.mm), addmm=_addmm(torch.addmm))
        if shape[1] * shape[2] >= optimizers.LARGE:
            patch(optimizers, LARGE=1)
        package_patches(patch, _Silent(loader.extension(), launched), run_triton)
        stack.enter_context(_blocks(scaled))
        stack.enter_context(cuda.on_stream(cuda.Stream()))
        yield launched


def _stage(engine: Any) -> str:
    return f"{type(engine).__name__} {getattr(engine, '_gradients', None)}"


@contextmanager
def _true_shape(engine: Any, shape: tuple[int, int, int], by: float) -> Iterator[None]:
    """The engine's call has rows and columns of the true sizes, which its tiles depend on."""
    rows, _, size = shape
    call = getattr(engine, "_call", None)
    if call is None:
        with mock.patch.object(engine, "_rows", min(rows, LEAST_ROWS)):
            yield
        return
    one = torch.empty(1, dtype=call.rows.dtype)
    posed, columns = {"rows": one.expand(rows, size)}, round(call.num_columns * by)
    if call.column_index is not None:
        posed["column_index"] = one.expand(columns)
    elif call.columns is not None:
        posed["columns"] = one.expand(columns * call.centers, size)
    with mock.patch.dict(call.__dict__, posed):
        yield


class _NoRecorder:
    """Stands in for a recorder: nothing is recorded, and nothing waited for."""

    memory = mock.Mock(live=0)

    def add(self, kind: str, name: str, **fields: Any) -> None: ...

    def wait(self, name: str, *args: Any) -> None: ...


_NOTHING: Any = _NoRecorder()

FACTORIES = ("zeros", "ones", "full", "arange", "tensor")


def _on_host(original: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return create


def _to_host(original: Any) -> Any:
    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], (str, torch.device)):
            args = args[1:]
        kwargs.pop("device", None)
        return original(tensor, *args, **kwargs) if args or kwargs else tensor

    return to


def _mm(original: Any) -> Any:
    def mm(left: Tensor, right: Tensor, out_dtype: Any = None, *, out: Any = None) -> Tensor:
        if out_dtype is None:
            return original(left, right) if out is None else original(left, right, out=out)
        if out is None:
            return torch.zeros(left.shape[0], right.shape[1], dtype=out_dtype)
        return out.zero_()

    return mm


def _addmm(original: Any) -> Any:
    def addmm(total: Tensor, left: Tensor, right: Tensor, out_dtype: Any = None, **options: Any):
        if out_dtype is None:
            return original(total, left, right, **options)
        return options.get("out", total).zero_()

    return addmm


class _Silent:
    """Stands in for the extension: checks argument structs; kernels do nothing."""

    NO_DIAGONAL = -(2**63)

    def __init__(self, real: Any, launched: list[str]) -> None:
        self._real = real

        def kernel(name: str) -> Callable[..., None]:
            return lambda *arguments: launched.append(name)

        class Silent:
            pass

        self.cuda: Any = Silent()
        for name in KERNELS:
            setattr(self.cuda, name, kernel(name))
        for name, function in WORKSPACES.items():
            setattr(self.cuda, f"{name}_workspace", function)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Cuda"):
            found = _with_room(getattr(self._real, "Cpu" + name.removeprefix("Cuda")))
        else:
            found = getattr(self._real, name)
        setattr(self, name, found)
        return found


def _with_room(struct: Any) -> Any:
    """The CPU's struct, which has the same fields and takes sums in float64."""

    def construct(**values: Any) -> Any:
        for name, value in values.items():
            if type(value) is tuple:
                values[name] = value[0], 2 * value[1]
        return struct(**values)

    return construct
