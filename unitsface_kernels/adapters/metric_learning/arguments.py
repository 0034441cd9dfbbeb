"""What a user passes, as the fused functions take it."""

from __future__ import annotations

from torch import Tensor

from ... import validate


def batch(embeddings: Tensor, labels: Tensor | None, indices_tuple: object) -> Tensor:
    """The labels, on the embeddings' device."""
    validate.unsupported("indices_tuple", indices_tuple, validate.ALL_PAIRS)
    validate.features("embeddings", embeddings)
    return labels_of("labels", labels, embeddings, "embeddings")


def labels_of(name: str, labels: Tensor | None, like: Tensor, counted: str) -> Tensor:
    """Labels may come from another device; from this one they stay the same object."""
    validate.is_tensor(name, labels)
    assert labels is not None
    labels = labels.to(like.device)
    validate.labels(name, labels, like.shape[0], like, counted)
    return labels
