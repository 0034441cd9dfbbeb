"""Variables of a formula over the rows of all ranks and the classes of a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from ...backends.streaming import CallTensors
from ...functional import variables as given_ones
from ...functional.numbers import apart
from ...modules.class_loss import Comparison, ShardableLoss
from ..collectives import world_size
from ..pairs import gathered
from .autograd import Step


def resolved(
    loss: ShardableLoss, variables: Mapping[str, Tensor], feats: Tensor
) -> list[tuple[Comparison, Mapping[str, float | Tensor]]]:
    """Comparisons of a loss, whose numbers are none of them tensors, and their variables.

    Args:
        loss: keeps those of classes, of which it has the shard's, scalars, and tensors of numbers.
        variables: those of the own rows.
        feats: of this rank.
    """
    kept = loss.variables()
    found = []
    for comparison in loss.comparisons():
        given = {**kept, **variables}
        spec, values, own = apart(comparison.spec, comparison.values, given, feats)
        found.append((replace(comparison, spec=spec, values=values), own or {}))
    return found


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
