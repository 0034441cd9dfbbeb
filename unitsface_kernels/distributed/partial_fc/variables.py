"""Variables of a policy's formula over the rows of all ranks and the classes of a shard."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ... import dispatch
from ...backends.streaming import CallTensors
from ...functional import variables as given_ones
from ...losses import LossSpec
from ...modules.class_loss import ShardableLoss
from ..collectives import world_size
from ..pairs import gathered
from .autograd import Step


def packed(
    loss: ShardableLoss,
    spec: LossSpec,
    own: CallTensors,
    variables: dict[str, Tensor],
    step: Step | None = None,
) -> Tensor | None:
    """``CallTensors.variables`` of a comparison, with their graph.

    Args:
        loss: keeps those of classes, of which it has the shard's, and scalars.
        spec: of the comparison.
        own: rows and labels of this rank, class rows and which of them take part.
        variables: those of the own rows, and others in place of what ``loss`` keeps.
        step: of which rows of all ranks are gathered; None: none are, as for checks.
    """
    given = {**loss.variables(), **variables}
    backend = dispatch.resolve(loss.backend, own.rows.device, own.rows.dtype)
    given_ones.refuse_unsupported(spec, given, backend)
    gathers = {}
    if step is not None and world_size(step.group) > 1:
        gathers = {"row": partial(gathered, counts=step.counts, group=step.group)}
    return given_ones.packed(spec, given, own, gathers)
