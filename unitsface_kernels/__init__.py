"""Fused similarity losses for face recognition and metric learning.

Large batch-pair and sample-to-class cosine losses that never store the N x M matrix.
"""

from ._version import __version__
from .functional import (
    fused_margin_softmax_loss,
    fused_pair_logsumexp,
    fused_pair_softmax_loss,
    fused_uss_loss,
    uss_threshold_init,
)
from .modules import (
    CLASS_LOSSES,
    PAIR_LOSSES,
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NormFaceLoss,
    PairSoftmaxLoss,
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
    "NormFaceLoss",
    "PairSoftmaxLoss",
    "SphereFaceLoss",
    "USSLoss",
    "UniTSFaceLoss",
    "__version__",
    "fused_margin_softmax_loss",
    "fused_pair_logsumexp",
    "fused_pair_softmax_loss",
    "fused_uss_loss",
    "uss_threshold_init",
]
