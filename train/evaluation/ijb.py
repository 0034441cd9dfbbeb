"""IJB-B and IJB-C: templates of many images, verified (1:1) and searched for (1:N).

Closed set: probes whose subject is in the gallery; at rank r the best of the subject's templates
is among the r best of all subjects. Open set: for the probes whose subject is not, the largest
score is a false alarm if it passes the threshold; the true positive identification rate is the
fraction of the others whose subject is found at rank 1 and passes it. Ties are lost. (insightface
merges the galleries, and takes its thresholds from all pairs of a probe and another subject.)
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError, reported
from train.evaluation import ijb_meta
from train.evaluation.align import AlignedFaces
from train.evaluation.commands import Output, load
from train.evaluation.ijb_meta import Faces, Ints, Subjects
from train.evaluation.lists import read_matrix
from train.evaluation.rates import allowed, shown, tar_at_fars, without_unresolved

ARGUMENTS: dict[str, dict[str, Any]] = {
    "--meta": {"type": Path, "required": True, "help": "folder of the meta files"},
    "--images": {"type": Path, "help": "folder of the loosely cropped faces"},
    "--protocol": {"default": "both", "choices": ("11", "1N", "both")},
    "--set": {"default": "ijbc", "choices": ("ijbc", "ijbb")},
    "--no-norm-weight": {"action": "store_true", "help": "images weigh alike, not by feature norm"},
    "--no-detector-weight": {"action": "store_true", "help": "ignore the face detector's scores"},
    "--write-features": {
        "type": Path,
        "metavar": "FILE",
        "help": "keep the images' features, a .npy",
    },
    "--read-features": {
        "type": Path,
        "metavar": "FILE",
        "help": "take them from there, not from images",
    },
}
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RANKS = (1, 5, 10)
FPIRS = (1e-2, 1e-1)
ROWS = 2**12  # at a time: there are 15.7 million pairs, and two features take 4 kB
PROBES = 1024  # at a time


def evaluate(arguments: Namespace) -> None:
    """IJB-C and IJB-B: TAR at FAR of templates (1:1), search in galleries (1:N)."""
    folder, prefix = arguments.meta, arguments.set
    # Every list is read before the images are, which takes long.
    faces = ijb_meta.read_faces(folder, prefix)
    pairs = subjects = None
    if arguments.protocol != "1N":
        pairs = ijb_meta.read_pairs(folder, prefix, faces)
    if arguments.protocol != "11":
        subjects = ijb_meta.read_search(folder, prefix, faces)
    out = Output(arguments.out)
    features, read = _features(faces, arguments)
    pooled = pool(
        features[read],
        faces.templates[read],
        faces.media[read],
        scores=None if arguments.no_detector_weight else faces.scores[read],
        norms=not arguments.no_norm_weight,
    )
    metrics: dict[str, Any] = {"images": len(read), "skipped_images": int((~read).sum())}
    print(f"{len(read)} images ({metrics['skipped_images']} skipped), {len(pooled.ids)} templates")
    if pairs is not None:
        found = verify(pooled, *pairs)
        metrics["1:1"] = without_unresolved(found, int(found["pairs"] - found["positives"]))
    if subjects is not None:
        metrics["1:N"] = both_galleries(pooled, *subjects)
    lines = {"1:1": metrics["1:1"]} if pairs is not None else {}
    for name, values in (lines | metrics.get("1:N", {})).items():
        print(f"{name:<11}" + "  ".join(f"{key} {shown(value)}" for key, value in values.items()))
    out.json(f"{prefix}.json", metrics)


def _features(faces: Faces, arguments: Namespace) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(N, D) flip-summed features, and of which images; in a file, the others are not numbers."""
    if arguments.read_features is not None:
        features = read_matrix(arguments.read_features, rows=len(faces.names))
        return features, np.isfinite(features).all(1)
    if arguments.images is None or not arguments.images.is_dir():
        raise UserError(f"--images: no such folder: {arguments.images}")
    paths = [str(arguments.images / name) for name in faces.names]
    features, read = load(arguments).embed_records(AlignedFaces(paths, faces.landmarks))
    if arguments.write_features is not None:
        features[~read] = np.nan
        path = arguments.write_features
        with reported(f"cannot write {path}"), open(path, "wb") as file:
            np.save(file, features)
    return features, read


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
    rows, columns = rows[known], columns[known]
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        a, b = templates.features[rows[part]], templates.features[columns[part]]
        scores[part] = np.einsum("nd,nd->n", a, b)
    metrics = tar_at_fars(scores, same, fars)
    counts = {"pairs": len(same), "positives": int(same.sum())}
    if len(same) < len(known):
        counts["skipped_pairs"] = len(known) - len(same)
    return {**metrics, **counts}


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
    metrics: dict[str, float] = {}
    if mated.any():
        metrics |= {f"rank-{r}": float((rank[mated] <= r).mean()) for r in ranks}
    alarms = np.sort(other[~mated])[::-1]
    if mated.any() and alarms.size:
        for fpir in fpirs:
            k = allowed(fpir, len(alarms))
            threshold = alarms[k] if k < len(alarms) else -np.inf
            found = (rank[mated] == 1) & (mate[mated] > threshold)
            metrics[f"tpir@fpir={fpir:g}"] = float(found.mean())
    metrics |= {"mated": int(mated.sum()), "non_mated": int((~mated).sum())}
    return metrics | ({"skipped_probes": lost} if lost else {})


def both_galleries(
    templates: Templates, first: Subjects, second: Subjects, probes: Subjects
) -> dict[str, dict[str, float]]:
    """Metrics of each gallery, their mean, and those of the galleries merged."""
    each = [identify(templates, gallery, probes) for gallery in (first, second)]
    rates = [name for name in each[0] if "@" in name or "-" in name]
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in rates if name in each[1]}
    ids, at = np.unique(np.concatenate([first.templates, second.templates]), return_index=True)
    both = Subjects(ids, np.concatenate([first.subjects, second.subjects])[at])
    merged = identify(templates, both, probes)
    return {"gallery 1": each[0], "gallery 2": each[1], "mean": mean, "merged": merged}
