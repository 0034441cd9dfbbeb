"""Base of the losses over pairs of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import functional, policy, validate
from ...functional.matching import Matching, match
from . import indices
from .base import AdaptedLoss, labels_of
from .indices import Pairs
from .listed import Listed
from .reducers import Part


@dataclass(frozen=True)
class Batch:
    """All pairs of rows and columns.

    Attributes:
        rows: (N, D) embeddings.
        columns: (M, D), or None: the rows.
        matching: identities.
        offset: the pair of row i and column i + offset, of the same identity, is left out; None:
            none is.
        backend: of the loss.
    """

    rows: Tensor
    columns: Tensor | None
    matching: Matching
    offset: int | None
    backend: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the fused functions."""
        return {"feats": self.rows, "labels": self.matching.rows, **self.against}

    @property
    def against(self) -> dict[str, Any]:
        """Arguments for the columns."""
        found: dict[str, Any] = {"backend": self.backend}
        if self.columns is not None:
            found |= {"memory": self.columns, "memory_labels": self.matching.columns}
            found |= {"batch_offset": self.offset}
        return found

    def of(self, form: policy.Pair, reduction: str = "none", **variables: Tensor) -> Tensor:
        """A formula's loss."""
        given = {**self.arguments, **variables}
        return functional.fused_pair_loss(form, reduction=reduction, **given)

    @cached_property
    def some(self) -> Tensor:
        """() whether there are more than a single pair of either kind."""
        positives, negatives = self.matching.positives.sum(), self.matching.negatives.sum()
        return (positives > 1) | (negatives > 1)

    def listed(self) -> Listed:
        """As a list, of N M pairs."""
        same = self.matching.rows[:, None] == self.matching.columns
        different = ~same
        if self.offset is not None:
            places = torch.arange(len(same), device=same.device)
            same[places, places + self.offset] = False
        pairs = Pairs(*torch.where(same), *torch.where(different))
        columns = self.rows if self.columns is None else self.columns
        return Listed(self.rows, columns, pairs, self.backend)


class PairLoss(AdaptedLoss):
    """Base of the losses over pairs of samples; see :class:`AdaptedLoss` for the keywords.

    Shape:
        embeddings (N, D), labels (N,) any integers; the pairs are those within the batch, without
        (i, i), or those with ref_emb (M, D), ref_labels (M,), or those that ``indices_tuple`` lists
        by their rows and columns, as a miner returns them: labels are not needed then. -> () in the
        dtype of the embeddings, float32 under autocast.
    """

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: object = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        validate.features("embeddings", embeddings)
        if ref_emb is None:
            validate.both_or_none("ref_emb", ref_emb, "ref_labels", ref_labels)
        else:
            validate.features("ref_emb", ref_emb, like=embeddings)
        if indices_tuple is not None:
            columns = embeddings if ref_emb is None else ref_emb
            sizes = len(embeddings), len(columns)
            pairs = indices.as_pairs(indices.checked(indices_tuple, *sizes, embeddings.device))
            listed = Listed(embeddings, columns, pairs, self.backend)
            if labels is not None:
                labels = labels_of("labels", labels, embeddings, "embeddings")
            return self.reduced(self.of_list(listed), embeddings, labels)
        given, labels = labels, labels_of("labels", labels, embeddings, "embeddings")
        if ref_emb is None:
            return self.compare(embeddings, labels, None, labels, 0)
        # The original leaves (i, i) out if both are one tensor on the device, and only then.
        # Compared as given: transforms of torch.func make every conversion another tensor.
        one = given is not None and ref_labels is given and given.device == embeddings.device
        ref_labels = labels_of("ref_labels", ref_labels, ref_emb, "ref_emb")
        return self.compare(embeddings, labels, ref_emb, ref_labels, 0 if one else None)

    def compare(
        self,
        embeddings: Tensor,
        labels: Tensor,
        columns: Tensor | None,
        column_labels: Tensor,
        batch_offset: int | None,
    ) -> Any:
        """The loss of rows against columns (None: the batch), checked arguments.

        The pair of row i and column i + batch_offset, of the same identity, is left out.
        """
        matching = match(labels, column_labels, holds_itself=batch_offset is not None)
        batch = Batch(embeddings, columns, matching, batch_offset, self.backend)
        return self.reduced(self.of_batch(batch), embeddings, labels)

    def of_batch(self, batch: Batch) -> Mapping[str, Part]:
        """The loss's parts over all pairs."""
        raise NotImplementedError

    def of_list(self, listed: Listed) -> Mapping[str, Part]:
        """The loss's parts over listed pairs."""
        raise NotImplementedError
