"""Verification sets as insightface distributes them: lfw.bin, cfp_fp.bin, agedb_30.bin, ...

A pickle of ``(images, same)``: 2P encoded images, of which 2p and 2p + 1 form pair p, and P flags.
Images are byte strings (of Python 2 or 3) or uint8 arrays of encoded bytes. See ``load_bin`` in
recognition/arcface_torch/eval/verification.py of insightface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.decode import MAX_PIXELS
from train.data.image_list import whole
from train.data.loader import ImageSource, open_images
from train.data.records import Encoded
from train.errors import UserError
from train.evaluation.folds import FAR, FOLDS, fold_of, ten_folds
from train.evaluation.plain_pickle import Array, read_plain
from train.evaluation.verification import best_threshold


@dataclass(frozen=True)
class BinSet:
    """Pairs of images, judged by the ten-fold protocol."""

    name: str
    source: ImageSource
    same: NDArray[np.bool_]  # (P,)
    figures: ClassVar[Sequence[str]] = (
        "accuracy",
        "auc",
        f"val@far={FAR:g}",
        "accuracy_at_threshold",
    )

    def score(
        self,
        features: NDArray[np.float32],
        *,
        threshold: float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Figures of (2P, D) flip-summed features. Accuracies are shares of all pairs.

        Pairs of which an image could not be read are left out, and counted.
        """
        from sklearn.metrics import roc_auc_score  # slow to import

        distances, same = self._distances(features)
        cosines = 1 - distances / 2
        fold = fold_of(len(self.same))[self._read_pairs()]
        result = ten_folds(distances, same, fold)
        figures = {
            "accuracy": result.accuracy,
            "accuracy_std": result.accuracy_std,
            "auc": float(roc_auc_score(same, cosines)),
            f"val@far={FAR:g}": result.validation,
            f"val_std@far={FAR:g}": result.validation_std,
            "best_threshold": best_threshold(cosines, same),
            "pairs": len(same),
        }
        if threshold is not None:
            figures["accuracy_at_threshold"] = float(((cosines >= threshold) == same).mean())
        if len(same) < len(self.same):
            figures["skipped_pairs"] = len(self.same) - len(same)
        return figures

    def pair_scores(
        self, features: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Cosines and same-identity flags of the pairs that could be read."""
        distances, same = self._distances(features)
        return 1 - distances / 2, same

    def _distances(
        self, features: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Squared distances of unit features instead of cosines."""
        if len(features) != 2 * len(self.same) or not np.isfinite(features).all():
            raise UserError(f"{self.name}: expected {2 * len(self.same)} finite features")
        unit = features.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        read = self._read_pairs()
        same = self.same[read]
        if len(np.unique(same)) < 2:
            raise UserError(f"{self.name}: no pairs of both kinds are left, {len(same)} readable")
        return np.square(unit[0::2] - unit[1::2]).sum(1)[read], same

    def _read_pairs(self) -> NDArray[np.bool_]:
        return self.source.readable().reshape(-1, 2).all(1)


def open_bin_set(
    path: str | Path, size: int, *, on_error: str, workers: int, max_pixels: int = MAX_PIXELS
) -> BinSet:
    """Encoded images stay in memory, some 5 kB each, and are decoded whenever they are asked for:
    decoded, a set of 7000 pairs would take half a gigabyte in each process.
    """
    path = Path(path)
    images, same = _read(path)
    labels = np.repeat(np.arange(len(same)), 2)
    records = Encoded(images, str(path))
    numbers = [f"pair {p}" for p in range(len(same))]
    pairs = whole(records, labels.tolist(), numbers, named=False)
    source = open_images(
        pairs, size, on_error=on_error, cache="never", workers=workers, max_pixels=max_pixels
    )
    return BinSet(path.stem, source, same)


def _read(path: Path) -> tuple[list[bytes], NDArray[np.bool_]]:
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


def _flags(values: Any, path: Path) -> NDArray[np.bool_]:
    flags: Sequence[Any]
    if isinstance(values, Array):
        flags = values.values().tolist()
    elif isinstance(values, (list, tuple)):
        flags = values
    else:
        raise UserError(f"{path}: expected a list of flags, got {type(values).__name__}")
    for i, flag in enumerate(flags):
        if not isinstance(flag, int) or flag not in (0, 1):
            raise UserError(f"{path}, pair {i}: expected a flag, got {_shown(flag)}")
    return np.asarray(flags, dtype=bool)


def _shown(value: Any) -> str:
    """Short whatever it is: of nested lists or long numbers the text may have no end."""
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
