"""A folder with one sub-folder of images per identity."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from train.data.image_list import ImageList, Problems, whole
from train.data.records import Files
from train.errors import UserError, printable, reported

# Endings of what train.data.decode reads; .jfif is JPEG as browsers on Windows save it.
_ENDINGS = (
    ".apng .bmp .dib .gif .jfi .jfif .jif .jpe .jpeg .jpg .pbm .pgm .pjp .pjpeg .png .pnm .ppm "
    ".tif .tiff .webp"
)
IMAGE_SUFFIXES = frozenset(_ENDINGS.split())
# Made by systems, not by users; hidden files and folders are ignored.
_SYSTEM_FOLDERS = ("lost+found", "__MACOSX", "@eaDir", "System Volume Information", "$RECYCLE.BIN")
_MOST_SEARCHED = 10_000  # entries, for an example in an error


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which s2 comes before s10. Names that are equal as numbers (1, 01) are ordered
    as text, so that the order is the same on every machine.
    """
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(p), "") if i % 2 else (1, 0, p) for i, p in enumerate(parts)], name


@dataclass
class LeftOut:
    """Entries that a scan has passed over: per kind a count and an example."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, names: list[str]) -> None:
        if names:
            count, example = self.kinds.get(kind, (0, names[0]))
            self.kinds[kind] = count + len(names), example

    def report(self, where: str) -> None:
        """Prints one line on the standard error stream, in the first process of a run."""
        if self.kinds and os.environ.get("RANK", "0") == "0":
            parts = [f"{n} {kind} (such as {example})" for kind, (n, example) in self.kinds.items()]
            print(printable(f"{where}: left out: {'; '.join(parts)}"), file=sys.stderr)


def scan_folder(
    path: str | Path,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    *,
    skip: bool = False,
    report: bool = True,
) -> ImageList:
    """List the images of every identity, both in natural order. Nothing is decoded.

    Files that are not images of an identity are left out, and with ``report`` counted in one line.
    ``skip`` leaves out sub-folders that cannot be read.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"data.path: no such folder: {root}")
    if not root.is_dir():
        raise UserError(f"data.path: not a folder: {root}; files that are read are .rec and .tar")
    paths: list[str] = []
    labels: list[int] = []
    identities: list[str] = []
    problems, left_out = Problems(skip), LeftOut()
    with reported(f"data.path: cannot read {root}"):
        folders, beside = _entries(root)
    left_out.add("file(s) outside of the identities' folders", sorted(beside))
    left_out.add("folder(s) of the system", [f for f in _SYSTEM_FOLDERS if f in folders])
    for name in sorted(set(folders).difference(_SYSTEM_FOLDERS), key=natural_key):
        try:
            nested, files = _entries(root / name)
        except OSError as error:
            problems.add(str(root / name), f"cannot be read: {error.strerror}")
            continue
        images = [f for f in files if is_image(f, suffixes)]
        others = [f"{name}/{f}" for f in files if not is_image(f, suffixes)]
        left_out.add("file(s) without the ending of an image that is read", sorted(others))
        left_out.add("folder(s) within those of identities", sorted(f"{name}/{f}" for f in nested))
        if images:
            paths += [str(root / name / f) for f in sorted(images, key=natural_key)]
            labels += [len(identities)] * len(images)
            identities.append(name)
        elif not files and not nested:
            left_out.add("empty folder(s)", [name])
    if not paths:
        raise UserError(f"data.path: no images in sub-folders of {root}; {_advice(root, suffixes)}")
    if report:
        left_out.report(f"data.path: {root}")
    return whole(Files(paths), labels, identities, left_out=problems.messages)


def is_image(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a name is that of an image of a training set; hidden files are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _advice(root: Path, suffixes: frozenset[str]) -> str:
    """A remedy for a folder that holds no images where they should be."""
    files = (
        Path(parent, name).relative_to(root)
        for parent, folders, names in os.walk(root)
        for name in [*names, *(f"{f}/" for f in folders)]
    )
    image = next((f for f in islice(files, _MOST_SEARCHED) if is_image(f.name, suffixes)), None)
    if image is None:
        return f"need one per identity, of {', '.join(sorted(suffixes))}"
    if len(image.parts) == 1:
        return f"images such as {image} lie in the folder itself: give each identity a folder"
    above = root.joinpath(*image.parts[:-2])
    return (
        f"images such as {image} lie deeper: name the folder of the identities' folders, such as "
        f"data.path={above}"
    )


def has_images(root: Path) -> bool:
    """True if any sub-folder holds an image."""
    for name in _entries(root)[0]:
        with suppress(OSError):  # reported where it is listed
            if any(map(is_image, _entries(root / name)[1])):
                return True
    return False


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in it that are not hidden."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else files).append(entry.name)
    return folders, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
