"""The functional API: names, signatures and documentation of the losses."""

from .classes import (
    fused_margin_softmax_loss,
    fused_npt_loss,
    fused_sphereface2_loss,
    fused_uce_loss,
)
from .pair import (
    fused_pair_bce_loss,
    fused_pair_logsumexp,
    fused_pair_softmax_loss,
    fused_uss_loss,
    uss_threshold_init,
)

__all__ = [
    "fused_margin_softmax_loss",
    "fused_npt_loss",
    "fused_pair_bce_loss",
    "fused_pair_logsumexp",
    "fused_pair_softmax_loss",
    "fused_sphereface2_loss",
    "fused_uce_loss",
    "fused_uss_loss",
    "uss_threshold_init",
]
