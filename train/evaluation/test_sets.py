"""What a model is judged by, in training and after: images, and figures of their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from train.config import Config
from train.data.image_list import ImageList
from train.data.loader import ImageSource
from train.errors import UserError
from train.evaluation.bins import open_bin_set
from train.evaluation.verification import count_pairs, evaluate_features


class TestSet(Protocol):
    name: str
    source: ImageSource

    def score(
        self,
        features: NDArray[np.float32],
        *,
        threshold: float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Figures of flip-summed (N, D) features of all images in order.

        ``threshold`` is the learned unified threshold b / s, a cosine.
        """
        ...


@dataclass(frozen=True)
class HeldOut:
    """All pairs of images of identities that were never trained on."""

    source: ImageSource
    name: str = "held_out"

    def score(
        self,
        features: NDArray[np.float32],
        *,
        threshold: float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        labels = self.source.images.labels
        result = evaluate_features(features, labels, threshold=threshold, device=device)
        figures = {
            "accuracy": result.accuracy,
            "auc": result.auc,
            **{f"tar@far={far}": tar for far, tar in result.tar_at_far.items()},
            "best_threshold": result.best_threshold,
        }
        if result.accuracy_at_threshold is not None:
            figures["accuracy_at_threshold"] = result.accuracy_at_threshold
        return figures


def open_test_sets(config: Config, held_out: ImageList) -> Sequence[TestSet]:
    """The identities held out, if they form pairs of both kinds, and the sets of ``eval.sets``."""
    from train.data.dataset import open_source

    sets: list[TestSet] = []
    pairs, positives = count_pairs(held_out.labels)
    if positives not in (0, pairs):
        sets.append(HeldOut(open_source(config, held_out)))
    size, data = config.model.input_size, config.data
    for path in config.eval.sets:
        sets.append(open_bin_set(path, size, on_error=data.on_error, workers=data.workers))
    return distinct(sets)


def distinct(sets: Iterable[TestSet]) -> list[TestSet]:
    """Figures are filed under the names of the sets."""
    listed = list(sets)
    names = [test_set.name for test_set in listed]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two test sets are called '{name}'; rename one of the files")
    return listed
