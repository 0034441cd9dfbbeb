"""What a call of sharded classes may be, beside its tensors."""

from __future__ import annotations

from torch import Tensor

from ...modules.class_loss import ShardableLoss
from ...modules.custom import ClassLoss


def formula(loss: ShardableLoss) -> object:
    """A policy's formula and numbers; those of other losses are its name and options."""
    if not isinstance(loss, ClassLoss):
        return None
    values = loss.values().items()
    return loss.spec.name, {n: v for n, v in values if not isinstance(v, Tensor)}


def refuse_reference(backend: str, why: str | None = None) -> None:
    """``why``: the reason for which "auto" is the reference."""
    if backend == "reference":
        raise ValueError(
            "backend must be 'native' or 'triton' for sharded classes, got 'reference', which "
            f"has no shards{'' if why is None else f' ({why})'}"
        )
