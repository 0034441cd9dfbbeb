"""Debug mode, ``UNITSFACE_CHECK=1``: operands of a call that are not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call, thresholds_in_use
from .tiles import blocks
from .values import across_ranks

#: Rows of an operand that are read at once.
CHUNK = 4096
#: Rows that an error lists.
LISTED = 4


def check_operands(call: Call, weights: Tensor | None) -> None:
    """An error that names the first operand that is not finite; waits for the device.

    Args:
        weights: (num_losses,) upstream gradients, or None.

    Raises:
        FloatingPointError: with the rows or entries, in one line.
    """
    name, valid = call.spec.name, ~call.ignored
    _check_rows(name, "features", call.rows, valid, None)
    if call.columns is not None:
        classes = call.spec.topology == "class"
        taken = None if call.column_labels is None else call.column_labels >= 0
        tower = "features of the second tower" if call.both else "memory"
        columns = "class weights" if classes else tower
        _check_rows(name, columns, call.columns, taken, call.vector_index)
    thresholds = thresholds_in_use(call)
    if thresholds is not None:
        _check_vector(name, "thresholds", thresholds)
    for variable, values in _given_variables(call):
        _check_vector(name, f"values of {variable}", values)
    if weights is not None:
        of_losses = call.labels_of_losses != -1
        _check_vector(name, "upstream gradients", torch.where(of_losses, weights, 0.0))


def _given_variables(call: Call) -> Iterator[tuple[str, Tensor]]:
    """The variables that a call was given, by name, each as a vector."""
    if call.variables is None:
        return
    width = call.num_columns
    sizes = {"scalar": 1, "row": width if across_ranks(call) else len(call.rows), "column": width}
    given = [variable for variable in call.spec.variables if variable.given]
    parts = call.variables.split([sizes[variable.side] for variable in given])
    for variable, values in zip(given, parts, strict=True):
        yield variable.name, values


def _check_rows(
    loss: str, operand: str, source: Tensor, valid: Tensor | None, index: Tensor | None
) -> None:
    """Rows of ``source``, of ``source[index]``, that are ``valid``, if given."""
    bad = []
    for chunk in blocks(0, len(source if index is None else index), CHUNK):
        rows = source[chunk] if index is None else source[index[chunk]]
        finite = rows.isfinite().all(dim=1)
        bad.append(~finite if valid is None else ~finite & valid[chunk])
    places = torch.cat(bad).nonzero().flatten() if bad else source.new_empty(0)
    if len(places):
        numbers = places if index is None else index[places]
        norms = norms_of(source[numbers[:LISTED]]).tolist()
        listed = [f"{n} (norm {v:g})" for n, v in zip(numbers.tolist(), norms, strict=False)]
        raise _of_operand(loss, operand, "rows", listed, len(places))


def _check_vector(loss: str, operand: str, values: Tensor) -> None:
    places = (~values.isfinite()).nonzero().flatten().tolist()
    if places:
        listed = [f"{i} ({values[i].item():g})" for i in places[:LISTED]]
        raise _of_operand(loss, operand, "entries", listed, len(places))


def _of_operand(
    loss: str, operand: str, kind: str, listed: list[str], count: int
) -> FloatingPointError:
    more = f" and {count - LISTED} more" if count > LISTED else ""
    return FloatingPointError(
        f"loss {loss}, stage operands: {operand} are not finite in {kind} {', '.join(listed)}{more}"
    )


def norms_of(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.to(torch.float64), dim=1)
