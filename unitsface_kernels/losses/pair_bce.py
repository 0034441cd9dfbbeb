"""Pair BCE: USS with a threshold of its own for every identity (UniTSFace, NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import replace

from . import uss

# The formula of a pair is that of USS; drivers select the pair's threshold.
SPEC = replace(
    uss.SPEC,
    name="pair_bce",
    policy="uss",
    threshold="per_column",
    function="fused_pair_bce_loss",
    source="UniTSFace (NeurIPS 2023), eq. 22 (BCE; with a margin BCE-m)",
)
