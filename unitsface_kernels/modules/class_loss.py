"""What class losses have in common: class weights, and what a sharding module asks of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import validate
from ..losses import LossSpec


@dataclass(frozen=True)
class Comparison:
    """Rows against one matrix of class rows by one loss of the registry.

    Attributes:
        spec: the loss.
        values: its hyper-parameters.
        columns: (C, D) class rows, or a shard of them.
        threshold: () or (C,) learnable threshold, or None.
        share: factor of this loss in the module's.
    """

    spec: LossSpec
    values: dict[str, float | str]
    columns: Tensor
    threshold: Tensor | None
    share: float = 1.0


class ShardableLoss(nn.Module):
    """A class loss that tells :class:`PartialFC` what it compares.

    Its tensors whose first axis is the class are sharded, all others are the same on every rank.
    """

    #: Name in the registry of losses, or of the composition.
    loss: str
    reduction: str
    backend: str
    skip_tolerance: float = 0.0
    num_classes: int
    #: Share of the classes that a training step compares with, for initial thresholds.
    sample_rate: float = 1.0
    #: Names of per-class tensors that start random.
    random_rows: tuple[str, ...] = ()

    def comparisons(self) -> list[Comparison]:
        raise NotImplementedError

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        """Initial rows of the random tensor ``name``, from standard normal ones."""
        raise NotImplementedError

    def reset_thresholds(self) -> None:
        """Initial values of what is not random; of all C classes, whatever the shard."""

    def begin_step(self, feats: Tensor, labels: Tensor) -> None:
        """Before the comparisons of a training step.

        Args:
            feats: (N, D) features of all ranks.
            labels: (N,) rows of the per-class tensors, below 0: ignored or in another shard.
        """

    def end_step(self, feats: Tensor, labels: Tensor) -> None:
        """After them, with the same arguments."""


class ClassLoss(ShardableLoss):
    """A (C, D) parameter ``weight`` and the shape of the problem.

    ``init_std`` is the standard deviation of the initial weights, None: ``default_std``.
    """

    random_rows = ("weight",)

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        reduction: str,
        backend: str,
        default_std: float,
        init_std: float | None,
        skip_tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("num_classes", num_classes)
        if init_std is not None:
            validate.number("init_std", init_std, above=0.0)
        self.num_classes = num_classes
        self.reduction = reduction
        self.backend = backend
        self.skip_tolerance = skip_tolerance
        self.init_std = default_std if init_std is None else init_std
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        return normal * self.init_std

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        self.reset_thresholds()
