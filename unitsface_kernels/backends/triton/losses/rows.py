"""Functions of rows and bounds of slopes: generated from a formula at their first use, as few calls
need them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from triton.runtime.jit import KernelInterface

from ....policy.formula import Formula
from .custom import module_of

if TYPE_CHECKING:
    from ....policy.triton_rows import Function


@dataclass(frozen=True)
class Generated:
    """A function that kernels take as a constant, and what it takes from the loss's parameters."""

    function: KernelInterface
    _of: Function

    def constants(self, params: tuple[float, ...]) -> tuple[float, ...]:
        return self._of.constants(params)


@cache
def row_function(formula: Formula) -> Generated:
    """See ``policy.triton_rows.row_function``."""
    from ....policy.triton_rows import row_function

    return _generated(row_function(formula))


@cache
def bound_function(formula: Formula) -> Generated:
    """See ``policy.triton_rows.bound_function``."""
    from ....policy.triton_rows import bound_function

    return _generated(bound_function(formula))


def _generated(function: Function) -> Generated:
    return Generated(getattr(module_of(function.module()), function.name), function)
