"""Shards as WebDataset writes them: ``*.tar`` of images and labels that share a name.

``a/17.jpg`` (or .png and other endings) with ``a/17.cls``, a number as text, or ``a/17.json`` with
"label". Members in a row whose names are equal up to the first dot are a sample; hidden files count
for nothing. Labels are decoded by the library itself. Its streams are not used: they shuffle within
a buffer and deal out whole shards, so that neither an exact continuation within an epoch nor
disjoint processes nor batches of chosen identities come out of them. Here the tar files are indexed
once and then read at any place, like all other data.

Nothing is extracted, and only local files are opened: the library would also run "pipe:" commands.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tarfile import BLOCKSIZE, TarError, TarInfo

import numpy as np
from numpy.typing import NDArray

from train.data.folder import IMAGE_SUFFIXES, LeftOut, natural_key
from train.data.image_list import ImageList, Problems, numbered
from train.data.records import MAX_BYTES, OpenFiles, RecordError
from train.data.tar_index import Member, read_members, shown
from train.errors import UserError, reported

# A sample with one of the first has it for its image, whatever else it has.
IMAGES = ("jpg", "jpeg", "png")
OTHER_IMAGES = sorted(ending[1:] for ending in IMAGE_SUFFIXES if ending[1:] not in IMAGES)
LABELS = {"cls": 64, "json": 1 << 16}  # with the most bytes that are read
MOST_SHARDS = 1_000_000
# Fewer are indexed by this process alone.
_SHARDS_PER_PROCESS = 4


@dataclass(frozen=True)
class Shards:
    """Images within tar files."""

    files: OpenFiles
    shard: NDArray[np.int32]  # (N,) index of its file
    offset: NDArray[np.int64]  # (N,) of its first byte
    size: NDArray[np.int32]  # (N,)

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, index: int) -> bytes:
        size = int(self.size[index])
        encoded = self.files.read(int(self.shard[index]), int(self.offset[index]), size)
        if len(encoded) < size:
            raise RecordError(f"cannot read image {self.name(index)}: the file has become shorter")
        return encoded

    def name(self, index: int) -> str:
        """Looked up in the file: millions of names would take more memory than all else."""
        shard = int(self.shard[index])
        header = self.files.read(shard, int(self.offset[index]) - BLOCKSIZE, BLOCKSIZE)
        try:
            member = TarInfo.frombuf(header, "utf-8", "replace").name
        except TarError:
            member = f"at byte {self.offset[index]}"
        return f"{self.files.paths[shard]}, member {shown(member)}"


def is_remote(path: str) -> bool:
    """An address or a command instead of a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path) is not None and not Path(path).exists()


def is_pattern(path: str) -> bool:
    return path.endswith(".tar") and any(c in path for c in "{*?[") and not Path(path).exists()


def scan_shards(path: str | Path, *, skip: bool = False) -> ImageList:
    """The images of a folder of .tar files, of one, or of a pattern. None is read.

    ``skip`` leaves out what is wrong with its reason.
    """
    with reported("shards are read with webdataset: pip install webdataset", ImportError):
        import webdataset  # noqa: F401  # here, so that the processes below need not
    paths = list_shards(str(path))
    problems, left_out = Problems(skip), LeftOut()
    shard, offset, size, label = [], [], [], []
    for i, (found, messages, nameless) in enumerate(_index_all(paths)):
        for name, reason in messages:
            problems.add(name, reason)
        left_out.add("member(s) whose names have no ending", nameless)
        shard.append(np.full(len(found), i, np.int32))
        offset.append(found[:, 0])
        size.append(found[:, 1].astype(np.int32))
        label.append(found[:, 2])
    records = Shards(
        OpenFiles(paths), np.concatenate(shard), np.concatenate(offset), np.concatenate(size)
    )
    if not len(records):
        raise UserError(f"data.path: no images in the {len(paths)} shard(s) of {path}")
    left_out.report(f"data.path: {path}")
    return numbered(records, np.concatenate(label), problems)


def list_shards(path: str) -> list[str]:
    """The files that ``data.path`` means, in natural order."""
    if is_remote(path):
        raise UserError(f"data.path: shards must be local files, got {path}")
    if Path(path).is_dir():
        found = [str(p) for p in Path(path).glob("*.tar")]
    elif is_pattern(path):
        found = _expand(path)
    else:
        found = [path]
    missing = next((p for p in found if not Path(p).is_file()), None)
    if missing is not None:
        raise UserError(f"data.path: no such file: {missing}")
    if not found:
        raise UserError(f"data.path: no .tar files: {path}")
    return sorted(found, key=natural_key)


def _expand(pattern: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand

    folder = os.path.dirname(re.split(r"[{*?\[]", pattern, maxsplit=1)[0])

    def check(name: str) -> None:
        if re.search(r"(^|/)\.\.", name[len(folder) :]):
            raise UserError(f"data.path: {pattern} leads outside of {folder or 'its folder'}")

    check(pattern)
    ranges = re.findall(r"\{(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})", pattern)
    if math.prod(abs(int(a) - int(b)) + 1 for a, b in ranges) > MOST_SHARDS:
        raise UserError(f"data.path: {pattern} means more than {MOST_SHARDS} shards")
    with reported(f"data.path: {pattern}: braces do not match", UnbalancedBracesError):
        names = list(braceexpand(pattern))
    found: list[str] = []
    for name in names:
        check(name)
        found += glob.glob(name) if any(c in name for c in "*?[") else [name]
    return list(dict.fromkeys(found))


Found = tuple[NDArray[np.int64], list[tuple[str, str]], list[str]]


def _index_all(paths: Sequence[str]) -> Iterator[Found]:
    """Offset, size and label of the images in each, (N, 3), what is wrong in it, and members that
    belong to no sample.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    processes = min(len(paths) // _SHARDS_PER_PROCESS, (os.cpu_count() or 1) // ranks)
    if processes < 2:
        yield from map(_index, paths)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        yield from pool.map(_index, paths)


def _index(path: str) -> Found:
    wrong: list[tuple[str, str]] = []
    nameless: list[str] = []
    files = OpenFiles([path])
    found: list[tuple[int, int, int]] = []
    for key, sample in _samples(read_members(path, wrong), path, wrong, nameless):
        try:
            image, label = _read_sample(files, sample)
            found.append((image.offset, image.size, label))
        except RecordError as error:
            wrong.append((f"{path}, sample {shown(key)}", str(error)))
    return np.array(found, np.int64).reshape(-1, 3), wrong, nameless


def _samples(
    members: Iterator[Member], path: str, wrong: list[tuple[str, str]], nameless: list[str]
) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members of one name in a row, by what follows the first dot of it."""
    key, sample = "", dict[str, Member]()
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, dot, ending = file.partition(".")
        if not stem or not dot:
            nameless.append(f"{path}, member {shown(member.name)}")
            continue
        if (name := folder + slash + stem) != key and sample:
            yield key, sample
            sample = {}
        key = name
        if sample.setdefault(ending.lower(), member) is not member:
            wrong.append((f"{path}, member {shown(member.name)}", "duplicate file name"))
    if sample:
        yield key, sample


def _read_sample(files: OpenFiles, sample: dict[str, Member]) -> tuple[Member, int]:
    """The image's member, and the label."""
    images = [sample[e] for e in IMAGES if e in sample]
    images = images or [sample[e] for e in OTHER_IMAGES if e in sample]
    if len(images) != 1:
        raise RecordError(
            f"expected one image, .{', .'.join((*IMAGES, *OTHER_IMAGES))}; found {len(images)}"
        )
    if images[0].size > MAX_BYTES:
        raise RecordError(f"it has {images[0].size} bytes, more than {MAX_BYTES}")
    extension = next((e for e in LABELS if e in sample), None)
    if extension is None:
        raise RecordError("no label: expected a .cls or .json")
    member = sample[extension]
    if member.size > LABELS[extension]:
        raise RecordError(f"its .{extension} has {member.size} bytes, a label needs fewer")
    return images[0], _read_label(files.read(0, member.offset, member.size), extension)


def _read_label(content: bytes, extension: str) -> int:
    from webdataset.autodecode import basichandlers

    try:
        value = basichandlers(f".{extension}", content)
        if extension == "json":
            value = value["label"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = 'JSON with "label"' if extension == "json" else "a number"
        raise RecordError(f"its .{extension} is not {what}: {content[:20]!r}") from error
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise RecordError(f"its label is {str(value)[:20]}, expected a whole number from 0 on")
    return value
