"""Probes against distractors that come in blocks; memory does not grow with their number.

Identification: for every two images of a person, one searches for the other among it and all
distractors: it is found at rank r if fewer than r distractors score as much or more.
Verification: positive pairs are those two images (each pair once), negative pairs all probes with
all distractors; of these only as many of the largest are kept as the largest false accept rate
allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.errors import UserError
from train.evaluation.rates import allowed, true_accepts

RANKS = (1, 10)
FARS = (1e-6, 1e-5, 1e-4)
SCORES = 2**24  # of probes with distractors at a time: 64 MB


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

    def figures(self) -> dict[str, float]:
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
