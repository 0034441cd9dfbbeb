"""How losses of rows or pairs become one number: reducers of the original, and defaults."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import validate

#: An entry of the dictionaries that reducers of the original take.
Entry = dict[str, Any]
#: What has no loss.
NOTHING: Entry = {"losses": 0, "indices": None, "reduction_type": "already_reduced"}


class MeanReducer(nn.Module):
    """The mean over all rows."""

    def forward(self, losses: dict[str, Entry], embeddings: Tensor, labels: Tensor) -> Tensor:
        (entry,) = losses.values()
        if not isinstance(entry["losses"], Tensor):
            return (embeddings * 0).sum()
        return self.reduced(entry["losses"], entry)

    def reduced(self, losses: Tensor, entry: Entry) -> Tensor:
        return losses.sum() / max(losses.numel(), 1)


class AvgNonZeroReducer(MeanReducer):
    """The mean over rows whose loss is not 0."""

    low, high = 0, None

    def reduced(self, losses: Tensor, entry: Entry) -> Tensor:
        some = losses > 0
        return torch.where(some, losses, 0.0).sum() / some.sum().clamp(min=1)


class DivisorReducer(MeanReducer):
    """The sum over a number that the loss gives."""

    def reduced(self, losses: Tensor, entry: Entry) -> Tensor:
        return losses.sum() / max(entry["divisor"], 1)


class MultipleReducers(nn.Module):
    """A reducer for every part of a loss."""

    def __init__(self, reducers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.reducers = nn.ModuleDict(reducers)
        self.default_reducer = MeanReducer()


def kind_of(reducer: nn.Module) -> str | None:
    """The class's name, of the original's reducers and those above; others are called."""
    module = type(reducer).__module__
    known = module == __name__ or module.partition(".")[0] == "pytorch_metric_learning"
    return type(reducer).__name__ if known else None


def for_parts(given: object, default: type[nn.Module], names: Sequence[str]) -> nn.Module:
    """The reducer of a loss with parts of these names, as the original makes it."""
    if given is None:
        made: nn.Module = default()
    else:
        expected = "a reducer of pytorch-metric-learning"
        validate.instance("reducer", given, nn.Module, expected)
        made = given  # type: ignore[assignment]
        kind = kind_of(made)
        if kind == "DivisorReducer" and default is not DivisorReducer:
            raise ValueError(f"reducer must be another one, got {kind}: this loss has no divisor")
        if kind in ("MultipleReducers", "DoNothingReducer"):
            return made
        made = copy.deepcopy(made)
    if len(names) == 1:
        return made
    return MultipleReducers({name: copy.deepcopy(made) for name in names})


class Part(ABC):
    """One part of a loss before it is reduced."""

    @abstractmethod
    def entry(self) -> Entry:
        """For a reducer of the original."""

    def reduce(self, reducer: nn.Module, name: str, embeddings: Tensor, labels: Any) -> Tensor:
        return reducer({name: self.entry()}, embeddings, labels)


@dataclass(frozen=True)
class Rows(Part):
    """A loss for every row.

    Attributes:
        losses: (N,).
        some: (N,) bool, rows whose loss is not 0 in exact arithmetic; None: by their numbers.
        divisor: that of :class:`DivisorReducer`.
    """

    losses: Tensor
    some: Tensor | None = None
    divisor: int | None = None

    def entry(self) -> Entry:
        if not len(self.losses):
            return NOTHING
        indices = torch.arange(len(self.losses), device=self.losses.device)
        entry = {"losses": self.losses, "indices": indices, "reduction_type": "element"}
        return entry if self.divisor is None else {**entry, "divisor": self.divisor}

    def reduce(self, reducer: nn.Module, name: str, embeddings: Tensor, labels: Any) -> Tensor:
        if kind_of(reducer) == "AvgNonZeroReducer" and self.some is not None:
            kept = torch.where(self.some, self.losses, 0.0)
            return kept.sum() / self.some.sum().clamp(min=1)
        return super().reduce(reducer, name, embeddings, labels)


class OfPairs(Part):
    """A loss for every pair of a kind."""

    @abstractmethod
    def total(self) -> Tensor:
        """() the sum."""

    @abstractmethod
    def counts(self) -> Tensor:
        """(N,) numbers of pairs by their rows."""

    @abstractmethod
    def means(self) -> Tensor:
        """(N,) means over the pairs of a row, 0 without any."""

    def between(self, low: float | None, high: float | None) -> Tensor | None:
        """() the mean over pairs whose loss is within the bounds; None: pairs have to be listed."""
        return None

    def reduce(self, reducer: nn.Module, name: str, embeddings: Tensor, labels: Any) -> Tensor:
        kind = kind_of(reducer)
        if kind == "SumReducer":
            return self.total()
        if kind == "MeanReducer":
            return self.total() / self.counts().sum().clamp(min=1)
        if kind in ("AvgNonZeroReducer", "ThresholdReducer"):
            found = self.between(reducer.low, reducer.high)  # type: ignore[arg-type]
            if found is not None:
                return found
        if kind == "PerAnchorReducer" and _averages(reducer):
            return Rows(self.means()).reduce(reducer.reducer, "loss", embeddings, labels)  # type: ignore[arg-type]
        return super().reduce(reducer, name, embeddings, labels)


def _averages(reducer: nn.Module) -> bool:
    """Whether a reducer per anchor takes the mean of its pairs, the original's default."""
    function = getattr(reducer, "aggregation_func", None)
    return getattr(function, "__module__", None) == type(reducer).__module__


@dataclass(frozen=True)
class ListedPairs(OfPairs):
    """Losses of listed pairs.

    Attributes:
        losses: (P,).
        indices: (P,) rows and (P,) columns.
        kind: "pos_pair" or "neg_pair".
        rows: N.
    """

    losses: Tensor
    indices: tuple[Tensor, Tensor]
    kind: str
    rows: int

    def entry(self) -> Entry:
        if not len(self.losses):
            return NOTHING
        return {"losses": self.losses, "indices": self.indices, "reduction_type": self.kind}

    def total(self) -> Tensor:
        return self.losses.sum()

    def counts(self) -> Tensor:
        return torch.bincount(self.indices[0], minlength=self.rows)

    def means(self) -> Tensor:
        sums = self.losses.new_zeros(self.rows).index_add(0, self.indices[0], self.losses)
        return sums / self.counts().clamp(min=1)

    def between(self, low: float | None, high: float | None) -> Tensor:
        kept = torch.ones_like(self.losses, dtype=torch.bool)
        if low is not None:
            kept = kept & (self.losses > low)
        if high is not None:
            kept = kept & (self.losses < high)
        return torch.where(kept, self.losses, 0.0).sum() / kept.sum().clamp(min=1)


@dataclass(frozen=True)
class Nothing(Part):
    """No loss: there is no pair of a kind."""

    embeddings: Tensor

    def entry(self) -> Entry:
        return NOTHING

    def reduce(self, reducer: nn.Module, name: str, embeddings: Tensor, labels: Any) -> Tensor:
        return (self.embeddings * 0).sum()
