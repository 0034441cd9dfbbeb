"""The meta files of IJB-B and IJB-C, as insightface distributes them.

========================================  ====================================================
``ijbc_face_tid_mid.txt``                 per image: its name, template, medium
``ijbc_name_5pts_score.txt``              per image, in the same order: its name, five landmarks
                                          x y, the detector's score
``ijbc_template_pair_label.txt``          per pair: two templates, 1 for the same person or 0
``ijbc_1N_gallery_G1.csv``, ``_G2.csv``   NIST's tables, a line per image: TEMPLATE_ID, SUBJECT_ID
and ``ijbc_1N_probe_mixed.csv``           and columns not needed here
========================================  ====================================================

IJB-B's are called ``ijbb_...``, and its galleries S1 and S2.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError, reported
from train.evaluation.lists import inside, integers, lines, whole_numbers

Ints = NDArray[np.int64]

_BEYOND_IMAGES = 1e6  # of landmarks, in pixels; also false of what is not a number
GALLERIES = {"ijbc": ("G1", "G2"), "ijbb": ("S1", "S2")}


@dataclass(frozen=True)
class Faces:
    """N images: where they are, and to which template and medium they belong."""

    names: list[str]
    templates: Ints  # (N,)
    media: Ints  # (N,)
    landmarks: NDArray[np.float64]  # (N, 5, 2)
    scores: NDArray[np.float64]  # (N,) of the face detector


@dataclass(frozen=True)
class Subjects:
    """T templates and whom they show."""

    templates: Ints  # (T,) ascending
    subjects: Ints  # (T,)


def read_faces(folder: Path, prefix: str) -> Faces:
    """The two lists of images, which must name the same ones in the same order."""
    members = folder / f"{prefix}_face_tid_mid.txt"
    details = folder / f"{prefix}_name_5pts_score.txt"
    names, ids = [], []
    for where, line in lines(members):
        name, *rest = line.split()
        names.append(inside(name, where))
        ids.append(whole_numbers(where, rest, "template medium"))
    values = []
    for where, line in lines(details):
        name, *rest = line.split()
        if len(values) >= len(names) or name != names[len(values)]:
            listed = names[len(values)] if len(values) < len(names) else "no image"
            raise UserError(f"{where}: expected {listed} as in {members.name}, got {name[:80]!r}")
        values.append(_landmarks_and_score(where, rest))
    if not names or len(values) < len(names):
        raise UserError(f"{details}: expected {len(names)} images, at least 1; got {len(values)}")
    templates, media = np.array(ids, dtype=np.int64).T
    numbers = np.array(values)
    return Faces(names, templates, media, numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10])


def _landmarks_and_score(where: str, words: list[str]) -> list[float]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) != 11 or not (np.abs(values) < _BEYOND_IMAGES).all():
        raise UserError(
            f"{where}: expected 5 landmarks x y and a score, got {' '.join(words)[:80]!r}"
        )
    if values[0:10:2] == [values[0]] * 5 and values[1:10:2] == [values[1]] * 5:
        raise UserError(f"{where}: the five landmarks are one point")
    return values


def read_pairs(folder: Path, prefix: str, faces: Faces) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Templates of each pair, and whether they show the same person."""
    path = folder / f"{prefix}_template_pair_label.txt"
    table = integers(path, "template template label")
    first, second, label = table.T
    wrong = np.flatnonzero((label != 0) & (label != 1))
    if wrong.size:
        raise UserError(
            f"{path}, pair {wrong[0] + 1}: expected label 0 or 1, got {label[wrong[0]]}"
        )
    if len(np.unique(label)) < 2:
        raise UserError(f"{path}: expected pairs of the same person and of different ones")
    _check_listed(path, table[:, :2], faces)
    return first, second, label == 1


def read_search(folder: Path, prefix: str, faces: Faces) -> tuple[Subjects, Subjects, Subjects]:
    """Both galleries and the probes."""
    names = [f"gallery_{gallery}" for gallery in GALLERIES[prefix]] + ["probe_mixed"]
    paths = [folder / f"{prefix}_1N_{name}.csv" for name in names]
    first, second, probes = (read_subjects(path) for path in paths)
    for path, listed in zip(paths, (first, second, probes), strict=True):
        _check_listed(path, listed.templates, faces)
    return first, second, probes


def _check_listed(path: Path, templates: Ints, faces: Faces) -> None:
    missing = np.setdiff1d(templates, faces.templates)
    if missing.size:
        raise UserError(f"{path}: template {missing[0]} has no images in face_tid_mid.txt")


def read_subjects(path: Path) -> Subjects:
    subject_of: dict[int, int] = {}
    for where, template, subject in _template_lines(path):
        if subject_of.setdefault(template, subject) != subject:
            raise UserError(
                f"{where}: template {template} shows subject {subject} here,"
                f" {subject_of[template]} before"
            )
    if not subject_of:
        raise UserError(f"{path}: no templates")
    templates, subjects = np.array(sorted(subject_of.items()), dtype=np.int64).T
    return Subjects(templates, subjects)


def _cells(where: Path | str, line: str) -> list[str]:
    # Such as a field of more than 128 kB.
    with reported(f"{where}: not a line of a CSV file", csv.Error):
        return next(csv.reader([line]), [])


def _template_lines(path: Path) -> Iterator[tuple[str, int, int]]:
    rows = lines(path)
    _, header = next(rows, ("", ""))
    columns = [name.strip().lstrip("\ufeff").upper() for name in _cells(path, header)]
    try:
        template, subject = columns.index("TEMPLATE_ID"), columns.index("SUBJECT_ID")
    except ValueError:
        raise UserError(
            f"{path}: expected a header with TEMPLATE_ID and SUBJECT_ID, got {header[:80]!r}"
        ) from None
    for where, line in rows:
        cells = _cells(where, line)
        if len(cells) <= max(template, subject):
            raise UserError(f"{where}: expected {len(columns)} columns, got {len(cells)}")
        ids = whole_numbers(where, [cells[template], cells[subject]], "TEMPLATE_ID SUBJECT_ID")
        yield where, ids[0], ids[1]
