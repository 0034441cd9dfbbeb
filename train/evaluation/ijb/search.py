"""1:N: probes searched for in galleries.

Closed set: probes whose subject is in the gallery; at rank r the best of the subject's templates
is among the r best of all subjects. Open set: for the probes whose subject is not, the largest
score is a false alarm if it passes the threshold; the true positive identification rate is the
share of the others whose subject is found at rank 1 and passes it. Ties are lost. (insightface
merges the galleries, and takes its thresholds from all pairs of a probe and somebody else.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.evaluation.ijb.meta import Ints, Subjects
from train.evaluation.ijb.templates import Templates
from train.evaluation.rates import allowed

RANKS = (1, 5, 10)
FPIRS = (1e-2, 1e-1)
PROBES = 1024  # at a time


def search(
    templates: Templates, gallery: Subjects, probes: Subjects
) -> tuple[NDArray[np.float32], NDArray[np.float32], Ints, int]:
    """Per probe: its subject's score (-inf when not in the gallery), the best of other subjects,
    and its rank, 0 without one. Last, how many probes were left out: those without an image, and
    those whose subject is enrolled in templates without one.
    """
    rows, columns = templates.find(probes.templates), templates.find(gallery.templates)
    enrolled_as = gallery.subjects[columns >= 0]
    gone = np.setdiff1d(gallery.subjects, enrolled_as)
    kept = (rows >= 0) & ~np.isin(probes.subjects, gone)
    order = np.argsort(enrolled_as, kind="stable")
    subjects, first = np.unique(enrolled_as[order], return_index=True)
    enrolled = templates.features[columns[columns >= 0][order]]
    if not len(enrolled) or not kept.any():
        raise UserError("no template of the gallery, or none of the probes, has an image")
    rows, wanted = rows[kept], probes.subjects[kept]
    place = np.searchsorted(subjects, wanted)
    place[place == len(subjects)] = 0
    mated = subjects[place] == wanted
    mate = np.full(len(rows), -np.inf, dtype=np.float32)
    other = np.full(len(rows), -np.inf, dtype=np.float32)
    rank = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(rows), PROBES):
        part = slice(start, start + PROBES)
        scores = templates.features[rows[part]] @ enrolled.T
        best = np.maximum.reduceat(scores, first, axis=1)  # per subject
        with_mate = np.flatnonzero(mated[part])
        column = place[part][with_mate]
        own = best[with_mate, column]
        best[with_mate, column] = -np.inf
        mate[start + with_mate] = own
        rank[start + with_mate] = 1 + (best[with_mate] >= own[:, None]).sum(1)
        other[part] = best.max(1)
    return mate, other, rank, int((~kept).sum())


def identify(
    templates: Templates,
    gallery: Subjects,
    probes: Subjects,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> dict[str, float]:
    """Closed-set rates by rank and open-set rates by false alarms, where there are probes for."""
    mate, other, rank, lost = search(templates, gallery, probes)
    mated = rank > 0
    figures: dict[str, float] = {}
    if mated.any():
        figures |= {f"rank-{r}": float((rank[mated] <= r).mean()) for r in ranks}
    alarms = np.sort(other[~mated])[::-1]
    if mated.any() and alarms.size:
        for fpir in fpirs:
            k = allowed(fpir, len(alarms))
            threshold = alarms[k] if k < len(alarms) else -np.inf
            found = (rank[mated] == 1) & (mate[mated] > threshold)
            figures[f"tpir@fpir={fpir:g}"] = float(found.mean())
    figures |= {"mated": int(mated.sum()), "non_mated": int((~mated).sum())}
    return figures | ({"skipped_probes": lost} if lost else {})


def merge(first: Subjects, second: Subjects) -> Subjects:
    """Both galleries as one."""
    templates, at = np.unique(
        np.concatenate([first.templates, second.templates]), return_index=True
    )
    return Subjects(templates, np.concatenate([first.subjects, second.subjects])[at])


def both_galleries(
    templates: Templates, first: Subjects, second: Subjects, probes: Subjects
) -> dict[str, dict[str, float]]:
    """Figures of each gallery, their mean, and those of the galleries merged."""
    each = [identify(templates, gallery, probes) for gallery in (first, second)]
    rates = [name for name in each[0] if "@" in name or "-" in name]
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in rates if name in each[1]}
    merged = identify(templates, merge(first, second), probes)
    return {"gallery 1": each[0], "gallery 2": each[1], "mean": mean, "merged": merged}
