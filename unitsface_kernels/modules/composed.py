"""Base of the modules over a class loss of the registry."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .. import validate
from .bce import UCELoss
from .class_loss import ShardableLoss
from .margin_softmax import MarginSoftmaxLoss


class ComposedLoss(ShardableLoss):
    """A module over a class loss ``head``; it shares the head's scale and class weights.

    Args:
        base: name of the head.
        embedding_size: D.
        num_classes: C.
        options: the head's.
    """

    #: Classes of the head, by name.
    _heads: ClassVar[dict[str, type[MarginSoftmaxLoss] | type[UCELoss]]]
    #: Attributes in the module's text, in order.
    _shown: tuple[str, ...]
    base: str
    num_classes: int
    reduction: str
    backend: str
    skip_tolerance: float
    head: Any  # MarginSoftmaxLoss | UCELoss, as the subclass narrows it.

    def __init__(self, base: str, embedding_size: int, num_classes: int, **options: Any) -> None:
        super().__init__()
        validate.choice("base", base, tuple(self._heads))
        self.base = base
        self.head = self._heads[base](embedding_size, num_classes, **options)
        self.num_classes = num_classes
        self.reduction, self.backend = options["reduction"], options["backend"]
        self.skip_tolerance = options["skip_tolerance"]

    @property
    def scale(self) -> float | Tensor:
        return self.head.scale

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def reset_parameters(self) -> None:
        self.head.reset_parameters()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)
