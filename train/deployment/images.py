"""Images of a folder, a list, an archive of records or a single file, and their features."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from train.data.dataset import scan
from train.data.folder import has_images, is_image, natural_key
from train.data.image_list import ImageList, whole
from train.data.named import NAMED
from train.data.records import Files
from train.deployment.vectors import Vectors
from train.errors import UserError
from train.evaluation.lists import lines
from train.evaluation.model import Model
from train.evaluation.test_sets import open_uncached

BLOCK = 16384  # images embedded at a time: 32 MB of features
ARCHIVES = (".rec", ".tar")


def open_any(path: str, *, skip: bool) -> ImageList:
    """Whatever training reads, also a folder without sub-folders, a list file, or one image.

    A line of a list is a path, from the list's folder on, and after a tab the identity, if any.
    """
    root = Path(path)
    if root.is_file() and root.suffix not in ARCHIVES:
        return _listed([(path, "")]) if is_image(root.name) else _read_list(root)
    if path not in NAMED and root.is_dir() and not has_images(root):
        names = sorted((f.name for f in root.iterdir() if is_image(f.name)), key=natural_key)
        archives = (root / "train.rec").exists() or any(root.glob("*.tar"))
        if names and not archives:
            return _listed([(str(root / name), "") for name in names])
    return scan(path, skip=skip)


def _read_list(path: Path) -> ImageList:
    entries = []
    for _, line in lines(path):
        name, _, identity = line.partition("\t")
        entries.append((str(path.parent / name.strip()), identity.strip()))
    if not entries:
        raise UserError(f"{path}: expected lines of a path, or of a path, a tab and an identity")
    return _listed(entries)


def _listed(entries: list[tuple[str, str]]) -> ImageList:
    identities, labels = np.unique([identity for _, identity in entries], return_inverse=True)
    return whole(Files([name for name, _ in entries]), labels, identities.tolist())


@dataclass
class Embedded:
    """Unit features of images in blocks; ``skipped`` has a reason for each that was left out."""

    model: Model
    images: ImageList

    def __post_init__(self) -> None:
        self.skipped = dict(self.images.left_out)

    def __iter__(self) -> Iterator[Vectors]:
        images = self.images
        for start in tqdm(range(0, len(images), BLOCK), "images", disable=None):
            rows, labels = (a[start : start + BLOCK] for a in (images.rows, images.labels))
            part = replace(images, rows=rows, labels=labels)
            source = open_uncached(self.model.config, part)
            features, _ = self.model.embed(source)
            read = np.flatnonzero(source.readable())
            self.skipped.update(source.skipped)
            names = [part.name(i) for i in read.tolist()]
            if not np.isfinite(features[read]).all():
                bad = int(np.argmin(np.isfinite(features[read]).all(1)))
                raise UserError(f"{names[bad]}: its features are not finite")
            people = [images.identities[label] for label in labels[read].tolist()]
            yield Vectors.of(features[read], names, people)

    def report(self) -> None:
        if self.skipped:
            reason = next(iter(self.skipped.values()))
            print(f"{len(self.skipped)} images skipped, such as {reason}", file=sys.stderr)
