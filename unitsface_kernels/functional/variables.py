"""The variables of a formula as its caller gives them: checks, and one tensor of them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .. import validate
from ..backends.streaming import CallTensors
from ..losses import LossSpec
from ..policy.variable import Variable

#: Tensors or numbers by name.
Variables = Mapping[str, "float | Tensor"]
Gather = Callable[[Tensor], Tensor]


def packed(
    spec: LossSpec,
    given: Variables | None,
    tensors: CallTensors,
    gathers: Mapping[str, Gather] = MappingProxyType({}),
) -> Tensor | None:
    """The given variables of a call as ``CallTensors.variables``, with their graph.

    Those of ignored rows and columns, which may be anything, are 1.

    Args:
        spec: of the loss.
        given: one element for each scalar, (N,) of rows, (M,) of columns (of classes: of all, also
            if some take part only), (K,) of identities; or a number or () tensor, which is the same
            for all.
        tensors: the others of the call; without columns, ``column_labels`` may be those of all
            ranks.
        gathers: by "row" or "column", what makes those of all ranks of this rank's own.

    Raises:
        TypeError, ValueError: a name, type, shape or device that is wrong.
    """
    if not spec.variables and not given:
        return None
    given = given or {}
    wanted = [variable for variable in spec.variables if variable.given]
    names = [variable.name for variable in wanted]
    for name in (*names, *given):
        if name in names and name in given:
            continue
        what = "no value" if name in names else "one"
        loss = spec.name if spec.formula is None else spec.formula.name
        takes = ", ".join(names) or "no variables"
        unknown = [name for name in given if name not in names]
        besides = f", and {', '.join(unknown)}" if what == "no value" and unknown else ""
        raise TypeError(f"{loss} takes {takes}, got {what} for {name}{besides}")
    if not wanted:
        return None
    values = [_of_call(variable, given[variable.name], tensors) for variable in wanted]
    for place, variable in enumerate(wanted):
        if variable.kind in gathers:
            values[place] = gathers[variable.kind](values[place])
    return torch.cat(values)


def with_gradient(spec: LossSpec, given: Variables | None) -> list[str]:
    """Names of the variables that need a gradient."""
    values = {v.name: (given or {}).get(v.name) for v in spec.variables}
    return [name for name, value in values.items() if needs_gradient(value)]


def needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def of_identities(values: Tensor, identity: Tensor) -> Tensor:
    """Values (K,) of identities (M,) of samples, by indexing, whose backward pass is deterministic
    on every device.
    """
    # The backward pass adds up an identity's samples: not in half precision.
    wide = _wide(values)
    if wide.shape[0] == 0:
        # No identity: every label is -1.
        wide = torch.cat([wide, wide.new_zeros(1)])
    # Also where the error for a label out of range comes later, see ``validate.in_range``.
    return wide[identity.to(torch.int64).clamp(0, wide.shape[0] - 1)]


def most_identities(spec: LossSpec, given: Variables | None, known: int | None) -> int | None:
    """How many identities have a value of every variable per identity; ``known``: how many have a
    threshold. None: all have.
    """
    if not spec.variables or spec.topology == "class":
        return known
    values = [(given or {}).get(v.name) for v in spec.variables if v.kind == "identity"]
    counts = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() == 1]
    return min(counts if known is None else [*counts, known], default=None)


def _of_call(variable: Variable, value: float | Tensor, tensors: CallTensors) -> Tensor:
    """A variable as a call has it: one element, or one for each row or column."""
    rows, row_labels, columns, column_labels, column_index, *_ = tensors
    name, side = variable.name, variable.side
    of_classes = columns is not None and column_labels is None
    count = {"scalar": 1, "row": rows.shape[0]}.get(
        side, (rows if columns is None else columns).shape[0]
    )
    if variable.kind == "identity" and column_labels is not None:
        count = column_labels.shape[0]
    if side != "scalar" and isinstance(value, Tensor) and value.numel() == 1:
        value = value.reshape(()).expand(count)
    if variable.kind == "identity" and not of_classes:
        validate.threshold(name, value, rows, per="identity")
    elif side == "scalar":
        validate.threshold(name, value, rows)
    else:
        per = "class" if of_classes and side == "column" else side
        validate.threshold(name, value, rows, per=per, size=count)
    if not isinstance(value, Tensor):
        value = torch.full((count,), float(value), dtype=torch.float32, device=rows.device)
    elif variable.kind == "identity" and not of_classes:
        value = of_identities(value, row_labels if column_labels is None else column_labels)
    value = _wide(value).reshape(-1)
    if side == "row":
        return torch.where(row_labels == -1, 1.0, value)
    if side == "column" and not of_classes:
        labels = row_labels if column_labels is None else column_labels
        if columns is None and variable.kind == "column":
            labels = row_labels
        return torch.where(labels < 0, 1.0, value)
    if side == "column" and column_index is not None:
        return value[column_index.to(torch.int64)]
    return value


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
