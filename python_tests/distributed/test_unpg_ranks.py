"""UNPG with classes in shards: the pairs of all ranks, against the published formula in float64."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from support import partial_fc
from support.partial_fc import CLASSES, SIZE, Run, compare, joined, own_part, sharded
from support.ranks import normal, run_ranks
from support.rounding import spreads
from support.tolerances import check_all
from torch import Tensor, nn
from torch.nn import functional as F

import unitsface_kernels as uk
from unitsface_kernels import autograd
from unitsface_kernels.distributed.collectives import world_size
from unitsface_kernels.metrics.order_statistics import FIRST_BINS
from unitsface_kernels.metrics.tiles import Scores, Share

ROWS = 40
# Rows of every rank: unequal numbers, and none.
COUNTS = {1: [40], 2: [15, 25], 3: [17, 0, 23]}
each_number_of_ranks = pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1, marks=pytest.mark.extended),
        2,
        pytest.param(3, marks=pytest.mark.extended),
    ],
)


class Setting(NamedTuple):
    base: str = "cosface"
    whisker: float | None = 1.5
    sample_rate: float = 1.0
    learned: bool = False
    training: bool = True

    def head(self) -> uk.PartialFC:
        scale = nn.Parameter(torch.tensor(16.0)) if self.learned else 16.0
        options = {"base": self.base, "whisker": self.whisker, "scale": scale, "margin": 0.3}
        head = uk.PartialFC("unpg", SIZE, CLASSES, self.sample_rate, seed=3, **options)
        return head.train(self.training)


SETTINGS = [
    Setting(),
    Setting("arcface", None, 0.4),
    Setting("cosface", 0.5, 0.4),
    Setting("cosface", 0.5, learned=True),
    Setting("cosface", 0.5, 0.4, training=False),
]


def _batch() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(6))
    labels[::9] = -1
    return normal(ROWS, SIZE, seed=5) + 0.2, labels


def _of_one_rank_alone(rank: int, images: Tensor, labels: Tensor) -> tuple[str, float]:
    """The error of options that differ, and the loss if the last rank has a NaN."""
    message = ""
    try:
        uk.PartialFC("unpg", SIZE, CLASSES, whisker=1.5 + rank)(images, labels)
    except ValueError as error:
        message = str(error)
    broken = images.clone()
    if rank == world_size() - 1:
        broken[labels >= 0] = torch.nan
    return message, uk.PartialFC("unpg", SIZE, CLASSES)(broken, labels).item()


def _of_rank(rank: int) -> tuple[list[dict[str, Tensor]], tuple[str, float]]:
    # The formula of a learned scale is compiled elsewhere.
    os.environ["UNITSFACE_POLICY_COMPILER"] = "off"
    images, labels = (own_part(t, rank, COUNTS[world_size()]) for t in _batch())
    found = []
    for setting in SETTINGS:
        # Ignored rows may be anything.
        feats = images.masked_fill((labels == -1)[:, None], torch.nan).requires_grad_()
        head = setting.head()
        loss = head(feats, labels)
        loss.backward()
        gradient = head.weight.grad
        assert gradient is not None
        # Averaging over ranks divides by their number.
        of_feats = feats.grad / world_size()
        found.append({"loss": loss.detach(), "feats": of_feats, "weight": gradient.to_dense()})
        if setting.learned:
            found[-1]["scale"] = head.loss.scale.grad
    return found, _of_one_rank_alone(rank, images, labels)


def _published(
    setting: Setting,
    feats: Tensor,
    weight: Tensor,
    positions: Tensor,
    labels: Tensor,
    scale: Tensor,
) -> Tensor:
    """HeadAndLoss of recognition/models/build.py, with head.py, in Jung-Jun-Uk/UNPG."""
    counted = labels >= 0
    x, place = F.normalize(feats[counted]), positions[counted]
    identity = labels[counted]
    cosine = x @ F.normalize(weight).T
    target = cosine.gather(1, place[:, None])
    target = torch.cos(torch.acos(target) + 0.3) if setting.base == "arcface" else target - 0.3
    cosine = cosine.scatter(1, place[:, None], target)
    different = (identity[:, None] != identity[None, :]).triu(1)
    pairs = (x @ x.T)[different]
    if setting.whisker is not None:
        ascending = pairs.detach().sort().values
        low, high = ascending[int(0.25 * len(pairs))], ascending[int(0.75 * len(pairs))]
        reach = setting.whisker * (high - low)
        # Rounding does not decide.
        reach = reach + 1e-6
        pairs = pairs[(pairs <= high + reach) & (pairs >= low - reach)]
    logits = torch.cat([cosine, pairs.expand(len(x), -1)], dim=1)
    return F.cross_entropy(scale * logits, place)


def _wanted(setting: Setting, ranks: int) -> dict[str, Any]:
    images, labels = _batch()
    rate = setting.sample_rate if setting.training else 1.0
    index, positions = partial_fc.replayed(labels, Run("unpg", sample_rate=rate), ranks, 0)
    weight = Setting().head().weight

    def evaluated() -> dict[str, Tensor]:
        leaves = [images, weight, torch.tensor(16.0)]
        x, w, scale = (t.detach().double().requires_grad_() for t in leaves)
        some = w if index is None else w[index]
        loss = _published(setting, x, some, positions, labels, scale)
        gradients = torch.autograd.grad(loss, [x, w, scale])
        return dict(
            zip(("loss", "feats", "weight", "scale"), (loss.detach(), *gradients), strict=True)
        )

    found = spreads(evaluated)
    return found if setting.learned else {k: v for k, v in found.items() if k != "scale"}


@each_number_of_ranks
def test_losses_gradients_and_mistakes(ranks: int) -> None:
    found = run_ranks(ranks, _of_rank)
    for number, setting in enumerate(SETTINGS):
        parts = [part[number] for part, _ in found]
        together = {key: parts[0][key] for key in parts[0]}
        for part in parts:
            assert torch.equal(part["loss"], together["loss"])
        for key in ("feats", "weight"):
            together[key] = torch.cat([part[key] for part in parts])
        check_all(together, _wanted(setting, ranks))
    for _, (message, loss) in found:
        # Not an error of the quartiles, which do not exist.
        assert math.isnan(loss)
        if ranks > 1:
            assert message.startswith("options must be the same on every rank of the group")
            assert "('whisker', 1.5)" in message


RUNS = [
    Run("unpg", {"scale": 16.0}, 1.0, steps=5),
    Run("unpg", {"scale": 16.0}, 0.4, fuse="step", steps=4),
    Run("unpg", {"base": "arcface", "whisker": None}, 0.4, "adamw", "backward", steps=4),
    # A shard without classes.
    Run("unpg", {"whisker": 0.5}, 1.0, classes=3, steps=3),
]


def _all_runs(rank: int) -> list[dict]:
    return [sharded(rank, run) for run in RUNS]


@cache
def _single(number: int, ranks: int) -> dict:
    return partial_fc.single(RUNS[number], ranks)


@pytest.mark.extended
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_is_that_of_one_process(ranks: int) -> None:
    found = run_ranks(ranks, _all_runs)
    for number, run in enumerate(RUNS):
        together = joined([parts[number] for parts in found], run.classes)
        expected = _single(number, 1 if run.sample_rate == 1.0 else ranks)
        compare(together, expected, run.name())


def _large_step(rank: int) -> tuple[int, float]:
    """The largest tensor of a step, and its loss."""
    rows, classes = 4096 // world_size(), 10_000
    own = slice(rank * rows, (rank + 1) * rows)
    feats = normal(4096, SIZE, seed=1)[own].requires_grad_()
    labels = torch.randint(2000, (4096,), generator=torch.Generator().manual_seed(2))[own]
    # Under a dispatch mode a loss would be one operator, which shows nothing of its inside.
    autograd.applies = lambda tensors: True
    # As many classes for any number of ranks: no draw.
    head = uk.PartialFC("unpg", SIZE, classes, scale=16.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.nbytes)
            return result

    with Watch():
        loss = head(feats, labels)
        loss.backward()
    return largest, loss.item()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_no_matrix_of_pairs_or_logits_is_stored(ranks: int) -> None:
    found = run_ranks(ranks, _large_step)
    pairs, logits = 4 * 4096**2 // ranks, 4 * 4096 * 10_000 // ranks
    largest = max(largest for largest, _ in found)
    assert largest < min(pairs, logits) / 3
    if ranks > 1:
        ((_, alone),) = run_ranks(1, _large_step)
        for _, loss in found:
            assert loss == pytest.approx(alone, rel=1e-5)


def test_shares_of_the_tiles_count_every_pair_once() -> None:
    feats = normal(1500, SIZE, seed=1)
    labels = torch.randint(-1, 300, (1500,), generator=torch.Generator().manual_seed(2))
    counts = [
        Scores(feats, labels, None, None, "auto", share=share).count(FIRST_BINS)
        for share in (None, *(Share(number, 3) for number in range(3)))
    ]
    assert torch.equal(sum(counts[1:]), counts[0])
    assert all(int(part.sum()) > 0 for part in counts)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="whisker must be >= 0"):
        uk.PartialFC("unpg", SIZE, CLASSES, whisker=-1.0)
    with pytest.raises(ValueError, match="base must be one of cosface, arcface"):
        uk.PartialFC("unpg", SIZE, CLASSES, base="uce")
