"""A folder with one sub-folder of images per identity."""

from __future__ import annotations

import os
import re
from pathlib import Path

from train.data.image_list import ImageList, whole
from train.data.records import Files
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
    return whole(Files(paths), labels, identities)


def has_images(root: Path) -> bool:
    """Whether any sub-folder holds an image."""
    return any(
        Path(f).suffix.lower() in IMAGE_SUFFIXES
        for name in _entries(root, folders=True)
        for f in _entries(root / name, folders=False)
    )


def _entries(folder: Path, *, folders: bool) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.is_dir() == folders and not e.name.startswith(".")]
