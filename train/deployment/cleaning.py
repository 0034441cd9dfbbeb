"""Faults of a data set of identities, by one threshold of the cosine.

Two sets of images are compared by the mean cosine of all their pairs, which is the inner product of
the means of their unit features. Every identity is split into parts of images that reach the
threshold with each other; the largest is its main part. Its other parts are outliers (one image) or
other people (several images). Two main parts that reach the threshold are duplicates: one person
under two identities.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from train.deployment.vectors import Vectors, open_text
from train.errors import UserError, reported
from train.run_folder import write_json
from unitsface_kernels import metrics

SHOWN = 20  # findings on the terminal
NEAREST = 8  # parts that a part is compared with at first
ROUNDS = 10  # in which a part takes images

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Finding:
    kind: str  # duplicate, mixed or outlier
    identity: str
    image: str  # "" of a duplicate, which is a pair of identities
    cosine: float  # mean one with the main part of the identity; of a duplicate, of the pair
    other: str  # identity whose main part this belongs to, or ""
    other_cosine: float | None


def parts_of(features: NDArray[np.float32], threshold: float) -> list[Rows]:
    """Rows of (n, D) unit features in parts, the largest first; in memory O(n).

    A part begins with the image nearest to all that are left, and those that reach the threshold
    with it. Images whose mean cosine with the part reaches the threshold are added; then the
    farthest image is removed as long as its mean cosine with the others is below the threshold.
    """
    found, left = [], np.arange(len(features))
    while len(left):
        rows = features[left]
        center = int(np.argmax(rows @ rows.sum(0)))
        member = rows @ rows[center] >= threshold
        member[center] = True
        for _ in range(ROUNDS):
            before = member
            member = before | (rows @ rows[before].mean(0) >= threshold)
            if (member == before).all():
                break
        sums = rows @ rows[member].sum(0)
        while (count := int(member.sum())) > 1:
            others = np.where(member, (sums - 1) / (count - 1), np.inf)
            worst = int(np.argmin(others))
            if others[worst] >= threshold:
                break
            member[worst] = False
            sums -= rows @ rows[worst]
        found.append(left[member])
        left = left[~member]
    return sorted(found, key=len, reverse=True)


def findings(images: Vectors, threshold: float) -> Iterator[Finding]:
    """Faults in the order of identities, duplicates last.

    Memory beside the features, which may be in a file, is one mean per part and a tile of cosines.
    """
    names, labels = np.unique(images.identities, return_inverse=True)
    order = np.argsort(labels, kind="stable")
    rows, means, owner, main = [], [], [], []
    for label, own in enumerate(np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)):
        features = np.asarray(images.features[own])
        for number, part in enumerate(parts_of(features, threshold)):
            rows.append(own[part])
            means.append(features[part].mean(0))
            owner.append(label)
            main.append(number == 0)
    table, owners, mains = np.stack(means), np.array(owner), np.array(main)
    pairs = _pairs(table, owners, mains, threshold)
    for part in np.flatnonzero(~mains):
        own = table[np.flatnonzero(mains)[owners[part]]]
        other, cosine = pairs[part][0] if part in pairs else (None, None)
        for row in rows[part]:
            yield Finding(
                kind="outlier" if len(rows[part]) == 1 else "mixed",
                identity=str(names[owners[part]]),
                image=images.names[row],
                cosine=float(images.features[row] @ own),
                other="" if other is None else str(names[other]),
                other_cosine=cosine,
            )
    for part in np.flatnonzero(mains):
        for other, cosine in pairs.get(part, ()):
            if owners[part] < other:
                ends = str(names[owners[part]]), str(names[other])
                yield Finding("duplicate", ends[0], "", cosine, ends[1], cosine)


def _pairs(
    means: NDArray[np.float32], owners: Rows, mains: NDArray[np.bool_], threshold: float
) -> dict[int, list[tuple[int, float]]]:
    """By part the identities whose main parts it belongs to, and mean cosines, the nearest first.

    Those of its own identity are left out.
    """
    gallery = np.flatnonzero(mains)
    columns = torch.from_numpy(means[gallery])
    norms = np.linalg.norm(means, axis=1)
    found: dict[int, list[tuple[int, float]]] = {}
    parts, k = np.arange(len(means)), min(NEAREST, len(gallery))
    while len(parts):
        nearest = metrics.nearest(torch.from_numpy(means[parts]), columns, k)
        scores, places = nearest.scores.numpy(), gallery[nearest.index.numpy()]
        mean_cosines = scores * norms[parts][:, None] * norms[places]
        for part, values, others in zip(parts.tolist(), mean_cosines, owners[places], strict=True):
            near = [
                (int(other), float(value))
                for value, other in zip(values, others, strict=True)
                if value >= threshold and other != owners[part]
            ]
            if near:
                found[part] = sorted(near, key=lambda pair: -pair[1])
        # A mean cosine is at most the cosine of the means: beyond one below there are no more.
        parts = parts[scores[:, -1] >= threshold] if k < len(gallery) else parts[:0]
        k = min(4 * k, len(gallery))
    return found


def report(images: Vectors, threshold: float, source: str, out: Path | None) -> None:
    """Print a summary and the first findings, and write all of them to a .csv or .json file."""
    if "" in images.identities:
        raise UserError("expected images of identities: a folder per person, or lines with one")
    found = list(findings(images, threshold))
    kinds = Counter(finding.kind for finding in found)
    people = len({f.identity for f in found if f.kind == "mixed"})
    counted = {"images": len(images), "identities": len(set(images.identities))}
    print(
        f"{counted['images']} images of {counted['identities']} identities, threshold "
        f"{threshold:.4f}, {source}:\n"
        f"  {kinds['duplicate']} pairs of identities that are one person\n"
        f"  {people} identities of several people, {kinds['mixed']} images of the others\n"
        f"  {kinds['outlier']} outliers"
    )
    # Duplicates, of which there is one line for many images, come first.
    shown = sorted(found, key=lambda finding: finding.kind != "duplicate")[:SHOWN]
    for f in shown:
        other = f" = {f.other} ({f.other_cosine:.3f})" if f.other else ""
        own = f" {f.image} ({f.cosine:.3f})" if f.image else ""
        print(f"{f.kind:9} {f.identity}{own}{other}")
    if len(found) > len(shown):
        print(f"and {len(found) - len(shown)} more{'' if out else ' (--out FILE has all)'}")
    if out is None:
        return
    rows = [asdict(finding) for finding in found]
    with reported(f"cannot write {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".json":
            write_json(out, {"threshold": threshold, "source": source, **counted, "findings": rows})
        else:
            with open_text(out) as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Finding)])
                writer.writeheader()
                writer.writerows(rows)
    print(f"{out}: {len(rows)} findings")
