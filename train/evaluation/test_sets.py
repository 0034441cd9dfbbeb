"""Test sets of a model, in training and after: images, and metrics of their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from train.config import Config
from train.data.dataset import open_source
from train.data.image_list import ImageList, whole
from train.data.loader import ImageSource
from train.data.records import Encoded
from train.errors import UserError
from train.evaluation.plain_pickle import Array, read_plain
from train.evaluation.verification import (
    FARS,
    FOLDS,
    Bools,
    Device,
    Floats,
    auc,
    best_threshold,
    evaluate_features,
    has_both_kinds,
)

FAR = 1e-3  # of the ten-fold protocol


@dataclass(frozen=True)
class HeldOut:
    """All pairs of images of identities that were never trained on."""

    source: ImageSource
    name: str = "held_out"
    # By which a best model may be chosen.
    metrics: ClassVar[Sequence[str]] = (
        *("accuracy", "auc", *(f"tar@far={far:g}" for far in FARS), "accuracy_at_threshold"),
    )

    def score(
        self, features: Floats, *, threshold: float | None = None, device: Device = "cpu"
    ) -> dict[str, float]:
        """Metrics of flip-summed (N, D) features of all images in order.

        ``threshold`` is the learned unified threshold b / s, a cosine.
        """
        read = self.source.readable()
        labels = self.source.images.labels[read]
        result = evaluate_features(features[read], labels, threshold=threshold, device=device)
        metrics = {
            "accuracy": result.accuracy,
            "auc": result.auc,
            **{f"tar@far={far}": tar for far, tar in result.tar_at_far.items()},
            "best_threshold": result.best_threshold,
        }
        if result.accuracy_at_threshold is not None:
            metrics["accuracy_at_threshold"] = result.accuracy_at_threshold
        return metrics


@dataclass(frozen=True)
class BinSet:
    """Pairs of images, evaluated by the ten-fold protocol."""

    name: str
    source: ImageSource
    same: Bools  # (P,)
    metrics: ClassVar[Sequence[str]] = (
        *("accuracy", "auc", f"val@far={FAR:g}", "accuracy_at_threshold"),
    )

    def score(
        self, features: Floats, *, threshold: float | None = None, device: Device = "cpu"
    ) -> dict[str, float]:
        """Metrics of (2P, D) flip-summed features. Accuracies are fractions of all pairs.

        Pairs of which an image could not be read are left out, and counted.
        """
        distances, same = self._distances(features)
        cosines = 1 - distances / 2
        fold = fold_of(len(self.same))[self._read_pairs()]
        accuracies, rates = ten_folds(distances, same, fold)
        metrics = {
            "accuracy": float(np.mean(accuracies)),
            "accuracy_std": float(np.std(accuracies)),
            "auc": auc(cosines, same),
            f"val@far={FAR:g}": float(np.mean(rates)) if rates else float("nan"),
            f"val_std@far={FAR:g}": float(np.std(rates)) if rates else float("nan"),
            "best_threshold": best_threshold(cosines, same),
            "pairs": len(same),
        }
        if threshold is not None:
            metrics["accuracy_at_threshold"] = float(((cosines >= threshold) == same).mean())
        if len(same) < len(self.same):
            metrics["skipped_pairs"] = len(self.same) - len(same)
        return metrics

    def pair_scores(self, features: Floats) -> tuple[NDArray[np.float64], Bools]:
        """Cosines and same-identity flags of the pairs that could be read."""
        distances, same = self._distances(features)
        return 1 - distances / 2, same

    def _distances(self, features: Floats) -> tuple[NDArray[np.float64], Bools]:
        """Squared distances of unit features, as the protocol has them, and flags."""
        if len(features) != 2 * len(self.same) or not np.isfinite(features).all():
            raise UserError(f"{self.name}: expected {2 * len(self.same)} finite features")
        unit = features.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        read = self._read_pairs()
        same = self.same[read]
        if len(np.unique(same)) < 2:
            raise UserError(f"{self.name}: no pairs of both kinds are left, {len(same)} readable")
        return np.square(unit[0::2] - unit[1::2]).sum(1)[read], same

    def _read_pairs(self) -> Bools:
        return self.source.readable().reshape(-1, 2).all(1)


TestSet = HeldOut | BinSet


def open_test_sets(config: Config, held_out: ImageList) -> list[TestSet]:
    """The identities held out, if they form pairs of both kinds, and the sets of ``eval.sets``."""
    sets: list[TestSet] = []
    if has_both_kinds(held_out.labels):
        source = open_source(config, held_out)
        if has_both_kinds(source.images.labels):  # of those that can be read
            sets.append(HeldOut(source))
    return [*sets, *open_bin_sets(config.eval.sets, config, [test.name for test in sets])]


def open_bin_sets(
    paths: Sequence[str | Path], config: Config, others: Sequence[str] = ()
) -> list[BinSet]:
    """Metrics are filed under the names of the sets, which must differ, also from ``others``."""
    names = [*others, *(Path(path).stem for path in paths)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two test sets are called '{name}'; rename one of the files")
    return [open_bin_set(path, config) for path in paths]


# -- the ten-fold protocol ------------------------------------------------------------------


def fold_of(pairs: int) -> NDArray[np.int64]:
    """(pairs,) numbers of the folds; the first ones take what does not divide."""
    parts = np.array_split(np.arange(pairs), FOLDS)
    return np.repeat(np.arange(FOLDS), [len(part) for part in parts])


def ten_folds(
    distances: Floats, same: Bools, fold: NDArray[np.int64]
) -> tuple[list[float], list[float]]:
    """The protocol of LFW, as published with FaceNet and insightface: accuracies and validation
    rates of the folds, out of (P,) squared distances of unit features, flags and fold numbers.

    Pairs fall into ten contiguous folds, unshuffled. Each fold is evaluated at the threshold that
    is best on the nine others: for the accuracy out of a grid of 0.01, for the fraction of
    positives accepted ("validation rate") where a grid of 0.001, interpolated, reaches the false
    accept rate.
    See recognition/arcface_torch/eval/verification.py of insightface.
    """
    used = np.unique(fold)  # pairs may be missing
    members = [fold == k for k in used]
    sizes = np.array([mine.sum() for mine in members])
    different = np.array([(mine & ~same).sum() for mine in members])

    def below(kind: Bools, thresholds: Floats) -> NDArray[np.int64]:
        """(folds, T): how many pairs of this kind are below each threshold."""
        ordered = [np.sort(distances[mine & kind]) for mine in members]
        return np.array([np.searchsorted(values, thresholds) for values in ordered])

    grid = np.arange(0, 4, 0.01)
    correct = below(same, grid) + different[:, None] - below(~same, grid)
    best = np.argmax(correct.sum(0) - correct, axis=1)
    accuracies = correct[np.arange(len(used)), best] / sizes

    grid = np.arange(0, 4, 0.001)
    accepted = below(~same, grid)
    rates = []
    for i, mine in enumerate(members):
        positives = distances[mine & same]
        others = different.sum() - different[i]
        if not positives.size or not others:  # a fold without them has no rate
            continue
        # Where several thresholds reach FAR, the largest counts.
        far = (accepted.sum(0) - accepted[i]) / others
        threshold = np.interp(FAR, far, grid) if far.max() >= FAR else 0.0
        rates.append(float((positives < threshold).mean()))
    return accuracies.tolist(), rates


# -- files ----------------------------------------------------------------------------------


def open_bin_set(path: str | Path, config: Config) -> BinSet:
    """A verification set as insightface distributes them: lfw.bin, cfp_fp.bin, agedb_30.bin, ...

    A pickle of ``(images, same)``: 2P encoded images, of which 2p and 2p + 1 form pair p, and P
    flags. Images are byte strings (of Python 2 or 3) or uint8 arrays of encoded bytes. See
    ``load_bin`` in recognition/arcface_torch/eval/verification.py of insightface.

    Encoded images stay in memory, some 5 kB each, and are decoded when they are needed: decoded, a
    set of 7000 pairs would take half a gigabyte in each process.
    """
    path = Path(path)
    images, same = _read(path)
    labels = np.repeat(np.arange(len(same)), 2).tolist()
    names = [f"pair {p}" for p in range(len(same))]
    listed = whole(Encoded(images, str(path)), labels, names, named=False)
    return BinSet(path.stem, open_uncached(config, listed), same)


def open_uncached(config: Config, images: ImageList) -> ImageSource:
    """A source of these images that decodes them again for every pass."""
    return open_source(replace(config, data=replace(config.data, cache="never")), images)


def _read(path: Path) -> tuple[list[bytes], Bools]:
    values = read_plain(path)
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise UserError(f"{path}: expected a pair (images, same), got {type(values).__name__}")
    encoded, flags = values
    if not isinstance(encoded, (list, tuple)):
        raise UserError(f"{path}: expected a list of images, got {type(encoded).__name__}")
    same = _flags(flags, path)
    if len(encoded) != 2 * len(same):
        raise UserError(
            f"{path}: expected two images per pair, got {len(encoded)} images, {len(same)} pairs"
        )
    if len(same) < FOLDS or len(np.unique(same)) < 2:
        raise UserError(
            f"{path}: expected {FOLDS} pairs or more, of the same and of different people; "
            f"got {int(same.sum())} and {int((~same).sum())}"
        )
    return [_image(value, i, path) for i, value in enumerate(encoded)], same


def _flags(values: Any, path: Path) -> Bools:
    flags = values.values().tolist() if isinstance(values, Array) else values
    if not isinstance(flags, (list, tuple)):
        raise UserError(f"{path}: expected a list of flags, got {type(values).__name__}")
    for i, flag in enumerate(flags):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise UserError(f"{path}, pair {i}: expected a flag, got {_shown(flag)}")
    return np.asarray(flags, dtype=bool)


def _shown(value: Any) -> str:
    """Short: of nested lists or long numbers the text may have no end."""
    if isinstance(value, (str, bytes)):
        return repr(value[:40])
    short = isinstance(value, int) and abs(value) < 2**64
    return repr(str(value)) if short else type(value).__name__


def _image(value: Any, index: int, path: Path) -> bytes:
    if isinstance(value, Array) and value.dtype is not None and value.dtype.code in ("u1", "i1"):
        value = value.data
    if not isinstance(value, bytes):
        kind = type(value).__name__
        raise UserError(f"{path}, image {index}: expected the bytes of an image, got {kind}")
    if not value:
        raise UserError(f"{path}, image {index}: it is empty")
    return value
