"""Modules that own a loss's parameters. Formulas and arguments: see ``functional``."""

from __future__ import annotations

from torch import nn

from .combined import UniTSFaceLoss
from .margin_softmax import (
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NormFaceLoss,
    SphereFaceLoss,
)
from .npt import NPTLoss
from .pair import USSLoss

CLASS_LOSSES: dict[str, type[nn.Module]] = {
    "normface": NormFaceLoss,
    "cosface": CosFaceLoss,
    "arcface": ArcFaceLoss,
    "sphereface": SphereFaceLoss,
    "npt": NPTLoss,
}
PAIR_LOSSES: dict[str, type[nn.Module]] = {"uss": USSLoss}

__all__ = [
    "CLASS_LOSSES",
    "PAIR_LOSSES",
    "ArcFaceLoss",
    "CosFaceLoss",
    "MarginSoftmaxLoss",
    "NPTLoss",
    "NormFaceLoss",
    "SphereFaceLoss",
    "USSLoss",
    "UniTSFaceLoss",
]
