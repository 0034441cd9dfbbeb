"""Variables of a policy's formula over the rows of all ranks and the classes of a shard."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...backends.streaming import CallTensors
from ...functional import variables as given_ones
from ...losses import LossSpec
from ...modules.class_loss import ShardableLoss
from ...modules.custom import ClassLoss
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
        variables: those of the own rows.
        step: of which rows of all ranks are gathered; None: none are, as for checks.
    """
    kept = loss.variables() if isinstance(loss, ClassLoss) else {}
    given = {**kept, **variables}
    gathers = {}
    if step is not None and world_size(step.group) > 1:
        gathers = {"row": partial(gathered, counts=step.counts, group=step.group)}
    return given_ones.packed(spec, given, own, gathers)
