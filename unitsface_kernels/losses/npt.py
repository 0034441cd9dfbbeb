"""NPT: a triplet of each row, its class weight and the nearest wrong class weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import LossSpec, Parameter, Triplet


def _count(params: tuple[float, ...]) -> int:
    return int(params[1])


def _adds(params: tuple[float, ...]) -> bool:
    return params[2] != 0.0


def _gap(nearest: Tensor, target: Tensor, params: tuple[float, ...]) -> Tensor:
    """Squared distance to the target minus that to a wrong column, plus the margin."""
    return 2.0 * (nearest - target) + params[0]


def _value(nearest: Tensor, target: Tensor, params: tuple[float, ...]) -> Tensor:
    return torch.relu(_gap(nearest, target, params))


def _slopes(nearest: Tensor, target: Tensor, params: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    gap = _gap(nearest, target, params)
    # Not `gap > 0`: NaN keeps its slope, so that it reaches the gradients.
    slope = torch.where(gap <= 0.0, 0.0, 2.0)
    return slope, -slope


SPEC = LossSpec(
    name="npt",
    topology="class",
    reduction="nearest",
    threshold="none",
    parameters=(
        Parameter("margin", 1.0),
        Parameter("k", 1, minimum=0, maximum=64, integer=True),
        Parameter("hinges", "mean", choices=("mean", "sum")),
    ),
    negative=None,
    positive=None,
    function="fused_npt_loss",
    source="NPT-Loss (arXiv 2103.03503), code of its later version",
    triplet=Triplet(_count, _adds, _value, _slopes),
)
