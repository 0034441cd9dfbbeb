"""Losses of pytorch-metric-learning, computed without the N x M matrix.

Names, constructors, ``loss(embeddings, labels, ...)`` and numbers are those of that library, which
need not be installed; docs/metric_learning.md has the differences.
"""

from .classes import ArcFaceLoss, CosFaceLoss
from .memory import CrossBatchMemory
from .pairs import NTXentLoss, SupConLoss

__all__ = ["ArcFaceLoss", "CosFaceLoss", "CrossBatchMemory", "NTXentLoss", "SupConLoss"]
