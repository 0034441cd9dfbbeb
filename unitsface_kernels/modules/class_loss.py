"""Base of the class losses: class weights, and the interface for sharding them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import validate
from ..backends.reference import normalize_rows
from ..backends.streaming import Mixing
from ..distributed.batch import Batch
from ..losses import LossSpec
from .registered import RegisteredLoss

Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Rows against one matrix of class rows by one loss of the registry.

    A loss over pairs, as Proxy-Anchor, is of the class rows against the rows as samples.

    Attributes:
        spec: the loss.
        values: its hyper-parameters, some of which may be tensors of one element.
        columns: (C, D) class rows, (C, K, D) of K centers each, or a shard of them.
        threshold: () or (C,) learnable threshold, or None.
        share: factor of this loss in the module's.
        variables: of the formula, that the module keeps, by name; or their values before
            those of the batch or the step.
        mixing: what is mixed into the columns, or None.
    """

    spec: LossSpec
    values: dict[str, float | str | Tensor]
    columns: Tensor
    threshold: Tensor | None
    share: float = 1.0
    variables: Mapping[str, float | Tensor] = field(default_factory=dict)
    mixing: Mixing | None = None

    def mixed_columns(self) -> Tensor:
        """The columns with what is mixed into them, as one tensor with its graph; synchronizes with
        the device.
        """
        if self.mixing is None:
            return self.columns
        index = self.mixing.share.nonzero().squeeze(1)
        if index.numel() == 0:
            return self.columns
        rows, share = self.mixing.part(0, len(index), index)
        unit = normalize_rows(self.columns[index])
        mixed = torch.lerp(unit, rows.to(unit.dtype), share[:, None].to(unit.dtype))
        # The loss normalizes all of them.
        return self.columns.index_copy(0, index, mixed)


class ShardableLoss(nn.Module):
    """A class loss as :class:`PartialFC` takes it.

    Its tensors whose first axis is the class are sharded, all others are the same on every rank.
    """

    #: Name in the registry of losses, or of the composition.
    loss: str
    reduction: str
    backend: str
    skip_tolerance: float = 0.0
    num_classes: int
    #: Fraction of the classes in a training step's comparison, for initial thresholds.
    sample_rate: float = 1.0
    #: Names of per-class tensors that start random.
    random_rows: tuple[str, ...] = ()
    #: (K,) rows of the per-class tensors that a sharded training step compares with; None: all.
    drawn: Tensor | None = None

    def comparisons(self) -> list[Comparison]:
        raise NotImplementedError

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        """Initial rows of the random tensor ``name``, from standard normal ones."""
        raise NotImplementedError

    def reset_numbers(self) -> None:
        """Sets numbers of the loss that are tensors to their initial values."""

    def reset_thresholds(self) -> None:
        """Sets thresholds to their initial values, which depend on C, not on the shard."""

    def variables(self) -> dict[str, Any]:
        """What the formula of the comparisons reads beside cosines and thresholds, by name: tensors
        of one element, per class, or numbers.
        """
        return {}

    def step_variables(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        """The :meth:`variables` that have other values in this training step.

        They last beyond it only if :meth:`end_step` follows.

        Args:
            feats, labels: of :meth:`begin_step`, which precedes.
            total: the sum over all shards of a tensor.

        Returns:
            By name () tensors, or (N,) of the rows of all ranks.
        """
        return {}

    def batch_variables(self, batch: Batch) -> dict[str, Tensor]:
        """The :meth:`variables` that follow from the samples of a call, with their graph.

        In training and in evaluation; every rank of the batch makes this call. Gradients are as
        :class:`PartialFC` has them: that of the batch's features is the number of ranks times the
        rank's part.

        Returns:
            By name () tensors, or (n,) of the rank's own rows.
        """
        return {}

    def begin_step(self, feats: Tensor, labels: Tensor) -> None:
        """Called before the comparisons of a training step.

        Args:
            feats: (N, D) features of all ranks.
            labels: (N,) rows of the per-class tensors, below 0: ignored or in another shard.
        """

    def end_step(self, feats: Tensor, labels: Tensor) -> None:
        """Called after the comparisons of a training step, with :meth:`begin_step`'s arguments."""


class FeatureStore(ShardableLoss):
    """A class loss that stores the features of a training step in :meth:`end_step`.

    These may be those of another encoder, a running average of the one that is trained:
    ``forward`` takes them as ``momentum_feats``.
    """


def check_stored(loss: ShardableLoss, feats: Tensor, momentum_feats: Tensor | None) -> None:
    """Features of another encoder that a loss is given to store."""
    if momentum_feats is None:
        return
    if not isinstance(loss, FeatureStore):
        raise ValueError(
            f"momentum_feats must be None, since {type(loss).__name__} stores no features, "
            f"got {type(momentum_feats).__name__}"
        )
    validate.features("feats", feats)
    validate.features("momentum_feats", momentum_feats, like=feats)
    if len(momentum_feats) != len(feats):
        raise ValueError(
            f"momentum_feats must have {len(feats)} rows like feats, got {len(momentum_feats)}"
        )


class RegisteredClassLoss(RegisteredLoss, ShardableLoss):
    """A class loss of the registry with its (C, D) parameter ``weight``, (C, K, D) of several
    centers, and its threshold, if any.

    Args:
        given: arguments of the subclass's constructor by name: embedding_size D, num_classes C,
            the options of :class:`RegisteredLoss`, centers K, and init_std, the standard
            deviation of the initial weights; None: that of :meth:`_default_std`.
    """

    random_rows: tuple[str, ...] = ("weight",)
    num_classes: int
    init_std: float
    weight: nn.Parameter
    #: K, vectors of a class.
    centers: int = 1
    #: The threshold's attribute: () or (C,), as the loss has one or one per class.
    _threshold_name = "threshold"

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        embedding_size, num_classes = given["embedding_size"], given["num_classes"]
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("num_classes", num_classes)
        self.num_classes, self.init_std = num_classes, given["init_std"]
        if self.init_std is None:
            self.init_std = self._default_std(embedding_size)
        else:
            validate.number("init_std", self.init_std, above=0.0)
        self._keep(given)
        validate.centers(self.centers, self.spec)
        self._make_parameters(embedding_size, num_classes)
        self.reset_parameters()

    def _make_parameters(self, embedding_size: int, num_classes: int) -> None:
        several = () if self.centers == 1 else (self.centers,)
        self.weight = nn.Parameter(torch.empty(num_classes, *several, embedding_size))
        if self.spec.threshold != "none":
            shape = (num_classes,) if self.spec.threshold == "per_column" else ()
            setattr(self, self._threshold_name, nn.Parameter(torch.empty(shape)))

    def _default_std(self, embedding_size: int) -> float:
        return 0.01

    def rows_from_normal(self, name: str, normal: Tensor) -> Tensor:
        return normal * self.init_std

    def reset_parameters(self) -> None:
        self.reset_numbers()
        nn.init.normal_(self.weight, std=self.init_std)
        self.reset_thresholds()

    def reset_thresholds(self) -> None:
        threshold = self._threshold()
        if threshold is not None:
            nn.init.zeros_(threshold)

    def _threshold(self) -> Tensor | None:
        return None if self.spec.threshold == "none" else getattr(self, self._threshold_name)

    def comparisons(self) -> list[Comparison]:
        (spec, values), kept = self._chosen(), self.variables()
        return [Comparison(spec, values, self.weight, self._threshold(), variables=kept)]

    def _chosen(self) -> tuple[LossSpec, dict[str, float | str | Tensor]]:
        """The loss of the comparison, and its numbers."""
        return self.spec, self.values()

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        return self.compare(feats, self.weight, labels, class_index=class_index)

    def compare(self, feats: Tensor, weight: Tensor, labels: Tensor, **changed: Any) -> Tensor:
        """The loss on other (C, D) class weights, and with other values of some parameters."""
        threshold = self._threshold()
        keywords = {**self._keywords(), **self.variables()}
        if threshold is not None:
            keywords["b"] = threshold
        return self.function(feats, weight, labels, **keywords | changed)

    def _shown(self) -> dict[str, Any]:
        num_classes, *several, embedding_size = self.weight.shape
        sizes = {"embedding_size": embedding_size, "num_classes": num_classes}
        if several:
            sizes["centers"] = self.centers
        return {**sizes, **super()._shown()}
