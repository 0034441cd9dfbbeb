"""Arguments of the original losses, checked and in the form of the fused functions."""

from __future__ import annotations

from torch import Tensor

from ... import validate

ALL_PAIRS = "every pair takes part; use unitsface_kernels' losses for a margin instead of mining"

# Keywords of pytorch-metric-learning's losses, and what to use instead of another value.
_METRIC_LEARNING_OPTIONS = {
    "distance": "similarities are cosines",
    "reducer": "for losses per row use unitsface_kernels' functions with reduction='none'",
    "embedding_regularizer": "add its value to the loss",
    "embedding_reg_weight": "add the weighted regularizer to the loss",
    "weight_regularizer": "add its value, of W.t(), to the loss",
    "weight_reg_weight": "add the weighted regularizer to the loss",
    "collect_stats": "no statistics are collected",
}


def batch(embeddings: Tensor, labels: Tensor | None, indices_tuple: object) -> Tensor:
    """The labels, on the embeddings' device."""
    unsupported("indices_tuple", indices_tuple, ALL_PAIRS)
    validate.features("embeddings", embeddings)
    return labels_of("labels", labels, embeddings, "embeddings")


def labels_of(name: str, labels: Tensor | None, like: Tensor, counted: str) -> Tensor:
    """Labels may come from another device; from this one they stay the same object."""
    labels = validate.is_tensor(name, labels).to(like.device)
    validate.labels(name, labels, like.shape[0], like, counted)
    return labels


def options_of_original(options: dict[str, object], reducer: str) -> None:
    """Accepts the original's keywords with values that change nothing, such as the defaults."""
    for name, value in options.items():
        if name not in _METRIC_LEARNING_OPTIONS:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        kind = type(value).__name__
        plain_cosine = kind == "CosineSimilarity" and (
            getattr(value, "p", None),
            getattr(value, "power", None),
        ) == (2, 1)
        if name == "distance" and plain_cosine:
            continue
        if (name == "reducer" and kind == reducer) or (name == "collect_stats" and value is False):
            continue
        if name.endswith("_reg_weight"):
            # Without a regularizer, which is refused, it weighs nothing.
            continue
        unsupported(name, value, _METRIC_LEARNING_OPTIONS[name])


def unsupported(name: str, value: object, instead: str) -> None:
    if value is not None:
        raise ValueError(f"{name} must be None, got {type(value).__name__}: {instead}")
