"""Base of the losses over classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import validate
from . import indices
from .base import AdaptedLoss, labels_of
from .reducers import MeanReducer, Part, Rows, kind_of

#: Fills weights in place.
Fill = Callable[[Tensor], object]


class ClassLoss(AdaptedLoss):
    """Base of the losses over classes; see :class:`AdaptedLoss` for other keywords.

    Args:
        num_classes, embedding_size: C, D.
        weight_init_func: fills the weights in place; N(0, 1) without it.
        cast_weights: whether a call gives the weights the dtype and device of the embeddings for
            good (not under autocast), as the original does. False: they keep theirs, and every
            call converts them.
        backend: "auto", "native", "triton" or "reference".

    Shape:
        embeddings (N, D), labels (N,) integers in [0, C) -> () in the dtype of the embeddings,
        float32 under autocast. ``indices_tuple``, pairs or triplets of the batch: rows weigh as
        often as they are listed, relative to the one listed most.
    """

    has_weights = True
    #: Name of the parameter.
    weights: ClassVar[str] = "W"
    #: How a miner's list counts: rows of anchors alone, or of all places.
    anchors_only: ClassVar[bool] = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        weight_init_func: Fill | None,
        backend: str,
        options: Mapping[str, Any],
    ) -> None:
        validate.positive_int("num_classes", num_classes)
        validate.positive_int("embedding_size", embedding_size)
        options = dict(options)
        cast = options.pop("cast_weights", False)
        validate.instance("cast_weights", cast, bool, "a bool")
        super().__init__(backend, options)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.cast_weights = cast
        self.register_parameter(self.weights, self.filled(weight_init_func))

    def filled(self, fill: Fill | None) -> nn.Parameter:
        """(D, C)."""
        weight = torch.empty(self.embedding_size, self.columns)
        (fill or nn.init.normal_)(weight)
        # In memory (C, D), which is what the kernels read: transposing it back copies nothing.
        return nn.Parameter(weight.t().contiguous().t())

    @property
    def columns(self) -> int:
        """Number of weight vectors."""
        return self.num_classes

    def rows(self) -> Tensor:
        """(C, D) weights."""
        return getattr(self, self.weights).t()

    def regularized_weights(self) -> Tensor:
        return self.rows()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        validate.features("embeddings", embeddings)
        given = labels
        labels = labels_of("labels", labels, embeddings, "embeddings")
        for name, value, own in (
            ("ref_emb", ref_emb, embeddings),
            ("ref_labels", ref_labels, given),
        ):
            if value is not None and value is not own:
                raise ValueError(
                    f"{name} must be None, got {type(value).__name__}: "
                    "the columns are the class weights"
                )
        validate.in_range("labels", labels, 0, self.num_classes)
        weights = self.matched(embeddings)
        found: tuple[Tensor, ...] | None = None
        if indices_tuple is not None:
            sizes = (len(embeddings),) * 2
            found = indices.checked(indices_tuple, *sizes, embeddings.device)
        return self.reduced(self.of_rows(embeddings, weights, labels, found), embeddings, labels)

    def matched(self, embeddings: Tensor) -> Tensor:
        """(C, D) weights as functions take them with these embeddings."""
        parameter = getattr(self, self.weights)
        if self.cast_weights and not torch.is_autocast_enabled(embeddings.device.type):
            parameter.data = parameter.data.to(embeddings)
        weights = self.rows()
        wide = torch.float64 in (weights.dtype, embeddings.dtype)
        return weights.to(embeddings.dtype) if wide else weights

    def of_rows(
        self,
        embeddings: Tensor,
        weights: Tensor,
        labels: Tensor,
        found: tuple[Tensor, ...] | None,
    ) -> dict[str, Part]:
        """The loss's parts, by the list of a miner."""
        if found is None and kind_of(self.reducer) == MeanReducer.__name__:
            # The functions' own mean; rows are its only part.
            return {"loss": Reduced(self.losses(embeddings, weights, labels, "mean"))}
        losses = self.losses(embeddings, weights, labels, "none")
        if found is not None:
            of_rows = indices.row_weights(found, len(embeddings), self.anchors_only)
            losses = losses * of_rows.to(losses)
        return {"loss": Rows(losses)}

    def losses(self, embeddings: Tensor, weights: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Losses of rows, or their mean."""
        raise NotImplementedError

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) logits without margin, in the embeddings' dtype."""
        raise NotImplementedError


class Reduced(Part):
    """A loss that is a mean already."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def entry(self) -> dict[str, Any]:
        return {"losses": self.value, "indices": None, "reduction_type": "already_reduced"}

    def reduce(self, reducer: nn.Module, name: str, embeddings: Tensor, labels: Any) -> Tensor:
        return self.value
