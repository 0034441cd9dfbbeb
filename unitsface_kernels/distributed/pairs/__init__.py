"""Losses over the pairs of all ranks' batches, each rank computing the rows of its own.

A rank compares its rows with those of every other rank; the same pair in the other direction is
computed there. ``exchange.py`` brings the remote rows, ``fused.py`` runs the streaming backends and
their gradients, ``eager.py`` the reference; ``matching.py`` adds up samples of one label.
"""

from .eager import eager_loss, gathered, reduced, replicated
from .exchange import Exchange, Setting, takes_ring
from .fused import fused_loss
from .matching import Side, matching_sums

__all__ = [
    "Exchange",
    "Setting",
    "Side",
    "eager_loss",
    "fused_loss",
    "gathered",
    "matching_sums",
    "reduced",
    "replicated",
    "takes_ring",
]
