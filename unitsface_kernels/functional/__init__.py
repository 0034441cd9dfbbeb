"""The functional API: names, defaults, documentation. Everything else happens further down."""

from .classes import fused_margin_softmax_loss, fused_npt_loss
from .pair import fused_uss_loss

__all__ = ["fused_margin_softmax_loss", "fused_npt_loss", "fused_uss_loss"]
