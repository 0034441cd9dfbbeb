"""Losses of pytorch-metric-learning, computed without the N x M matrix.

Names, constructors, ``loss(embeddings, labels, ...)`` and numbers are those of that library, which
need not be installed; docs/metric_learning.md has the differences.
"""

from .classes import (
    ArcFaceLoss,
    CosFaceLoss,
    LargeMarginSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from .hinges import CircleLoss, ContrastiveLoss, MultiSimilarityLoss
from .memory import CrossBatchMemory
from .pairs import NTXentLoss, SupConLoss
from .proxies import ProxyAnchorLoss, ProxyNCALoss

__all__ = [
    "ArcFaceLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "LargeMarginSoftmaxLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "SupConLoss",
]
