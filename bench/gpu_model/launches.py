"""Launches of Triton kernels as the fake device records them, to be compiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITCallable, JITFunction

from unitsface_kernels.backends.triton import launch

from ..fake_device import Array, Work

#: Addresses and sizes are specialized to divisibility by this.
ALIGNMENT = 16
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Pointer:
    """All that a launch's specialization looks at in a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


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

    @classmethod
    def of(cls, work: Work) -> Launch:
        args = (
            Pointer(value.dtype, value.address % ALIGNMENT) if isinstance(value, Array) else value
            for value in work.arguments.values()
        )
        return cls(work.section, work.call, work.programs, tuple(args), work.options)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments by parameter of the kernel."""
        taken = {k: v for k, v in self.options.items() if k in self.kernel.signature.parameters}
        bound = self.kernel.signature.bind(*self.args, **taken)
        bound.apply_defaults()
        return dict(bound.arguments)

    @property
    def dtypes(self) -> str:
        """Dtypes of the floating-point tensors in order of the arguments, without repetition."""
        found = [str(a.dtype)[6:] for a in self.args if isinstance(a, Pointer)]
        return " ".join(name for name, _ in groupby(SHORT[n] for n in found if n in SHORT))

    @property
    def variant(self) -> str:
        """What the kernel is specialized to, but for its configuration and sizes."""
        words, missing = [], []
        for name, value in self.arguments.items():
            if isinstance(value, JITCallable):
                words.append(f"{value.__module__.rpartition('.')[2]}.{value.__name__}")
            elif value is True:
                words.append(name)
            elif value is None:
                missing.append(f"-{name}")
        return " ".join(filter(None, [self.dtypes, *words, *missing]))

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        """Equal for launches of the same compiled kernel, by their arguments."""
        arguments = self.arguments
        for parameter in self.kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                special = ()
                if not parameter.do_not_specialize:
                    special = (value == 1, value % ALIGNMENT == 0)
                arguments[parameter.name] = (value.bit_length() < 32, *special)
            elif isinstance(value, Pointer) and parameter.do_not_specialize_on_alignment:
                arguments[parameter.name] = value.dtype
        return self.kernel, tuple(arguments.items()), tuple(sorted(self.options.items()))

    @cached_property
    def options_of_launch(self) -> dict[str, Any]:
        """All options that Triton gets: those of the call, and those that every launch has."""
        options = lambda kernel, *args, **options: options  # noqa: E731
        # Not the way of a launch that was made before.
        with patch.object(JITFunction, "run", options), patch.dict(launch._ready, clear=True):
            found = launch.run(self.kernel, self.programs, *self.args, **self.options)
        return found | {"warmup": True}

    def compile(self) -> Any:
        """What Triton compiles for the active driver's target."""
        return JITFunction.run(self.kernel, *self.args, **self.options_of_launch)
