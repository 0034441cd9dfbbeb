"""Class BCE (BCE-d): UCE with a threshold of its own for every class (UniFace, ICCV 2023)."""

from __future__ import annotations

from dataclasses import replace

from . import uce

# The formula of a pair is that of UCE; drivers select the pair's threshold.
SPEC = replace(
    uce.SPEC,
    name="class_bce",
    policy="uce",
    threshold="per_column",
    source="UniFace (ICCV 2023), binary cross-entropy with a bias per class",
)
