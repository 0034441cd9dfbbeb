"""What a model is judged by, in training and after: images, and figures of their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from train.config import Config
from train.data.image_list import ImageList
from train.data.loader import ImageSource
from train.errors import UserError
from train.evaluation.bins import open_bin_set
from train.evaluation.verification import FARS, evaluate_features, has_both_kinds


class TestSet(Protocol):
    name: str
    source: ImageSource
    figures: ClassVar[Sequence[str]]  # that a best may be chosen by

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
    figures: ClassVar[Sequence[str]] = (
        "accuracy",
        "auc",
        *(f"tar@far={far:g}" for far in FARS),
        "accuracy_at_threshold",
    )

    def score(
        self,
        features: NDArray[np.float32],
        *,
        threshold: float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        read = self.source.readable()
        labels = self.source.images.labels[read]
        result = evaluate_features(features[read], labels, threshold=threshold, device=device)
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
    if has_both_kinds(held_out.labels):
        source = open_source(config, held_out)
        if has_both_kinds(source.images.labels):  # of those that can be read
            sets.append(HeldOut(source))
    data = config.data
    for path in config.eval.sets:
        sets.append(
            open_bin_set(
                path,
                config.model.input_size,
                on_error=data.on_error,
                workers=data.workers,
                max_pixels=data.max_pixels,
            )
        )
    return distinct(sets)


def distinct(sets: Iterable[TestSet]) -> list[TestSet]:
    """Figures are filed under the names of the sets."""
    listed = list(sets)
    names = [test_set.name for test_set in listed]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two test sets are called '{name}'; rename one of the files")
    return listed
