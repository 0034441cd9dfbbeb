"""Launches of Triton kernels, recorded in place of being made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITCallable, JITFunction

#: Where allocations begin, and what kernels specialize on.
ALIGNMENT = 16
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Pointer:
    """All that a launch's specialization looks at in a tensor."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        return self.offset


def _argument(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    offset = value.storage_offset() * value.element_size() % ALIGNMENT
    return Pointer(value.dtype, offset)


@dataclass(frozen=True)
class Launch:
    """A launch as the backend makes it.

    Attributes:
        label: of the call that makes it.
        programs: of its grid.
        args, options: what the kernel is called with, tensors as :class:`Pointer`.
    """

    label: str
    kernel: JITFunction
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """By parameter of the kernel."""
        taken = {k: v for k, v in self.options.items() if k in self.kernel.signature.parameters}
        bound = self.kernel.signature.bind(*self.args, **taken)
        bound.apply_defaults()
        return dict(bound.arguments)

    @property
    def dtypes(self) -> str:
        """Of floating-point tensors, in the order of the arguments; equal neighbors once."""
        found = [str(a.dtype)[6:] for a in self.args if isinstance(a, Pointer)]
        return " ".join(name for name, _ in groupby(SHORT[n] for n in found if n in SHORT))

    @property
    def variant(self) -> str:
        """What the kernel is specialized to, but for its configuration."""
        words, missing = [], []
        for name, value in self.arguments.items():
            if isinstance(value, JITCallable):
                words.append(f"{value.__module__.rpartition('.')[2]}.{value.__name__}")
            elif value is True:
                words.append(name)
            elif value is None:
                missing.append(f"-{name}")
        return " ".join([self.dtypes, *words, *missing])

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for launches of the same compiled kernel, as far as the arguments tell."""
        arguments = self.arguments
        for parameter in self.kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                special = () if parameter.do_not_specialize else (value == 1, value % ALIGNMENT)
                arguments[parameter.name] = (value.bit_length() < 32, *special)
        return self.kernel, tuple(arguments.items()), tuple(sorted(self.options.items()))

    def compile(self) -> Any:
        """What Triton compiles for the active driver's target."""
        return self.kernel.run(*self.args, grid=(self.programs,), warmup=True, **self.options)


class Recorder:
    """Launches in the order in which they are made; ``label``: of those to come."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.label = ""

    def add(self, kernel: JITFunction, programs: int, args: Iterable[Any], options: Any) -> None:
        pointers = tuple(map(_argument, args))
        self.launches.append(Launch(self.label, kernel, programs, pointers, options))


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Records the launches inside; none is made, so that results stay unset."""
    recorder = Recorder()

    def run(
        self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> None:
        recorder.add(self, grid[0], args, options)

    with patch.object(JITFunction, "run", run):
        yield recorder
