"""Kinds of Triton policies, one per reduction and topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import KernelInterface


def _equal(params: tuple[float, ...]) -> tuple[float, float]:
    return 1.0, 1.0


@dataclass(frozen=True)
class SumPolicy:
    """Binary cross-entropy of a logit z: ``softplus(-z)`` of a positive, ``softplus(z)`` of a
    negative pair, times a weight.

    Attributes:
        logit: ``logit(cosine, threshold, positive, params) -> z, dz / d cosine``. A margin is
            part of z.
        threshold_slope: dz / d threshold, -1 or 1.
        weights: ``weights(params) -> weights of positive and of negative pairs``, on the host.
        heavy: more intermediate results than the registers of the capped configuration hold.
    """

    logit: KernelInterface
    threshold_slope: float = -1.0
    weights: Callable[[tuple[float, ...]], tuple[float, float]] = _equal
    heavy: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the kernels of ``sum`` losses."""
        return {"PAIR": self.logit, "TERMS": False, "THRESHOLD_SLOPE": self.threshold_slope}


@dataclass(frozen=True)
class SumTermsPolicy:
    """Terms of pairs that are added as they are.

    Attributes:
        term: ``term(cosine, threshold, positive, params) -> value, d value / d cosine,
            d value / d threshold``. Where ``positive`` is false, of a negative pair. Of a formula
            with variables, ``term(cosine, threshold, positive, params, variables)``, whose results
            go on with the derivatives by these: scalars, those of rows, those of columns.
        heavy: as of :class:`SumPolicy`.
    """

    term: KernelInterface
    heavy: bool = False

    weights = staticmethod(_equal)

    @property
    def constants(self) -> dict[str, Any]:
        return {"PAIR": self.term, "TERMS": True, "THRESHOLD_SLOPE": 1.0}


@dataclass(frozen=True)
class LogsumexpPolicy:
    """``negative(cosine, params)`` on tiles and ``positive(cosine, params)`` row by row.

    Both give the logit and its derivative by the cosine. Without ``positive`` operations of Torch
    finish the rows. Where tiles read variables it is ``negative(cosine, params, variables)``, whose
    results go on with the derivatives by them.

    Attributes:
        linear: the logit of a negative is its derivative, one number, times the cosine, and so are
            derivatives by variables. Factors of the cosines then cost no multiplication of their
            own.
    """

    negative: KernelInterface
    positive: KernelInterface | None
    linear: bool = False


@dataclass(frozen=True)
class LogsumexpPairsPolicy:
    """``negative(cosine, params)`` and ``positive(cosine, params)``, both on tiles of samples.

    Both give the logit and its derivative by the cosine; (-inf, 0) leaves a negative out. Without
    ``positive`` positive pairs take no part.
    """

    negative: KernelInterface
    positive: KernelInterface | None


Policy = SumPolicy | SumTermsPolicy | LogsumexpPolicy | LogsumexpPairsPolicy
