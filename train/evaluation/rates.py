"""True accept rates at false accept rates so low that every single pair counts.

At FAR x a threshold accepts at most floor(x n) of n negatives: no interpolation, and pairs tied
with a negative that must stay out stay out too. (insightface takes the point of the curve whose
rate is nearest to x, which may accept more.) With x n < 1 no negative is accepted, and the rate
counts as not resolved: 405 negatives cannot resolve FAR 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def allowed(far: float, negatives: int) -> int:
    """How many negatives may be accepted; the rounding of far * negatives must not cost one."""
    return int(np.floor(far * negatives * (1 + 1e-12)))


def resolved(far: float, negatives: int) -> bool:
    """Whether ``negatives`` resolve this rate: at least one of them may be accepted.

    Below, the figure would be that of another rate. Whatever prints or writes a TAR checks this.
    """
    return allowed(far, negatives) >= 1


def without_unresolved(metrics: Mapping[str, Any], negatives: int) -> dict[str, Any]:
    """Figures of which ``tar@far=`` are None at rates that ``negatives`` do not resolve."""

    def known(name: str) -> bool:
        far = name.partition("@far=")[2]
        return not far or resolved(float(far), negatives)

    return {name: value if known(name) else None for name, value in metrics.items()}


def shown(value: float | None) -> str:
    """A rate for a table or a line."""
    if value is None:
        return "not resolved"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def true_accepts(
    positives: Floats, largest: Floats, negatives: int, fars: Sequence[float]
) -> dict[str, float]:
    """Rates by name, of (P,) positives and the ``largest`` of all ``negatives``, in any order.

    ``largest`` holds at least one more than are allowed at the largest rate, or all.
    """
    descending = np.sort(largest)[::-1]
    rates = {}
    for far in fars:
        k = allowed(far, negatives)
        accepted = positives > descending[k] if k < negatives else np.ones(len(positives), bool)
        rates[f"tar@far={far:g}"] = float(accepted.mean())
    return rates


def tar_at_fars(scores: Floats, same: NDArray[np.bool_], fars: Sequence[float]) -> dict[str, float]:
    """Rates by name, of (P,) scores of pairs of both kinds."""
    negatives = scores[~same]
    keep = min(allowed(max(fars), len(negatives)) + 1, len(negatives))
    largest = np.partition(negatives, len(negatives) - keep)[len(negatives) - keep :]
    return true_accepts(scores[same], largest, len(negatives), fars)
