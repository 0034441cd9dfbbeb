"""Triton policies, one per loss of the registry: the only loss formulas of this backend.

A policy of a ``sum`` loss gives ``evaluate``, of a ``logsumexp`` loss ``negative`` and
``positive``, as JIT functions over tiles that the kernels receive as constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.runtime.jit import KernelInterface

from . import margin_softmax, pair_logsumexp, pair_softmax, sphereface2, uce, uss


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
    """

    negative: KernelInterface
    positive: KernelInterface


@dataclass(frozen=True)
class LogsumexpPairsPolicy:
    """``negative(cosine, params)`` and ``positive(cosine, params)``, both on tiles of samples.

    Both give the logit and its derivative by the cosine; (-inf, 0) leaves a negative out. Without
    ``positive`` positive pairs take no part.
    """

    negative: KernelInterface
    positive: KernelInterface | None


POLICIES: dict[str, SumPolicy | LogsumexpPolicy | LogsumexpPairsPolicy] = {
    "uss": SumPolicy(uss.evaluate),
    "pair_bce": SumPolicy(uss.evaluate),
    "margin_softmax": LogsumexpPolicy(margin_softmax.negative, margin_softmax.positive),
    "uce": SumPolicy(uce.evaluate),
    "class_bce": SumPolicy(uce.evaluate),
    "sphereface2": SumPolicy(sphereface2.evaluate, heavy=True),
    "pair_softmax": LogsumexpPairsPolicy(pair_softmax.negative, pair_softmax.positive),
    "pair_logsumexp": LogsumexpPairsPolicy(pair_logsumexp.negative, None),
}

__all__ = ["POLICIES", "LogsumexpPairsPolicy", "LogsumexpPolicy", "SumPolicy"]
