"""Numbers of a loss that are tensors: the loss of a formula in which they are variables."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import validate
from ..losses import LossSpec, custom, find
from .variables import Variables, needs_gradient

Values = dict[str, float | str | Tensor]


def apart(
    spec: LossSpec, values: Values, variables: Variables | None, feats: Tensor
) -> tuple[LossSpec, Values, Variables | None]:
    """The loss, its numbers and its variables, after those numbers that are tensors.

    A tensor of the CPU that needs no gradient is read: the loss is that of the number, with its
    kernels. Any other is a variable of a formula derived from that of the loss.

    Raises:
        TypeError, ValueError: of a tensor, a wrong type, shape, device or, on the CPU, value.
    """
    for value in values.values():
        if isinstance(value, Tensor):
            break
    else:
        return spec, values, variables
    numbers = dict(values)
    tensors: dict[str, Tensor] = {}
    for parameter in spec.parameters:
        value = values[parameter.name]
        if not isinstance(value, Tensor):
            continue
        number = validate.number_tensor(parameter, value, feats)
        if number is None or needs_gradient(value) or _has_tangent(value):
            tensors[parameter.name] = value
            del numbers[parameter.name]
        else:
            numbers[parameter.name] = number
    if tensors:
        spec = named(_with_scalars, spec.name, tuple(tensors))
    return spec, numbers, {**(variables or {}), **tensors} if tensors else variables


def named(name_of: Callable[..., str], *arguments: object) -> LossSpec:
    """The loss whose name ``name_of(*arguments)`` gives, which may make it first."""
    if torch.compiler.is_compiling():
        # A graph may contain the name as a constant, but no object.
        from ..compiled import constant

        return find(constant(name_of, *arguments))
    return find(name_of(*arguments))


def _with_scalars(name: str, numbers: tuple[str, ...]) -> str:
    return custom.with_scalars(find(name), numbers).name


def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None
