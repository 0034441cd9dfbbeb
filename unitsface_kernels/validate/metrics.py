"""Arguments of the metrics."""

from __future__ import annotations

from torch import Tensor

from .arguments import features, labels, threshold
from .label_ranges import in_range
from .numbers import number, positive_int


def scored_pairs(
    feats: Tensor, row_labels: Tensor, other: Tensor | None, other_labels: Tensor | None
) -> None:
    """Features and identities whose pairs are scored."""
    features("feats", feats)
    labels("labels", row_labels, feats.shape[0], feats)
    if (other is None) != (other_labels is None):
        given, missing = (
            ("other", "other_labels") if other_labels is None else ("other_labels", "other")
        )
        raise ValueError(f"{missing} must be given together with {given}, got None")
    if other is not None and other_labels is not None:
        features("other", other, feats)
        labels("other_labels", other_labels, other.shape[0], feats, "other")
        in_range("other_labels", other_labels, -1, None)
    in_range("labels", row_labels, -1, None)


def classified(
    feats: Tensor, weight: Tensor, row_labels: Tensor, bias: object, scale: object
) -> None:
    """Features, class weights and targets whose metrics scale * cosine - bias are compared."""
    features("feats", feats)
    features("weight", weight, feats)
    labels("labels", row_labels, feats.shape[0], feats)
    in_range("labels", row_labels, -1, weight.shape[0])
    number("scale", scale, above=0.0)
    if bias is not None:
        scalar = isinstance(bias, Tensor) and bias.numel() == 1
        per, size = (None, None) if scalar else ("class", weight.shape[0])
        threshold("bias", bias, feats, per=per, size=size)


def ranks(name: str, values: list[int], count: int, kind: str) -> None:
    for value in values:
        positive_int(name, value)
        if value > count:
            raise ValueError(f"{name} must be <= {count}, the number of {kind} pairs, got {value}")


def rates(name: str, values: list[float]) -> None:
    if not values:
        raise ValueError(f"{name} must have at least one rate, got none")
    for value in values:
        number(name, value)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def both_kinds(positives: int, negatives: int) -> None:
    if positives == 0 or negatives == 0:
        raise ValueError(
            "labels must form at least one positive and one negative pair, "
            f"got {positives} positive and {negatives} negative pairs"
        )


def no_nan_scores(count: int) -> None:
    if count:
        raise ValueError(
            "feats and what they are compared with must be finite where the label is not -1, "
            f"got {count} scores that are NaN"
        )
