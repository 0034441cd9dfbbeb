"""What all losses of the original have: keywords, regularizers, reducers and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import validate
from ...memory import all_finite, nan_unless
from . import reducers
from .measures import COSINE, Measure, of_distance
from .reducers import Part


class AdaptedLoss(nn.Module):
    """Base of the losses.

    Args:
        backend: "auto", "native", "triton" or "reference".
        options: the original's keywords: ``distance``, ``reducer``, ``embedding_regularizer``,
            ``embedding_reg_weight`` and, of losses with weights, ``weight_regularizer``,
            ``weight_reg_weight``, with objects of its classes.

    Attributes:
        distance, reducer: as given, or the defaults.
    """

    #: Parts of the loss, which are reduced one by one and added.
    parts: ClassVar[tuple[str, ...]] = ("loss",)
    default_reducer: ClassVar[type[nn.Module]] = reducers.MeanReducer
    default_measure: ClassVar[Measure] = COSINE
    #: Measures that the loss is limited to, see :func:`measures.of_distance`.
    allowed: ClassVar[str] = ""
    #: Whether it has weights, which may have a regularizer.
    has_weights: ClassVar[bool] = False

    def __init__(self, backend: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        known = {"distance", "reducer", "collect_stats"}
        regularized = ["embedding", *(["weight"] if self.has_weights else [])]
        known |= {f"{of}_{what}" for of in regularized for what in ("regularizer", "reg_weight")}
        for name in options:
            if name not in known:
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        if options.get("collect_stats"):
            got = type(options["collect_stats"]).__name__
            raise ValueError(f"collect_stats must be None, got {got}: no statistics are collected")
        given = options.get("distance")
        self.distance = self.default_measure if given is None else given
        self.backend = backend
        self.embedding_regularizer = _regularizer(options, "embedding")
        self.embedding_reg_weight = options.get("embedding_reg_weight", 1)
        self.weight_regularizer = _regularizer(options, "weight")
        self.weight_reg_weight = options.get("weight_reg_weight", 1)
        names = list(self.parts)
        for of in regularized:
            if getattr(self, f"{of}_regularizer") is not None:
                names.append(f"{of}_reg_loss")
        self.reducer = reducers.for_parts(options.get("reducer"), self.default_reducer, names)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "distance":
            of_distance(value, self.allowed)
        super().__setattr__(name, value)

    @property
    def measure(self) -> Measure:
        """What pairs are compared by; follows ``distance``."""
        return of_distance(self.distance, self.allowed)

    def regularized_weights(self) -> Tensor:
        """(C, D) what the regularizer of the weights takes."""
        raise NotImplementedError

    def reduced(self, found: Mapping[str, Part], embeddings: Tensor, labels: Tensor | None) -> Any:
        """The loss of its parts; what the reducer returns, if it is one that does nothing."""
        added = self._regularizations(embeddings)
        if reducers.kind_of(self.reducer) in (None, "DoNothingReducer"):
            entries = {name: part.entry() for name, part in found.items()}
            entries |= {
                name: {**reducers.NOTHING, "losses": value} for name, value in added.items()
            }
            total = self.reducer(entries, embeddings, labels)
            if not isinstance(total, Tensor):
                return total
        else:
            total = embeddings.new_zeros((), dtype=wide(embeddings))
            for name, part in found.items():
                total = total + part.reduce(self._reducer_of(name), name, embeddings, labels)
            for value in added.values():
                total = total + value
        # A row that takes no part would hide its NaN.
        total = total + nan_unless(all_finite(embeddings), total.dtype)
        return total.to(self._dtype(embeddings))

    def _reducer_of(self, name: str) -> nn.Module:
        if reducers.kind_of(self.reducer) != reducers.MultipleReducers.__name__:
            return self.reducer
        of_parts: Any = self.reducer
        named = dict(of_parts.reducers.items())
        return named.get(name, of_parts.default_reducer)

    def _regularizations(self, embeddings: Tensor) -> dict[str, Tensor]:
        found = {}
        if self.embedding_regularizer is not None:
            of_embeddings = self.embedding_regularizer(embeddings)
            found["embedding_reg_loss"] = of_embeddings * self.embedding_reg_weight
        if self.weight_regularizer is not None:
            of_weights = self.weight_regularizer(self.regularized_weights())
            found["weight_reg_loss"] = of_weights * self.weight_reg_weight
        return found

    @staticmethod
    def _dtype(embeddings: Tensor) -> torch.dtype:
        """Dtype of the embeddings, as in the original; float32 under autocast."""
        device = embeddings.device.type
        return wide(embeddings) if torch.is_autocast_enabled(device) else embeddings.dtype


def wide(embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(embeddings.dtype, torch.float32)


def _regularizer(options: Mapping[str, Any], of: str) -> Any:
    given = options.get(f"{of}_regularizer")
    if given is not None and not callable(given):
        raise TypeError(f"{of}_regularizer must be callable, got {type(given).__name__}")
    return given


def labels_of(name: str, labels: Tensor | None, like: Tensor, counted: str) -> Tensor:
    """Labels may come from another device; from this one they stay the same object."""
    if labels is None:
        raise ValueError(f"{name} must be given for every row of {counted}, got None")
    labels = validate.is_tensor(name, labels).to(like.device)
    validate.labels(name, labels, like.shape[0], like, counted)
    return labels
