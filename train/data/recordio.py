"""Training sets of insightface: ``train.rec``, ``train.idx`` and ``property``.

Record 0 defines the order of the others: it has no image, and its labels (n1, n2) mean that records
1 to n1 - 1 are images and n1 to n2 - 1 identities, each with the first record of its images and the
one after the last. A set whose record 0 is an image, such as a shuffled one or one whose images
have several labels (the first is the identity), has images only.

Sources: insightface, src/data/face2rec2.py (``read_list``) and recognition/arcface_torch
(dataset.py, scripts/shuffle_rec.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.image_list import ImageList, Problems, numbered
from train.data.recordio_format import read_heads, read_record, split_record
from train.data.records import OpenFiles, RecordError
from train.errors import UserError, reported

# Numbers of records are stored as float32, which holds every integer up to here.
EXACT = 1 << 24
# By how much a number of a larger file may be off: half a step of float32 below 2^27.
ROUNDING = 4

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class RecordFile:
    """Images of a .rec file; a record that does not bear its label is an error."""

    files: OpenFiles  # one
    keys: Numbers  # (N,) the file's own numbers of the records
    offsets: Numbers  # (N,)
    labels: NDArray[np.int32]  # (N,)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        failed = f"cannot read image {self.name(index)}"
        with reported(failed, RecordError, error=RecordError):
            labels, image = split_record(read_record(self.files, int(self.offsets[index])))
        if labels[0] != self.labels[index]:
            raise RecordError(
                f"{self.name(index)}: its label is {labels[0]:g}, "
                f"{self.labels[index]} according to the records of identities"
            )
        return image

    def name(self, index: int) -> str:
        return _name(self.files, self.keys[index])


def _name(files: OpenFiles, key: int | np.integer) -> str:
    return f"{files.paths[0]}, record {int(key)}"


def scan_recordio(path: str | Path, *, skip: bool = False) -> ImageList:
    """The images of a folder with ``train.rec``, or of a .rec file. None is read.

    Labels come from the records of identities, and from each image's own header where there are
    none; identities are named by their numbers. ``skip`` leaves out what is wrong with its reason.
    """
    path = Path(path)
    rec = path / "train.rec" if path.is_dir() else path
    for needed in (rec, rec.with_suffix(".idx")):
        if not needed.is_file():
            raise UserError(f"data.path: no such file: {needed}")
    classes = _read_property(rec.with_name("property"))
    index = _Index(OpenFiles([str(rec)]), *_read_index(rec.with_suffix(".idx")), Problems(skip))
    with reported("data.path", RecordError):
        images, labels = index.images()
    ok = (labels >= 0) & (labels == np.floor(labels)) & (labels < (classes or EXACT))
    for i in np.flatnonzero(~ok & ~np.isnan(labels)).tolist():  # without a label: reported before
        least = "a whole number from 0 to"
        most = f"{classes - 1} (property: {classes} classes)" if classes else str(EXACT - 1)
        index.wrong(index.keys[images[i]], f"its label is {labels[i]:g}, expected {least} {most}")
    images, numbers = images[ok], labels[ok].astype(np.int32)
    if not len(images):
        raise UserError(f"data.path: no images in {rec}")
    records = RecordFile(index.files, index.keys[images], index.offsets[images], numbers)
    return numbered(records, numbers.astype(np.int64), index.problems)


def _read_property(path: Path) -> int | None:
    """The number of classes: the first of ``classes,height,width``."""
    if not path.is_file():
        return None
    with reported(f"cannot read {path}"), open(path, "rb") as file:
        text = file.read(100).decode("ascii", "replace").strip()
    first = text.split(",")[0].strip()
    if not first.isdigit() or int(first) == 0:
        raise UserError(f"{path}: expected 'classes,height,width', got '{text}'")
    return int(first)


def _read_index(path: Path) -> tuple[Numbers, Numbers]:
    """Keys in ascending order, and their byte offsets."""
    expected = f"{path}: expected lines of a number, a tab, a byte"
    with reported(expected, ValueError, OverflowError, OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an empty file, an error below
        table = np.loadtxt(path, dtype=np.int64, delimiter="\t", ndmin=2, comments=None)
    if table.shape[1:] != (2,) or not len(table):
        raise UserError(f"{expected}; found {table.shape}")
    keys, offsets = table[:, 0], table[:, 1]
    if not (np.diff(keys) > 0).all():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        twice = np.flatnonzero(np.diff(keys) == 0)
        if len(twice):
            raise UserError(f"{path}: record {keys[twice[0]]} is listed twice")
    return np.ascontiguousarray(keys), np.ascontiguousarray(offsets)


@dataclass
class _Index:
    """Offsets and kinds of a file's records. Rows index ``keys`` and ``offsets``."""

    files: OpenFiles
    keys: Numbers
    offsets: Numbers
    problems: Problems

    def wrong(self, key: int | np.integer, reason: str) -> None:
        self.problems.add(_name(self.files, key), reason)

    def images(self) -> tuple[Numbers, NDArray[np.float64]]:
        """Rows of the images in order of keys, and labels; NaN where there is a problem."""
        self._check_offsets()
        layout: list[float] = []
        first = int(self._rows(np.array([0]))[0])
        if first >= 0:
            try:
                record = read_record(self.files, int(self.offsets[first]))
                labels, image = split_record(record)
                layout = [] if image else labels[:2].tolist()
            except RecordError as error:
                self.wrong(0, str(error))
                # Its labels are lost: records of identities are those without an image.
                rows = np.delete(np.arange(len(self.keys)), first)
                return rows, self._own_labels(rows)
        if len(layout) < 2:
            rows = np.arange(len(self.keys))
            return rows, self._own_labels(rows)
        n1, n2 = (int(n) if float(n).is_integer() else -1 for n in layout)
        if not 1 <= n1 <= n2:
            name = _name(self.files, 0)
            raise RecordError(f"{name}: expected two ascending numbers, got {layout}")
        exact = n2 < EXACT
        wanted = self._listed(1, n1 if exact else self._first_identity(n1))
        rows = self._rows(wanted)
        labels = np.full(len(wanted), np.nan)
        if exact:
            self._label_ranges(self._listed(n1, n2), labels)
        labels, rows = labels[rows >= 0], rows[rows >= 0]
        rest = np.isnan(labels)
        labels[rest] = self._own_labels(rows[rest])
        return rows, labels

    def _listed(self, first: int, end: int) -> Numbers:
        """Keys from ``first`` to ``end`` - 1, as far as the .idx file goes; gaps are problems."""
        last = int(self.keys[-1])
        if end > last + 1:
            name = f"{_name(self.files, max(first, last + 1))} to {end - 1}"
            self.problems.add(name, "not in the .idx file")
        stop = min(end, last + 1)
        if stop - first > 2 * len(self.keys):  # mostly gaps: record 0 is wrong
            raise RecordError(
                f"{_name(self.files, 0)}: it holds records {first} to {end - 1}; "
                f"the .idx file lists {len(self.keys)}"
            )
        keys = np.arange(first, stop, dtype=np.int64)
        for key in keys[self._rows(keys) < 0].tolist():
            self.wrong(key, "it is not in the .idx file")
        return keys

    def _rows(self, keys: Numbers) -> Numbers:
        """-1 where there is no such key."""
        rows = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[rows] == keys, rows, -1)

    def _check_offsets(self) -> None:
        """No two records at one byte, and all in the file."""
        # Records were written in order of their keys: of two at one byte, it is whose neighbors'
        # bytes are before and after.
        steps = np.diff(self.offsets) > 0
        ordered = np.append(True, steps) & np.append(steps, True)
        order = np.lexsort((~ordered, self.offsets))
        same = np.flatnonzero(np.diff(self.offsets[order]) == 0)
        for i in same.tolist():
            one, other = self.keys[order[i]], self.keys[order[i + 1]]
            self.wrong(other, f"the .idx file puts it where record {one} is")
        # Dropped records are reported above, or skipped.
        dropped = order[same + 1]
        self.keys, self.offsets = np.delete(self.keys, dropped), np.delete(self.offsets, dropped)
        size = self.files.size(0)
        outside = np.flatnonzero((self.offsets < 0) | (self.offsets >= size))
        for i in outside.tolist():
            reason = f"byte {self.offsets[i]} of the .idx file is beyond the file's end"
            self.wrong(self.keys[i], f"{reason}, {size} bytes")

    def _own_labels(self, rows: Numbers) -> NDArray[np.float64]:
        heads, errors = read_heads(self.files, self.offsets[rows])
        labels = heads["label"].astype(np.float64)
        for i in np.flatnonzero(np.isnan(labels)).tolist():
            errors.setdefault(i, "its label is not a number")
        for i in np.flatnonzero(heads["image_bytes"] == 0).tolist():
            errors.setdefault(i, "it holds no image")
        for i, reason in errors.items():
            self.wrong(self.keys[rows[i]], reason)
            labels[i] = np.nan
        return labels

    def _label_ranges(self, identities: Numbers, labels: NDArray[np.float64]) -> None:
        """Sets ``labels[key - 1]`` of every identity's images to the label of its first.

        Those of an identity whose record is wrong, or whose first and last image differ, stay.
        """
        identities, first, end = self._ranges(identities, len(labels))
        ends = [self._rows(first), self._rows(end - 1)]
        present = (ends[0] >= 0) & (ends[1] >= 0)
        identities, first, end = identities[present], first[present], end[present]
        start, last = (read_heads(self.files, self.offsets[e[present]])[0] for e in ends)
        readable = (start["image_bytes"] >= 0) & (last["image_bytes"] >= 0)
        agree = start["label"] == last["label"]
        for i in np.flatnonzero(readable & ~agree).tolist():
            found = f"{start['label'][i]:g} and {last['label'][i]:g}"
            ends_of = f"records {first[i]} and {end[i] - 1} of this identity"
            self.wrong(identities[i], f"{ends_of} have labels {found}")
        agree &= readable
        counts = (end - first)[agree]
        if counts.sum() > len(labels):
            raise RecordError(f"{self.files.paths[0]}: identities share images")
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers = start["label"][agree].astype(np.float64)
        labels[np.repeat(first[agree], counts) + within - 1] = np.repeat(numbers, counts)

    def _ranges(self, identities: Numbers, images: int) -> tuple[Numbers, Numbers, Numbers]:
        """Identities with images, the first record of each and the one after the last."""
        rows = self._rows(identities)
        identities, rows = identities[rows >= 0], rows[rows >= 0]
        heads, errors = read_heads(self.files, self.offsets[rows])
        with np.errstate(invalid="ignore"):  # what is not a number compares unequal below
            first, end = (heads[f].astype(np.int64) for f in ("label", "second"))
        ok = (heads["label"] == first) & (heads["second"] == end)
        ok &= (first >= 1) & (first <= end) & (end <= images + 1)
        for i in np.flatnonzero(~ok).tolist():
            reason = f"expected the range of an identity's records, got {heads[i].tolist()[:2]}"
            self.wrong(identities[i], errors.get(i, reason))
        ok &= first < end
        return identities[ok], first[ok], end[ok]

    def _first_identity(self, rounded: int) -> int:
        """n1 of a file with too many records for float32: images have bytes, identities none."""
        near = np.flatnonzero(np.abs(self.keys - float(rounded)) <= ROUNDING)
        heads, _ = read_heads(self.files, self.offsets[near])
        empty = self.keys[near][heads["image_bytes"] == 0]
        return int(empty[0]) if len(empty) else rounded
