"""Variables of a formula over the rows of all ranks and the classes of a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ...backends.streaming import CallTensors
from ...functional import variables as given_ones
from ...functional.numbers import apart
from ...modules.class_loss import Comparison, ShardableLoss
from ..collectives import Group, own_rank, sum_over_ranks, world_size
from ..pairs import gathered
from .autograd import Step


def resolved(
    loss: ShardableLoss, variables: Mapping[str, Tensor], feats: Tensor
) -> list[tuple[Comparison, Mapping[str, float | Tensor]]]:
    """Comparisons of a loss, whose numbers are none of them tensors, and their variables.

    Args:
        loss: its comparisons have those that it keeps: of classes those of the shard, scalars, and
            tensors of numbers.
        variables: those of the own rows.
        feats: of this rank.
    """
    found = []
    for comparison in loss.comparisons():
        given = {**comparison.variables, **variables}
        spec, values, own = apart(comparison.spec, comparison.values, given, feats)
        if spec is not comparison.spec or values is not comparison.values:
            comparison = replace(comparison, spec=spec, values=values)
        found.append((comparison, own or {}))
    return found


def of_step(
    loss: ShardableLoss,
    rows: Tensor,
    local: Tensor,
    index: Tensor | None,
    counts: Sequence[int],
    group: Group,
) -> dict[str, Tensor]:
    """A loss's own variables of this training step: those of rows, of the own ones.

    Args:
        rows, local: of all ranks, see :meth:`ShardableLoss.begin_step`.
        index: rows of the shard that take part; None: all.
        counts: every rank's rows.
    """
    if type(loss).step_variables is ShardableLoss.step_variables:
        return {}
    rank = own_rank(group)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    loss.drawn = index
    try:
        values = loss.step_variables(rows, local, partial(sum_over_ranks, group=group))
    finally:
        loss.drawn = None
    return {name: value[own] if value.dim() else value for name, value in values.items()}


def packed(
    comparison: Comparison,
    own: CallTensors,
    given: Mapping[str, float | Tensor],
    step: Step | None = None,
) -> Tensor | None:
    """``CallTensors.variables`` of a comparison, with their graph.

    Args:
        comparison: a loss and its values.
        own: rows and labels of this rank, class rows and which of them take part.
        given: all variables, see :func:`resolved`.
        step: of which rows of all ranks are gathered; None: none are, as for checks.
    """
    gathers = {}
    if step is not None and world_size(step.group) > 1:
        gathers = {"row": partial(gathered, counts=step.counts, group=step.group)}
    return given_ones.packed(comparison.spec, given, own, gathers)
