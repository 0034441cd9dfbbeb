"""Tensors, numbers and words that functions and modules take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..losses import LossSpec, Parameter
from ..policy.variable import COLUMN_NORM
from .numbers import integer, number, positive_int

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


def is_tensor(name: str, value: object) -> Tensor:
    """A tensor that has a shape and, behind its strides, memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
        raise TypeError(f"{name} must be initialized, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    return value


def features(name: str, value: Tensor, like: Tensor | None = None, other: str = "feats") -> None:
    """A floating (rows, D) matrix, with the width and on the device of ``like``, the ``other``."""
    is_tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (rows, D), got {tuple(value.shape)}")
    if value.dtype not in FEATURE_DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in FEATURE_DTYPES)
        raise TypeError(f"{name} must have dtype {expected}, got {value.dtype}")
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have D >= 1 columns, got shape {tuple(value.shape)}")
    if like is None and value.is_meta:
        raise ValueError(f"{name} must be on a device with memory, got meta")
    if like is not None:
        if value.shape[1] != like.shape[1]:
            raise ValueError(
                f"{name} must have D = {like.shape[1]} columns like {other}, "
                f"got shape {tuple(value.shape)}"
            )
        same_device(other, like, name, value)
        if (value.dtype == torch.float64) != (like.dtype == torch.float64):
            raise TypeError(
                f"{name} and {other} must both be float64 or neither, "
                f"got {value.dtype} and {like.dtype}"
            )


def same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{second} must be on the device of {first} ({a.device}), got {b.device}")


def labels(name: str, value: Tensor, count: int, like: Tensor, counted: str = "feats") -> None:
    """An integer vector with one entry per row of ``counted``."""
    is_tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != count:
        raise ValueError(
            f"{name} must have shape ({count},), one label per row of {counted}, "
            f"got {tuple(value.shape)}"
        )
    same_device("feats", like, name, value)


def class_index(name: str, value: Tensor, weight: Tensor) -> None:
    """An integer vector of rows of ``weight``; its range is checked with the labels'."""
    is_tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have shape (K,), got {tuple(value.shape)}")
    same_device("weight", weight, name, value)


#: A center's number has one byte.
MOST_CENTERS = 256


def centers(value: object, spec: LossSpec | None = None) -> None:
    """Number of vectors of a class, of a loss ``spec``."""
    positive_int("centers", value)
    number("centers", value, at_most=MOST_CENTERS)
    if spec is not None and value != 1 and any(v.name == COLUMN_NORM for v in spec.variables):
        assert spec.formula is not None
        raise ValueError(
            f"centers must be 1 for {spec.formula.name}, which reads the norm of a class's vector: "
            f"of several each row has another one, got {value}"
        )


def threshold(
    name: str, value: object, like: Tensor | None, per: str | None = None, size: int | None = None
) -> None:
    """A float or a one-element tensor; with ``per`` a float or a vector, of ``size`` if given."""
    if isinstance(value, Tensor):
        is_tensor(name, value)
        if value.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{name} must have a floating dtype, got {value.dtype}")
        shape = tuple(value.shape)
        if per is None and value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {shape}")
        if per is not None and (value.dim() != 1 or (size is not None and shape != (size,))):
            expected = "K" if size is None else size
            raise ValueError(f"{name} must have shape ({expected},), one per {per}, got {shape}")
        if like is not None:
            same_device("feats", like, name, value)
    else:
        number(name, value, kind="a float or a torch.Tensor")


def parameters(spec: LossSpec, values: Mapping[str, float | str | Tensor]) -> None:
    """Scalar hyper-parameters: finite numbers within their bounds, tensors of one, known words."""
    for parameter in spec.parameters:
        value = values[parameter.name]
        if isinstance(value, Tensor):
            number_tensor(parameter, value)
            continue
        if parameter.choices:
            choice(parameter.name, value, parameter.choices)
            continue
        if parameter.integer:
            integer(parameter.name, value)
        number(parameter.name, value, *_bounds(parameter))


def number_tensor(parameter: Parameter, value: Tensor, like: Tensor | None = None) -> float | None:
    """A hyper-parameter as a tensor of one element, on the device of ``like``.

    Returns:
        Its value, within the bounds; None where reading it would wait for a device, or be traced.
    """
    name = parameter.name
    if parameter.choices or parameter.integer:
        expected = f"one of {', '.join(parameter.choices)}" if parameter.choices else "an int"
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    threshold(name, value, like)
    if not _readable(value):
        return None
    found = float(value.detach())
    number(name, found, *_bounds(parameter))
    return found


def _bounds(parameter: Parameter) -> tuple[float | None, float | None, float | None]:
    return parameter.minimum, parameter.at_least, parameter.maximum


def _readable(value: Tensor) -> bool:
    """Whether the host has the elements, and no mode but autograd is active."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def memory_pair(
    memory: Tensor | None, memory_labels: Tensor | None, batch_offset: int | None
) -> None:
    if batch_offset is not None:
        integer("batch_offset", batch_offset)
        if memory is None:
            raise ValueError("batch_offset must be given together with memory, got memory=None")
    both_or_none("memory", memory, "memory_labels", memory_labels)


def instance(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        got = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name} must be {expected}, got {got}")


def both_or_none(first: str, a: object, second: str, b: object) -> None:
    if (a is None) != (b is None):
        given, missing = (first, second) if b is None else (second, first)
        raise ValueError(f"{missing} must be given together with {given}, got None")


def width(name: str, value: Tensor, size: int) -> None:
    if value.shape[1] != size:
        raise ValueError(f"{name} must have D = {size} columns, got shape {tuple(value.shape)}")


def process_group(name: str, value: object) -> None:
    """A group that this process is a member of, or None."""
    if value is not None and not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup of which this process is a member, "
            f"or None, got {type(value).__name__}"
        )
