"""Fused similarity losses for face recognition and metric learning.

Large batch-pair and sample-to-class cosine losses that never store the N x M matrix.
"""

from ._version import __version__
from .functional import fused_margin_softmax_loss, fused_npt_loss, fused_uss_loss
from .modules import (
    CLASS_LOSSES,
    PAIR_LOSSES,
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NormFaceLoss,
    NPTLoss,
    SphereFaceLoss,
    UniTSFaceLoss,
    USSLoss,
)

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
    "__version__",
    "fused_margin_softmax_loss",
    "fused_npt_loss",
    "fused_uss_loss",
]
