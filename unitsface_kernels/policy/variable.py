"""Tensors that a formula reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["scalar", "row", "column", "identity"]
Side = Literal["scalar", "row", "column"]
#: In the order of a formula's variables.
SIDES: tuple[Side, ...] = ("scalar", "row", "column")
#: Variables that are computed from the features, by name.
TARGET_COSINE, ROW_NORM, COLUMN_NORM = "target_cosine", "row_norm", "column_norm"
#: Those that are computed from the labels.
POSITIVES, NEGATIVES = "positives_per_row", "negatives_per_row"
WITH_POSITIVES = "share_with_positives"
#: Side of each that is computed.
COMPUTED: dict[str, Side] = {
    TARGET_COSINE: "row",
    ROW_NORM: "row",
    COLUMN_NORM: "column",
    POSITIVES: "scalar",
    NEGATIVES: "scalar",
    WITH_POSITIVES: "scalar",
}


@dataclass(frozen=True)
class Variable:
    """A tensor that a formula reads beside the cosine and the threshold.

    A pair (i, j) of row i reads variables of rows at i and those of columns at j. The other
    direction of the pair, whose row is j, reads them the other way round.

    Attributes:
        name: keyword of the public function.
        kind: "scalar" (one number), "row" (N,), "column" (M,), or "identity" (K,), which is read at
            the identity of the column, as a threshold per column is.
        given: by the caller. Else it follows from features and labels: ``TARGET_COSINE``, the
            row's cosine with its class, 0 without one, a constant of the gradient; ``ROW_NORM`` or
            ``COLUMN_NORM``, the norm of the row or of the column, at least 1e-5, whose gradient
            reaches the features; ``POSITIVES`` or ``NEGATIVES``, the number of such pairs, at least
            1, over that of the rows that the mean is taken of: with reduction "mean", terms over it
            are averaged over such pairs; ``WITH_POSITIVES`` likewise the number of rows that have a
            positive.
        streamed: whether tiles read it, for every pair. Else, in a ``logsumexp`` loss over classes,
            the targets' logits alone do, N numbers.
        nonzero: whether it cannot be 0.
    """

    name: str
    kind: Kind
    given: bool = True
    streamed: bool = True
    nonzero: bool = False

    @property
    def side(self) -> Side:
        """The kind in a call: what is per identity is gathered per column before it."""
        return "column" if self.kind == "identity" else self.kind
