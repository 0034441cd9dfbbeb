"""MegaFace: probes among distractors that come in blocks; memory does not grow with their number.

Identification: for every two images of a person, one searches for the other among it and all
distractors: it is found at rank r if fewer than r distractors score as much or more.
Verification: positive pairs are those two images (each pair once), negative pairs all probes with
all distractors; of these only as many of the largest are kept as the largest false accept rate
allows.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from train.data.records import Files
from train.distributed import choose_device
from train.errors import UserError
from train.evaluation.commands import Output, load
from train.evaluation.megaface_files import (
    feature_path,
    read_features,
    read_list,
    read_noises,
    without_noises,
    write_feature,
)
from train.evaluation.model import Model, evaluation_config
from train.evaluation.rates import allowed, shown, true_accepts, without_unresolved

ARGUMENTS: dict[str, dict[str, Any]] = {
    "--probes": {"type": Path, "required": True, "help": "folder of FaceScrub's images"},
    "--gallery": {"type": Path, "required": True, "help": "folder of the distractors"},
    **{
        f"--{name}-list": {"type": Path, "help": f"{listed} or the devkit's JSON; else all images"}
        for name, listed in (("probe", "facescrub_lst"), ("gallery", "megaface_lst"))
    },
    "--probe-noises": {"type": Path, "help": "facescrub_noises.txt"},
    "--gallery-noises": {"type": Path, "help": "megaface_noises.txt"},
    "--write-features": {
        "type": Path,
        "metavar": "DIR",
        "help": "for the devkit, DIR/{facescrub,megaface}",
    },
    "--read-features": {
        "type": Path,
        "metavar": "DIR",
        "help": "take features from there, not from images",
    },
    "--algorithm": {"default": "unitsface", "help": "end of feature files' names"},
}
BLOCK = 16384  # distractors embedded at a time: 32 MB of features
RANKS = (1, 10)
FARS = (1e-6, 1e-5, 1e-4)
SCORES = 2**24  # of probes with distractors at a time: 64 MB


def evaluate(arguments: Namespace) -> None:
    """MegaFace: identification and verification among distractors."""
    if "/" in arguments.algorithm:
        raise UserError(f"--algorithm: expected a part of a file name, got {arguments.algorithm}")
    probes = read_list(arguments.probe_list, arguments.probes, people=True)
    gallery = read_list(arguments.gallery_list, arguments.gallery, people=False)
    listed = len(probes.names), len(gallery.names)
    probes = without_noises(probes, read_noises(arguments.probe_noises), 1)
    gallery = without_noises(gallery, read_noises(arguments.gallery_noises), 3)
    if not probes.names or not gallery.names:
        raise UserError("nothing is left without the images listed as noise")
    out = Output(arguments.out)
    model = load(arguments) if arguments.read_features is None else None
    if model is None:
        device = choose_device(evaluation_config(arguments.overrides).train.device, 0)
    else:
        device = model.device

    features, read = _features(model, "facescrub", probes.names, arguments)
    people = [person for person, good in zip(probes.people, read, strict=True) if good]
    identification = Identification(features[read], people, len(gallery.names), device=device)
    for start in tqdm(range(0, len(gallery.names), BLOCK), "distractors", disable=None):
        names = gallery.names[start : start + BLOCK]
        features, read = _features(model, "megaface", names, arguments)
        identification.add(features[read])
    found = identification.metrics()
    metrics = without_unresolved(found, int(found["negatives"])) | {
        "noise_probes": listed[0] - len(probes.names),
        "noise_distractors": listed[1] - len(gallery.names),
        "skipped_probes": len(probes.names) - len(people),
        "skipped_distractors": len(gallery.names) - identification.distractors,
    }
    for name, value in metrics.items():
        print(f"{name:<20} {shown(value)}")
    out.json("megaface.json", metrics)


def _features(
    model: Model | None, kind: str, names: list[str], arguments: Namespace
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features of images by the model, without one out of files; and which could be read."""

    def paths(root: Path) -> list[Path]:
        return [feature_path(root, name, arguments.algorithm, kind=kind) for name in names]

    if model is None:
        skip = evaluation_config(arguments.overrides).data.on_error == "skip"
        return read_features(paths(arguments.read_features), skip=skip)
    folder = arguments.probes if kind == "facescrub" else arguments.gallery
    features, read = model.embed_records(Files([str(folder / name) for name in names]))
    if arguments.write_features is not None:
        lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        written = zip(paths(arguments.write_features), features / lengths, read, strict=True)
        for path, feature, good in written:
            if good:
                write_feature(path, feature)
    return features, read


class Identification:
    def __init__(
        self,
        probes: NDArray[np.float32],
        people: Sequence[str],
        most_distractors: int,
        *,
        device: torch.device | str = "cpu",
        ranks: Sequence[int] = RANKS,
        fars: Sequence[float] = FARS,
    ) -> None:
        self.ranks, self.fars = ranks, fars
        self.probes = _unit(probes, device)
        _, self.person = np.unique(np.asarray(people), return_inverse=True)
        if len(self.person) == 0 or np.bincount(self.person).max() < 2:
            raise UserError("no person has two readable probes")
        self.distractors = 0
        self._keep = allowed(max(fars), len(people) * most_distractors) + 1
        self._top = torch.full((len(people), max(ranks)), -torch.inf, device=device)
        self._largest = torch.empty(0, device=device)

    def add(self, distractors: NDArray[np.float32]) -> None:
        """A block of (n, D) features; small ones are cheaper together."""
        rows = max(1, SCORES // len(self.probes))
        for start in range(0, len(distractors), rows):
            block = _unit(distractors[start : start + rows], self.probes.device)
            if block.shape[1] != self.probes.shape[1]:
                sizes = f"{self.probes.shape[1]} and {block.shape[1]}"
                raise UserError(f"features of probes and distractors differ in size: {sizes}")
            self._add(self.probes @ block.T)
            self.distractors += len(block)

    def _add(self, scores: Tensor) -> None:
        top = torch.cat([self._top, scores], dim=1)
        self._top = top.topk(self._top.shape[1], dim=1).values
        flat = scores.flatten()
        if len(self._largest) == self._keep:
            flat = flat[flat > self._largest[-1]]  # topk sorts
        flat = torch.cat([self._largest, flat])
        self._largest = flat.topk(min(self._keep, len(flat))).values

    def metrics(self) -> dict[str, float]:
        found = dict.fromkeys(self.ranks, 0)
        searches, positives = 0, []
        for person in range(int(self.person.max()) + 1):
            rows = torch.from_numpy(np.flatnonzero(self.person == person))
            rows = rows.to(self.probes.device)
            scores = self.probes[rows] @ self.probes[rows].T
            others = ~torch.eye(len(rows), dtype=torch.bool, device=scores.device)
            for rank in self.ranks:
                beats = scores > self._top[rows, rank - 1, None]
                found[rank] += int((beats & others).sum())
            searches += int(others.sum())
            positives.append(scores[others.triu()])
        negatives = len(self.probes) * self.distractors
        return {
            **{f"rank-{rank}": found[rank] / searches for rank in self.ranks},
            **true_accepts(
                torch.cat(positives).cpu().numpy(),
                self._largest.cpu().numpy(),
                negatives,
                self.fars,
            ),
            "probes": len(self.probes),
            "distractors": self.distractors,
            "negatives": negatives,
        }


def _unit(features: NDArray[np.float32], device: torch.device | str) -> Tensor:
    if not np.isfinite(features).all():
        raise UserError("the model's features are not finite")
    return torch.nn.functional.normalize(torch.as_tensor(features, device=device), dim=1)
