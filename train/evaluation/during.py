"""Evaluation in the course of a run, by all its processes: each embeds a part of the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from train.config import Config
from train.data.image_list import ImageList
from train.distributed import DistributedEnv
from train.errors import UserError
from train.evaluation.embed import embed
from train.evaluation.test_sets import HeldOut, open_test_sets
from train.evaluation.verification import Verification, evaluate_features
from train.run_folder import EVALUATION, FEATURES, write_arrays, write_json

# Features of the people held out are stored beside their metrics up to this size.
STORED_BYTES = 64 * 2**20

Metrics = Mapping[str, Mapping[str, float]]


class Evaluator:
    """The test sets of a run. Evaluating them changes nothing of what is trained."""

    def __init__(self, config: Config, world: DistributedEnv, held_out: ImageList) -> None:
        self.every, self.metric, self.world = config.eval.every, config.eval.best, world
        self.sets = open_test_sets(config, held_out)
        # A mistake that would end the run at its first evaluation ends it now.
        if self.every and not self.sets:
            raise UserError(
                f"eval.every={self.every}: nothing to evaluate; name sets in eval.sets, or keep "
                "identities with several images out of training by data.holdout"
            )
        if self.every:
            self._check_metric({name for test in self.sets for name in test.metrics})
        # The last features of the people held out, and their step.
        self._features: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None
        self._step: int | None = None

    def _check_metric(self, names: set[str]) -> None:
        if self.metric not in names:
            known = ", ".join(sorted(names))
            raise UserError(f"eval.best: expected one of {known}; got '{self.metric}'")

    def due(self, step: int, at_end: bool) -> bool:
        return bool(self.sets) and (at_end or (self.every > 0 and step % self.every == 0))

    def evaluate(self, backbone: nn.Module, threshold: float | None, step: int) -> Metrics:
        """Metrics of every set by its name: those of the first process, on all; every one calls."""
        found = {}
        for test in self.sets:
            features, labels = self._embed(backbone, test.source)
            if isinstance(test, HeldOut):
                self._features, self._step = (features, labels), step

            def score(test: Any = test, features: Any = features) -> dict[str, float]:
                return dict(test.score(features, threshold=threshold, device=self.world.device))

            found[test.name] = self.world.from_main(score)
        return found

    @staticmethod
    def lines(metrics: Metrics, step: int) -> Iterator[str]:
        """A line per set, for the terminal."""
        for name, of_set in metrics.items():
            values = (f"{key} {value:.4g}" for key, value in of_set.items() if "std" not in key)
            yield f"step {step}, {name}: {', '.join(values)}"

    def value(self, metrics: Metrics) -> float | None:
        """The value by which the best is kept, larger is better; None without evaluations on the
        way.
        """
        if not self.every or not metrics:
            return None
        values = [of_set[self.metric] for of_set in metrics.values() if self.metric in of_set]
        if not values:  # a metric of the learned threshold, and there is none
            self._check_metric({name for of_set in metrics.values() for name in of_set})
        mean = float(np.mean(values))
        return mean if np.isfinite(mean) else None  # nothing is better than what is no number

    def report_held_out(
        self, folder: Path, backbone: nn.Module, threshold: float | None, step: int
    ) -> Verification | None:
        """Write metrics and features of the people held out, if there are any to score.

        Every process calls; the first one gets the metrics.
        """
        test = next((test for test in self.sets if isinstance(test, HeldOut)), None)
        if test is None:
            return None
        if self._features is None or self._step != step:
            self._features = self._embed(backbone, test.source)
        if not self.world.is_main:
            return None
        read = test.source.readable()
        features, labels = (rows[read] for rows in self._features)
        result = evaluate_features(features, labels, threshold=threshold, device=self.world.device)
        write_json(folder / EVALUATION, result.to_dict())
        if features.nbytes <= STORED_BYTES:
            identities = np.array(list(test.source.images.identities))
            write_arrays(folder / FEATURES, features=features, labels=labels, identities=identities)
        return result

    def _embed(self, backbone: nn.Module, source: Any) -> Any:
        self.world.share_buffers(backbone)
        return embed(backbone, source, self.world.device, world=self.world)
