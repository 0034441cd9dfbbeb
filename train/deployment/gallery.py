"""A gallery: a unit feature per person in a file, and the nearest of them to any features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.deployment.images import BLOCK
from train.deployment.vectors import Vectors, read, writing
from train.errors import UserError, reported
from unitsface_kernels import metrics

# (n, D) unit features to cosines and rows of the gallery, (n, k) each, the nearest first.
Search = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.int64]]]


def templates(blocks: Iterable[Vectors]) -> Vectors:
    """Per identity the direction of the mean of its unit features; norms are means, too."""
    sums: dict[str, NDArray[np.float64]] = {}  # (D + 2,): features, norm, number of images
    for block in blocks:
        names, inverse = np.unique(block.identities, return_inverse=True)
        ones, norms = np.ones((len(block), 1)), np.asarray(block.norms)[:, None]
        total = np.zeros((len(names), block.features.shape[1] + 2))
        np.add.at(total, inverse, np.hstack([block.features, norms, ones]))
        for name, row in zip(names.tolist(), total, strict=True):
            sums[name] = sums[name] + row if name in sums else row
    if "" in sums:
        raise UserError("expected a folder of images per person, or the person's --name")
    table = np.stack([*sums.values()])
    people = Vectors.of(table[:, :-2].astype(np.float32), [*sums], [*sums])
    norms = (table[:, -2] / table[:, -1]).tolist()
    return Vectors(people.features, people.names, people.identities, norms)


def enroll(path: Path, people: Vectors) -> tuple[int, int]:
    """Add people to a gallery, in place of those of the same names; their number, and of all."""
    old = read(path) if path.exists() else None
    if old is not None:
        check_width(path, old, people.features.shape[1])
    new = set(people.identities)
    kept = [] if old is None else [i for i, name in enumerate(old.identities) if name not in new]
    with writing(path) as add:
        for start in range(0, len(kept), BLOCK):
            assert old is not None
            add(old.rows(kept[start : start + BLOCK]))
        add(people)
    return (0 if old is None else len(old) - len(kept)), len(kept) + len(people)


def check_width(path: Path, gallery: Vectors, width: int) -> None:
    if gallery.features.shape[1] != width:
        raise UserError(
            f"{path} has features of {gallery.features.shape[1]} numbers, the model of {width}"
        )


def searcher(gallery: Vectors, k: int, factory: str | None = None) -> Search:
    """By the package's kernels, which read the file in blocks and keep only the nearest; with
    ``factory`` by such an index of FAISS in memory.
    """
    features = gallery.features
    if factory is None:
        rows = torch.from_numpy(features)

        def search(queries: NDArray[np.float32]) -> Any:
            found = metrics.nearest(torch.from_numpy(queries), rows, k)
            return found.scores.numpy(), found.index.numpy()

        return search
    with reported("--faiss needs FAISS: pip install faiss-cpu", ImportError):
        import faiss
    with reported(f"--faiss {factory}", RuntimeError):
        index = faiss.index_factory(features.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(np.ascontiguousarray(features[:: max(1, len(features) // 2**18)]))
        for start in range(0, len(features), BLOCK):
            index.add(np.ascontiguousarray(features[start : start + BLOCK]))
    return lambda queries: index.search(queries, k)
