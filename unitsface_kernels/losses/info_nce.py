"""Log-sum-exp of a row's negatives, of which InfoNCE over several positives is made."""

from __future__ import annotations

from dataclasses import replace

from . import clip
from .from_policy import spec_of


class InfoNCE(clip.CLIP):
    def finish(self, positives, negatives):
        return negatives


# The logits of a pair are those of CLIP.
SPEC = replace(
    spec_of(
        InfoNCE,
        name="info_nce",
        function="fused_info_nce_loss",
        source="CPC (arXiv 1807.03748), eq. 4; SupCon (NeurIPS 2020), eq. 2",
        valid_rows="with_negatives",
    ),
    policy="clip",
)
