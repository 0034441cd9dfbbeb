"""Contrastive, Multi-Similarity and Circle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional, policy, validate
from ...losses import REGISTRY, circle
from ...losses.measured_pairs import BEYOND, Hinges, SoftHinges
from . import reducers
from .base import wide
from .listed import Listed
from .measures import EUCLIDEAN
from .pair_loss import Batch, PairLoss
from .reducers import NOTHING, AvgNonZeroReducer, Entry, ListedPairs, Nothing, OfPairs, Part, Rows

_MULTI_SIMILARITY = REGISTRY["multi_similarity"].default
_SIDES = ("pos_loss", "neg_loss")
#: Hinges are at least 0.
_BELOW = -1.0


class ContrastiveLoss(PairLoss):
    r"""Contrastive loss: the mean over positive pairs whose loss is not zero, and that over
    negative pairs, of

    .. math:: [d_{ap} - m_p]_+ \qquad [m_n - d_{an}]_+

    with distances d of unit vectors, not squared; with similarities c of :math:`[m_p - c_{ap}]_+`
    and :math:`[c_{an} - m_n]_+`. See :class:`PairLoss` for arguments.
    """

    parts = _SIDES
    default_reducer = AvgNonZeroReducer
    default_measure = EUCLIDEAN

    def __init__(
        self, pos_margin: float = 0, neg_margin: float = 1, *, backend: str = "auto", **options: Any
    ) -> None:
        super().__init__(backend, options)
        validate.number("pos_margin", pos_margin)
        validate.number("neg_margin", neg_margin)
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin

    def formula(self, **numbers: float | str) -> policy.Pair:
        return self.measure.policy(
            Hinges,
            positive_margin=self.measure.sign * self.pos_margin,
            negative_margin=self.measure.sign * self.neg_margin,
            **numbers,
        )

    def of_batch(self, batch: Batch) -> dict[str, Part]:
        return {side: _Side(self, batch, side) for side in _SIDES}

    def of_list(self, listed: Listed) -> dict[str, Part]:
        if listed.pairs.few:
            return {side: Nothing(listed.rows) for side in _SIDES}
        ones = torch.ones((), device=listed.rows.device)
        terms = listed.terms(self.formula(), of_positives=ones, of_negatives=ones)
        anchors, positives, others, negatives = listed.pairs
        found: dict[str, Part] = {}
        for side, losses, places in zip(
            _SIDES, terms, ((anchors, positives), (others, negatives)), strict=True
        ):
            assert losses is not None
            kind = f"{side[:3]}_pair"
            found[side] = ListedPairs(losses, places, kind, len(listed.rows))
        return found

    def reduced(self, found: Mapping[str, Part], embeddings: Tensor, labels: Tensor | None) -> Any:
        sides = [part for part in found.values() if isinstance(part, _Side)]
        weighted = [side.weighted(self._reducer_of(side.name)) for side in sides]
        if len(sides) == 2 and None not in weighted:
            # Both kinds of pairs from one set of tiles.
            found = {"both": _Both(sides[0], [w for w in weighted if w is not None])}
        return super().reduced(found, embeddings, labels)

    def extra_repr(self) -> str:
        return (
            f"pos_margin={self.pos_margin}, neg_margin={self.neg_margin}, backend={self.backend!r}"
        )


@dataclass(frozen=True)
class _Weighted:
    """A sum over pairs whose hinge is within bounds, times a number."""

    weight: Tensor
    low: float = _BELOW
    high: float = BEYOND


@dataclass(frozen=True)
class _Side(OfPairs):
    """The hinges of positive or of negative pairs."""

    loss: ContrastiveLoss
    batch: Batch
    name: str

    def counts(self) -> Tensor:
        matching = self.batch.matching
        counts = matching.positives if self.name == _SIDES[0] else matching.negatives
        return counts * self.batch.some

    def total(self) -> Tensor:
        return self._of("sum", _BELOW, BEYOND) * self.batch.some

    def means(self) -> Tensor:
        counts = self.counts()
        sums = self._of("none", _BELOW, BEYOND)
        return torch.where(counts > 0, sums, 0.0) / counts.clamp(min=1)

    def between(self, low: float | None, high: float | None) -> Tensor:
        weighted = self._within(low, high)
        return self._of("sum", weighted.low, weighted.high) * weighted.weight

    def weighted(self, reducer: nn.Module) -> _Weighted | None:
        """What a reducer makes of them, if it is that."""
        kind = reducers.kind_of(reducer)
        one = self.batch.some.to(wide(self.batch.rows))
        if kind == "SumReducer":
            return _Weighted(one)
        if kind == "MeanReducer":
            return _Weighted(one / self.counts().sum().clamp(min=1))
        if kind in ("AvgNonZeroReducer", "ThresholdReducer"):
            return self._within(reducer.low, reducer.high)  # type: ignore[arg-type]
        return None

    def _within(self, low: float | None, high: float | None) -> _Weighted:
        bounds = _BELOW if low is None else float(low), BEYOND if high is None else float(high)
        with torch.no_grad():
            # float32 counts to 2^24 in a row, and rows are added in float64.
            counts = self._of("none", *bounds, counted="yes")
            share = self.batch.some / counts.sum(dtype=torch.float64).clamp(min=1)
        return _Weighted(share.to(wide(self.batch.rows)), *bounds)

    def _of(self, reduction: str, low: float, high: float, counted: str = "no") -> Tensor:
        one = torch.ones((), device=self.batch.rows.device)
        side = self.name == _SIDES[0]
        form = self.loss.formula(
            counted=counted,
            **{f"{'positive' if side else 'negative'}_low": low},
            **{f"{'positive' if side else 'negative'}_high": high},
        )
        scalars = {"of_positives": one * side, "of_negatives": one * (not side)}
        return self.batch.of(form, reduction, **scalars)

    def entry(self) -> Entry:
        if not bool(self.batch.some) or not int(self.counts().sum()):
            return NOTHING
        return self.loss.of_list(self.batch.listed())[self.name].entry()


@dataclass(frozen=True)
class _Both(Part):
    side: _Side
    weighted: list[_Weighted]

    def entry(self) -> Entry:
        return {**NOTHING, "losses": self._value()}

    def reduce(self, reducer: nn.Module, name: str, embeddings: Tensor, labels: Any) -> Tensor:
        return self._value()

    def _value(self) -> Tensor:
        positive, negative = self.weighted
        # The larger is 1: gradients of tiles in float16 keep their digits.
        largest = torch.maximum(positive.weight, negative.weight)
        shares = [each.weight / largest.clamp(min=1e-30) for each in self.weighted]
        form = self.side.loss.formula(
            positive_low=positive.low,
            positive_high=positive.high,
            negative_low=negative.low,
            negative_high=negative.high,
        )
        total = self.side.batch.of(form, "sum", of_positives=shares[0], of_negatives=shares[1])
        return total * largest


class MultiSimilarityLoss(PairLoss):
    r"""Multi-Similarity (Wang et al., CVPR 2019): the mean over all anchors of

    .. math:: \frac1\alpha \log\Big(1 + \sum_{p \in P(a)} e^{-\alpha (c_{ap} - \lambda)}\Big)
        + \frac1\beta \log\Big(1 + \sum_{n \in N(a)} e^{\beta (c_{an} - \lambda)}\Big)

    See :class:`PairLoss` for arguments.
    """

    def __init__(
        self,
        alpha: float = 2,
        beta: float = 50,
        base: float = 0.5,
        *,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(backend, options)
        validate.number("alpha", alpha, above=0.0)
        validate.number("beta", beta, above=0.0)
        validate.number("base", base)
        self.alpha, self.beta, self.base = alpha, beta, base

    def formula(self) -> policy.Pair:
        base = self.measure.sign * self.base
        return self.measure.policy(
            SoftHinges,
            alpha=self.alpha,
            beta=self.beta,
            positive_base=base,
            negative_base=base,
            of_positives=1.0 / self.alpha,
            of_negatives=1.0 / self.beta,
        )

    def of_batch(self, batch: Batch) -> dict[str, Part]:
        if self.measure.cosine:
            losses = functional.fused_multi_similarity_loss(
                alpha=self.alpha,
                beta=self.beta,
                base=self.base,
                reduction="none",
                **batch.arguments,
            )
        else:
            losses = batch.of(self.formula(), offset=torch.zeros(1, device=batch.rows.device))
        return {"loss": Rows(torch.where(batch.some, losses, 0.0))}

    def of_list(self, listed: Listed) -> dict[str, Part]:
        if listed.pairs.few:
            return {"loss": Nothing(listed.rows)}
        zero = torch.zeros(1, device=listed.rows.device)
        losses = listed.distinct.rows_of(self.formula(), offset=zero)
        return {"loss": Rows(losses)}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}, backend={self.backend!r}"


class CircleLoss(PairLoss):
    r"""Circle (Sun et al., CVPR 2020): the mean over anchors whose loss is not zero of

    .. math:: \log\Big(1 + \sum_{n \in N(a)} e^{\gamma\,[c_{an} + m]_+ (c_{an} - m)}
        \sum_{p \in P(a)} e^{-\gamma\,[1 + m - c_{ap}]_+ (c_{ap} - 1 + m)}\Big)

    with the weights in brackets as constants of the gradient. See :class:`PairLoss` for arguments.
    """

    default_reducer = AvgNonZeroReducer
    allowed = "cosine"

    def __init__(
        self, m: float = 0.4, gamma: float = 80, *, backend: str = "auto", **options: Any
    ) -> None:
        super().__init__(backend, options)
        validate.number("m", m)
        validate.number("gamma", gamma, above=0.0)
        self.m, self.gamma = m, gamma

    def of_batch(self, batch: Batch) -> dict[str, Part]:
        losses = functional.fused_circle_loss(
            scale=self.gamma, margin=self.m, reduction="none", **batch.arguments
        )
        return {"loss": Rows(torch.where(batch.some, losses, 0.0))}

    def of_list(self, listed: Listed) -> dict[str, Part]:
        if listed.pairs.few:
            return {"loss": Nothing(listed.rows)}
        form = circle.Circle(scale=float(self.gamma), margin=float(self.m))
        losses = listed.distinct.rows_of(form)
        return {"loss": Rows(losses)}

    def extra_repr(self) -> str:
        return f"m={self.m}, gamma={self.gamma}, backend={self.backend!r}"
