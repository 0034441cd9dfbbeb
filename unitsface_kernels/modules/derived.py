"""Modules of losses that have none of their own: the constructor follows from the spec."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import LossSpec
from .class_loss import ClassLoss
from .pair import PairLoss

_SETTINGS: dict[str, Any] = {"reduction": "mean", "backend": "auto", "skip_tolerance": 0.0}


class _DerivedClassLoss(ClassLoss):
    """Thresholds start at 0."""

    def reset_thresholds(self) -> None:
        threshold = self._threshold()
        if threshold is not None:
            nn.init.zeros_(threshold)


class _DerivedPairLoss(PairLoss):
    """Thresholds start at 0; one per identity if the loss has one per column."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        if self.spec.threshold != "none":
            shape = (given["num_identities"],) if self.spec.threshold == "per_column" else ()
            self.threshold = nn.Parameter(torch.zeros(shape))

    def _thresholds(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {} if self.spec.threshold == "none" else {"b": self.threshold}


def module_of(spec: LossSpec) -> type[ClassLoss] | type[PairLoss]:
    """The module of a loss, ``PairSoftmaxLoss`` for ``pair_softmax``.

    Its arguments: embedding_size and num_classes of a loss over classes, num_identities of a loss
    with a threshold per identity, the loss's parameters, and the settings of its function; for
    classes init_std, as of ``MarginSoftmaxLoss``.
    """
    options = {**spec.defaults(), **_SETTINGS}
    sizes = ["embedding_size", "num_classes"]
    base: type[ClassLoss] | type[PairLoss] = _DerivedClassLoss
    if spec.topology == "class":
        options["init_std"] = None
    else:
        base, sizes = _DerivedPairLoss, []
        options |= {"group": None, "exchange": "auto"}
        if spec.threshold == "per_column":
            sizes = ["num_identities"]
    signature = Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in sizes]
        + [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value)
            for name, value in options.items()
        ]
    )

    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:  # noqa: N807
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        base.__init__(self, bound.arguments)

    name = "".join(word.capitalize() for word in spec.name.split("_")) + "Loss"
    members = {
        "__init__": __init__,
        "__signature__": signature,
        "__module__": __name__,
        "__doc__": f"The loss ``{spec.name}``; see :func:`{spec.function}`.",
        "loss": spec.name,
    }
    return type(name, (base,), members)
