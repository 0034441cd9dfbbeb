"""Variables of a formula over the rows of all ranks and the classes of a shard."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ... import dispatch
from ...backends.streaming import CallTensors
from ...functional import variables as given_ones
from ...modules.class_loss import Comparison
from ..collectives import world_size
from ..pairs import gathered
from .autograd import Step


def packed(
    comparison: Comparison,
    backend: str,
    own: CallTensors,
    variables: dict[str, Tensor],
    step: Step | None = None,
) -> Tensor | None:
    """``CallTensors.variables`` of a comparison, with their graph.

    Args:
        comparison: has those that the module keeps: scalars, and of classes those of the shard.
        backend: as asked for.
        own: rows and labels of this rank, class rows and which of them take part.
        variables: those of the own rows.
        step: of which rows of all ranks are gathered; None: none are, as for checks.
    """
    given = {**comparison.variables, **variables}
    backend = dispatch.resolve(backend, own.rows.device, own.rows.dtype)
    given_ones.refuse_unsupported(comparison.spec, given, backend)
    gathers = {}
    if step is not None and world_size(step.group) > 1:
        gathers = {"row": partial(gathered, counts=step.counts, group=step.group)}
    return given_ones.packed(comparison.spec, given, own, gathers)
