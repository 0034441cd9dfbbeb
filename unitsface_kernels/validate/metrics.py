"""Arguments of the metrics."""

from __future__ import annotations

from torch import Tensor

from .arguments import both_or_none, features, labels
from .label_ranges import in_range


def scored_pairs(
    feats: Tensor, row_labels: Tensor, other: Tensor | None, other_labels: Tensor | None
) -> None:
    """Features and identities whose pairs are scored."""
    features("feats", feats)
    labels("labels", row_labels, feats.shape[0], feats)
    both_or_none("other", other, "other_labels", other_labels)
    if other is not None and other_labels is not None:
        features("other", other, feats)
        labels("other_labels", other_labels, other.shape[0], feats, "other")
        in_range("other_labels", other_labels, -1, None)
    in_range("labels", row_labels, -1, None)


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
