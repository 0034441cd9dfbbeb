"""A folder with one sub-folder of images per identity."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from train.errors import UserError

IMAGE_SUFFIXES = frozenset(
    [
        ".bmp",
        ".gif",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which s2 comes before s10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(parts)]


@dataclass(frozen=True)
class ImageList:
    """Image files and their identities: ``labels[i]`` indexes ``identities``."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    identities: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def keep(self, rows: list[int]) -> ImageList:
        """These images only, with labels counted from 0 again over the identities that remain."""
        used = sorted({self.labels[i] for i in rows})
        new_label = {label: k for k, label in enumerate(used)}
        return ImageList(
            paths=tuple(self.paths[i] for i in rows),
            labels=tuple(new_label[self.labels[i]] for i in rows),
            identities=tuple(self.identities[label] for label in used),
        )


def scan_folder(path: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> ImageList:
    """List the images of every identity, both in natural order. Nothing is decoded."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"data.path: no such folder: {root}")
    if not root.is_dir():
        raise UserError(f"data.path: not a folder: {root}")
    paths: list[str] = []
    labels: list[int] = []
    identities: list[str] = []
    try:
        for name in sorted(_entries(root, folders=True), key=natural_key):
            files = [
                f
                for f in _entries(root / name, folders=False)
                if Path(f).suffix.lower() in suffixes
            ]
            if files:
                paths += [str(root / name / f) for f in sorted(files, key=natural_key)]
                labels += [len(identities)] * len(files)
                identities.append(name)
    except OSError as error:
        raise UserError(f"data.path: cannot read {error.filename}: {error.strerror}") from error
    if not paths:
        raise UserError(f"data.path: no images in sub-folders of {root}; need one per identity")
    return ImageList(tuple(paths), tuple(labels), tuple(identities))


def _entries(folder: Path, *, folders: bool) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.is_dir() == folders and not e.name.startswith(".")]


def split_identities(images: ImageList, holdout: int) -> tuple[ImageList, ImageList]:
    """Training and test images: the last ``holdout`` identities are the test, in natural order."""
    count = len(images.identities)
    if count - holdout < 2:
        held = f" besides the {holdout} held out" if holdout else ""
        raise UserError(f"data.path: need at least 2 identities to train on{held}, found {count}")
    first_test = count - holdout
    rows = range(len(images))
    return (
        images.keep([i for i in rows if images.labels[i] < first_test]),
        images.keep([i for i in rows if images.labels[i] >= first_test]),
    )
