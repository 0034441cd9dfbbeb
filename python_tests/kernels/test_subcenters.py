"""The step after a training with several centers: dominant ones, and samples near them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unitsface_kernels import subcenters
from unitsface_kernels.subcenters import keep_dominant


def test_votes_ties_and_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subcenters, "BLOCK", 3)
    # Class 0: two samples at its second center, one at the first. Class 1: one at each, a tie.
    # Class 2: none.
    weight = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [0.0, -1.0]], [[1.0, 1.0]] * 2])
    angles = torch.tensor([80.0, 100.0, 5.0, 180.0, 270.0, 33.0, 14.9, 15.1])
    labels = torch.tensor([0, 0, 0, 1, 1, -1, 0, 0])
    feats = torch.stack([torch.cos(angles.deg2rad()), torch.sin(angles.deg2rad())], dim=1) * 7.0
    # Two more at the first center would make it dominant.
    found = keep_dominant(weight, feats[:6], labels[:6])
    assert found.center.tolist() == [1, 0, 0]
    assert torch.equal(found.weight, weight[torch.arange(3), torch.tensor([1, 0, 0])])
    assert found.kept.tolist() == [True, True, False, True, False, False]
    assert found.cosine[:2].tolist() == pytest.approx([math.cos(math.radians(10))] * 2)
    assert found.cosine[5].isnan()
    close = keep_dominant(weight, feats[:6], labels[:6], angle=9.0)
    assert close.kept.tolist() == [False, False, False, True, False, False]
    found = keep_dominant(weight, feats, labels)
    assert found.center.tolist() == [0, 0, 0]


def test_rule_of_insightface() -> None:
    """recognition/subcenter_arcface/drop.py, class by class in float64: the center nearest to most
    samples, and those whose cosine with it is above that of 75 degrees.
    """
    generator = torch.Generator().manual_seed(0)
    classes, count, size, samples = 9, 3, 4, 200
    weight = torch.randn(classes, count, size, generator=generator)
    feats = torch.randn(samples, size, generator=generator)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    found = keep_dominant(weight, feats, labels)
    unit, centers = F.normalize(feats.double()), F.normalize(weight.double(), dim=2)
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0]
        cosine = unit[rows] @ centers[label].T
        votes = [0] * count
        for row in cosine:
            votes[int(row.argmax())] += 1
        dominant = votes.index(max(votes))
        assert int(found.center[label]) == dominant
        near = cosine[:, dominant] > math.cos(math.pi * 75 / 180)
        assert torch.equal(found.kept[rows], near)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(3, 4)}, ValueError, r"weight must have shape \(C, K, D\)"),
        ({"weight": torch.zeros(3, 2, 5)}, ValueError, "weight must have D = 4"),
        ({"labels": torch.tensor([3, 0])}, ValueError, "labels must be in"),
        ({"labels": torch.tensor([0])}, ValueError, "labels must have shape"),
        ({"angle": 181.0}, ValueError, "angle must be <= 180"),
        ({"angle": "75"}, TypeError, "angle must be a float"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "weight": torch.zeros(3, 2, 4),
        "feats": torch.zeros(2, 4),
        "labels": torch.tensor([0, 1]),
        **change,
    }
    with pytest.raises(error, match=message):
        keep_dominant(**given)
