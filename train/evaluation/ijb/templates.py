"""Templates out of images, and what pairs of templates score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.evaluation.ijb.meta import Ints
from train.evaluation.rates import tar_at_fars

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ROWS = 2**12  # at a time: there are 15.7 million pairs, and two features take 4 kB


@dataclass(frozen=True)
class Templates:
    """Unit features by template."""

    ids: Ints  # (T,) ascending
    features: NDArray[np.float32]  # (T, D)

    def find(self, templates: Ints) -> Ints:
        """Rows of templates; -1 for those without a feature."""
        rows = np.searchsorted(self.ids, templates)
        rows[rows == len(self.ids)] = 0
        return np.where(self.ids[rows] == templates, rows, -1)


def pool(
    features: NDArray[np.float32],
    templates: Ints,
    media: Ints,
    *,
    scores: NDArray[np.float64] | None,
    norms: bool,
) -> Templates:
    """Sum over a template's media of the mean over each medium's images, of unit length.

    Images weigh as much as their features are long (which grows with their quality) unless
    ``norms`` is false, and by the detector's ``scores`` if given.
    """
    if not np.isfinite(features).all():
        raise UserError("the model's features are not finite")
    ids, row_of = np.unique(templates, return_inverse=True)
    _, medium_of, frames = np.unique(
        np.stack([templates, media]), axis=1, return_inverse=True, return_counts=True
    )
    weights = 1 / frames[medium_of.ravel()]
    if scores is not None:
        weights = weights * scores
    if not norms:
        weights = weights / np.maximum(np.linalg.norm(features, axis=1), 1e-12)
    sums = np.zeros((len(ids), features.shape[1]))
    for start in range(0, len(features), ROWS):
        part = slice(start, start + ROWS)
        np.add.at(sums, row_of[part], features[part] * weights[part, None])
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return Templates(ids, sums.astype(np.float32))


def cosines(templates: Templates, first: Ints, second: Ints) -> NDArray[np.float32]:
    """(P,) cosines of pairs, given as rows."""
    scores = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(first), ROWS):
        part = slice(start, start + ROWS)
        a, b = templates.features[first[part]], templates.features[second[part]]
        scores[part] = np.einsum("nd,nd->n", a, b)
    return scores


def verify(
    templates: Templates,
    first: Ints,
    second: Ints,
    same: NDArray[np.bool_],
    fars: Sequence[float] = FARS,
) -> dict[str, float]:
    """TAR at FAR over listed pairs; pairs of templates without a feature are left out, counted."""
    rows, columns = templates.find(first), templates.find(second)
    known = (rows >= 0) & (columns >= 0)
    same = same[known]
    if len(np.unique(same)) < 2:
        raise UserError(f"no pairs of both kinds are left, {len(same)} of {len(known)} with images")
    scores = cosines(templates, rows[known], columns[known])
    figures = tar_at_fars(scores, same, fars)
    counts = {"pairs": len(same), "positives": int(same.sum())}
    if len(same) < len(known):
        counts["skipped_pairs"] = len(known) - len(same)
    return {**figures, **counts}
