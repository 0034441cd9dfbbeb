"""Launches of the package's kernels, recorded instead of made."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .cuda import Stream
from .recorder import Recorder
from .records import Array

# --- Triton ---------------------------------------------------------------------------------------


@cache
def parameters(kernel: Any) -> tuple[str, ...]:
    """Names of the parameters of a Triton kernel, compiled or interpreted."""
    return tuple(inspect.signature(kernel.fn).parameters)


class TritonLaunches:
    """Stands in for ``backends.triton.launch.run``."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        if programs <= 0:
            return
        array = self._recorder.memory.array
        named = {
            name: array(value) if isinstance(value, FakeTensor) else value
            for name, value in zip(parameters(kernel), args, strict=False)
        }
        tensors = tuple(value for value in named.values() if isinstance(value, Array))
        name = kernel.fn.__name__
        self._recorder.add(
            "triton",
            name,
            reads=tensors,
            writes=_changed(name, named),
            bytes=sum(_bytes(one, named) for one in (*named, *_CHANGED.get(name, ()))),
            programs=programs,
            arguments=named,
            options=options,
            call=kernel,
        )


#: Arguments that a kernel reads and writes, by kernel.
_CHANGED = {
    "update_rows_kernel": ("source", "first", "second"),
    "update_rows": ("weight", "first", "second"),
}


def _changed(kernel: str, arguments: dict[str, Any]) -> tuple[Array, ...]:
    found = (arguments.get(name) for name in _CHANGED.get(kernel, ()))
    return tuple(value for value in found if isinstance(value, Array))


def _bytes(name: str, arguments: dict[str, Any]) -> int:
    """Bytes of an argument; a matrix of which only some rows are read counts these rows."""
    value = arguments.get(name)
    if not isinstance(value, Array):
        return 0
    count, width = arguments.get("count"), arguments.get("width")
    some = name in ("source", "first", "second")
    if some and isinstance(count, int) and isinstance(width, int):
        return min(count * width * value.dtype.itemsize, value.nbytes)
    return value.nbytes


# --- the extension --------------------------------------------------------------------------------

# As in csrc/cuda: sizes from which the floats of a kernel's partial sums follow. A test compares
# them with the emulation.
LANES, SUM_SPAN, SPAN, PAIR_DEPTH, SUM_STEP = 32, 4 * 32, 32 * 32, 32, 4 * 8


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _sum_workspace(n: int, m: int) -> int:
    columns, rows = _blocks(m, SUM_SPAN), 256
    while rows > SUM_STEP and _blocks(n, rows) * columns < 2048:
        rows //= 2
    return 2 * (columns * n + _blocks(n, rows) * m)


def _pair_workspace(n: int, m: int) -> int:
    return 2 * (_blocks(m, SPAN) * n + _blocks(n, PAIR_DEPTH) * m)


WORKSPACES = {
    "sum_tile": _sum_workspace,
    "logsumexp_tile": lambda n, m: 2 * _blocks(m, SPAN) * n,
    "pair_negatives_tile": _pair_workspace,
    "pair_positives_tile": _pair_workspace,
}


def _pair_launches(values: dict[str, Any], optional: str) -> int:
    # Rows, and their partial results; the same of columns, if there are any.
    return 2 if values.get(optional) is None else 4


@dataclass
class Arguments:
    """Arguments of a kernel by name, in place of a struct of the extension."""

    type: str
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


#: Device kernels of one call: those of csrc/cuda/<name>.cu.
LAUNCHES = {
    "sum_tile": lambda v: 2,
    "logsumexp_tile": lambda v: 2,
    "pair_negatives_tile": lambda v: (
        _pair_launches(v, "b_maximum") * (1 + (v.get("a_positive_maximum") is not None))
    ),
    "pair_positives_tile": lambda v: _pair_launches(v, "b_loss"),
}
# Element sizes of pointers; other arguments are given with their bytes.
ELEMENTS = {"targets": 8, "index": 8}


class NativeLaunches:
    """Stands in for the extension: argument types, and kernels in ``cuda``."""

    NO_DIAGONAL = -(2**63)

    def __init__(self, recorder: Recorder, real: Any) -> None:
        self._recorder, self._real = recorder, real
        self.cuda = SimpleNamespace(
            **{name: self._kernel(name) for name in KERNELS},
            **{f"{name}_workspace": function for name, function in WORKSPACES.items()},
            compiled_archs=lambda: "80-real,90-real,100-real",
            device_count=lambda: (1, ""),
        )

    def __getattr__(self, name: str) -> Any:
        if name == "cpu":
            return self._real.cpu

        def construct(**values: Any) -> Any:
            spans = {key: _span(value) for key, value in values.items()}
            # On the CPU it has kernels as well, which need the real ones.
            if any(_is_of_host(value) for value in spans.values()):
                return getattr(self._real, name)(**values)
            return Arguments(name, spans)

        return construct

    def _kernel(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            *given, stream = map(_span, arguments)
            if stream != Stream.current.cuda_stream:
                raise ValueError(f"{name} was given stream {stream:#x}, not the current one")
            values: dict[str, Any] = {}
            for place, argument in enumerate(given):
                if isinstance(argument, Arguments):
                    values.update(argument.values)
                else:
                    values[f"argument {place}"] = argument
            found = {key: self._pointer(value) for key, value in values.items()}
            tensors = tuple(value for value in found.values() if isinstance(value, Array))
            self._recorder.add(
                "native",
                name,
                reads=tensors,
                writes=_changed(name, found),
                bytes=sum(self._bytes(key, found) for key in (*found, *_CHANGED.get(name, ()))),
                launches=LAUNCHES.get(name, lambda v: 1)(values),
                arguments=found,
                options={"given": given},
                call=name,
            )

        return call

    def _pointer(self, value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and value[0]:
            return self._recorder.memory.find(*value)
        return value

    @staticmethod
    def _bytes(name: str, values: dict[str, Any]) -> int:
        value = values.get(name)
        if not isinstance(value, Array):
            return 0
        if name in ("source", "weight", "first", "second"):
            # Some rows of a matrix.
            return math.ceil(value.nbytes * values["n"] / max(values["rows"], 1))
        return value.nbytes


#: Kernels of the extension on CUDA.
KERNELS = (
    "sum_tile",
    "logsumexp_tile",
    "logsumexp_gradient_tile",
    "positive_rows",
    "normalize_rows",
    "normalize_rows_backward",
    "histogram_tile",
    "pair_negatives_tile",
    "pair_positives_tile",
    "pair_gradient_tile",
    "nearest_tile",
    "permuted",
    "update_rows",
)


def _span(value: Any) -> Any:
    """Address and bytes of a tensor, as the extension reads them; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    assert value.is_contiguous()
    return value.data_ptr(), value.nbytes


def _is_of_host(value: Any) -> bool:
    from .memory import FIRST_ADDRESS

    # Addresses of the host's memory lie far above those of the fake device.
    return isinstance(value, tuple) and len(value) == 2 and value[0] >= FIRST_ADDRESS << 8
