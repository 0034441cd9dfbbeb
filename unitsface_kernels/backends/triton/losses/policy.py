"""Kinds of Triton policies, one per reduction and topology."""

from __future__ import annotations

from dataclasses import dataclass

from triton.runtime.jit import KernelInterface


@dataclass(frozen=True)
class SumPolicy:
    """``evaluate(cosine, threshold, positive, params) -> value, d/d cosine, d/d threshold``.

    A negative pair with a cosine of -inf has to give three zeros: kernels take pairs out that way.

    Attributes:
        heavy: more intermediate results than the registers of the capped configuration hold.
    """

    evaluate: KernelInterface
    heavy: bool = False


@dataclass(frozen=True)
class LogsumexpPolicy:
    """``negative(cosine, params)`` on tiles and ``positive(cosine, params)`` row by row.

    Both give the logit and its derivative by the cosine.

    Attributes:
        linear: the logit of a negative is its derivative, one number, times the cosine. Factors
            of the cosines then cost no multiplication of their own.
    """

    negative: KernelInterface
    positive: KernelInterface
    linear: bool = False


@dataclass(frozen=True)
class LogsumexpPairsPolicy:
    """``negative(cosine, params)`` and ``positive(cosine, params)``, both on tiles of samples.

    Both give the logit and its derivative by the cosine; (-inf, 0) leaves a negative out. Without
    ``positive`` positive pairs take no part.
    """

    negative: KernelInterface
    positive: KernelInterface | None


Policy = SumPolicy | LogsumexpPolicy | LogsumexpPairsPolicy
