"""Modules of losses that have none of their own: the constructor follows from the spec."""

from __future__ import annotations

from inspect import Parameter, Signature
from inspect import signature as signature_of
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..losses import LossSpec
from .class_loss import RegisteredClassLoss
from .pair import RegisteredPairLoss
from .registered import SETTINGS


class _DerivedClassLoss(RegisteredClassLoss):
    """Variables of the formula are arguments of every call."""

    def forward(  # type: ignore[override]
        self,
        feats: Tensor,
        labels: Tensor,
        class_index: Tensor | None = None,
        **variables: float | Tensor,
    ) -> Tensor:
        return self.compare(feats, self.weight, labels, class_index=class_index, **variables)


class _DerivedPairLoss(RegisteredPairLoss):
    """Thresholds start at 0; one per identity if the loss has one per column. Variables of the
    formula are arguments of every call.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        if self.spec.threshold != "none":
            shape = (given["num_identities"],) if self.spec.threshold == "per_column" else ()
            self.threshold = nn.Parameter(torch.zeros(shape))

    def forward(  # type: ignore[override]
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
        batch_offset: int | None = None,
        **variables: float | Tensor,
    ) -> Tensor:
        return self._compare(feats, labels, memory, memory_labels, batch_offset, **variables)


def module_of(spec: LossSpec) -> type[RegisteredClassLoss] | type[RegisteredPairLoss]:
    """The module of a loss, ``PairSoftmaxLoss`` for ``pair_softmax``.

    Its arguments: embedding_size and num_classes of a loss over classes, num_identities of a loss
    with a threshold per identity, the loss's parameters, and the settings of its function; for
    classes init_std, as of ``MarginSoftmaxLoss``.
    """
    known = signature_of(getattr(functional, spec.function)).parameters
    options = {n: known[n].default for n in (*spec.defaults(), *SETTINGS) if n in known}
    base: type[RegisteredClassLoss] | type[RegisteredPairLoss] = _DerivedPairLoss
    sizes = ["num_identities"] if spec.threshold == "per_column" else []
    if spec.topology == "class":
        base, sizes = _DerivedClassLoss, ["embedding_size", "num_classes"]
        options = {name: value for name, value in options.items() if name != "centers"}
        options |= {"init_std": None, "centers": 1}
    signature = Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *sizes)]
        + [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value)
            for name, value in options.items()
        ]
    )

    def __init__(*arguments: Any, **keywords: Any) -> None:  # noqa: N807
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        given = dict(bound.arguments)
        base.__init__(given.pop("self"), given)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    name = "".join(word.capitalize() for word in spec.name.split("_")) + "Loss"
    members = {
        "__init__": __init__,
        # The package, which has it as an attribute: it is pickled by this name.
        "__module__": __package__,
        "__doc__": f"The loss ``{spec.name}``; see :func:`{spec.function}`.",
        "loss": spec.name,
    }
    return type(name, (base,), members)
