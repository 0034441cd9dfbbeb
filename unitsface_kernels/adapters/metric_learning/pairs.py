"""NT-Xent and SupCon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch, functional, policy, validate
from ...backends.reference import normalize_rows
from ...functional.matching import Matching, sums_of_matching
from ...losses.measured_pairs import AgainstAll, OwnLogits, Softmax
from .base import wide
from .listed import Listed
from .pair_loss import Batch, PairLoss
from .reducers import NOTHING, AvgNonZeroReducer, Entry, ListedPairs, Nothing, OfPairs, Part, Rows


class _TemperatureLoss(PairLoss):
    """With logits that are similarities divided by ``temperature`` > 0."""

    def __init__(self, temperature: float, backend: str, options: dict[str, Any]) -> None:
        super().__init__(backend, options)
        validate.number("temperature", temperature, above=0.0)
        self.temperature = temperature

    def formula(self, form: type[policy.Pair]) -> policy.Pair:
        return self.measure.policy(form, scale=1.0 / self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, backend={self.backend!r}"


class NTXentLoss(_TemperatureLoss):
    r"""NT-Xent (InfoNCE; Chen et al., ICML 2020): the mean over positive pairs (a, p) of

    .. math:: -\log \frac{e^{c_{ap} / T}}{e^{c_{ap} / T} + \sum_{n \in N(a)} e^{c_{an} / T}}

    Zero if the batch has no positive or no negative pair. See :class:`PairLoss` for arguments.
    """

    def __init__(self, temperature: float = 0.07, *, backend: str = "auto", **options: Any) -> None:
        super().__init__(temperature, backend, options)

    def of_batch(self, batch: Batch) -> dict[str, Part]:
        factor = self.measure.cosines_per_unit
        if factor is None:
            per_row = batch.of(self.formula(Softmax))
        else:
            per_row = functional.fused_pair_softmax_loss(
                scale=factor / self.temperature, margin=0.0, reduction="none", **batch.arguments
            )
        return {"loss": _PositivePairs(self, batch, per_row)}

    def of_list(self, listed: Listed) -> dict[str, Part]:
        anchors, positives, others, _ = listed.pairs
        if not len(anchors) or not len(others) or listed.pairs.few:
            return {"loss": Nothing(listed.rows)}
        own, negative = listed.terms(self.formula(Softmax))
        assert own is not None
        assert negative is not None
        losses = F.softplus(listed.log_sums(negative, others)[anchors] - own)
        return {"loss": ListedPairs(losses, (anchors, positives), "pos_pair", len(listed.rows))}


@dataclass(frozen=True)
class _PositivePairs(OfPairs):
    """Losses of positive pairs, by their means ``per_row`` (N,)."""

    loss: NTXentLoss
    batch: Batch
    per_row: Tensor

    def counts(self) -> Tensor:
        matching = self.batch.matching
        return matching.positives * matching.meaningful

    def means(self) -> Tensor:
        return torch.where(self.counts() > 0, self.per_row, 0.0)

    def total(self) -> Tensor:
        return (self.means() * self.counts()).sum()

    def between(self, low: float | None, high: float | None) -> Tensor | None:
        if low != 0 or high is not None:
            return None
        # Only pairs without any negative have no loss.
        counts = torch.where(self.batch.matching.negatives > 0, self.counts(), 0)
        return self.total() / counts.sum().clamp(min=1)

    def entry(self) -> Entry:
        if not bool(self.batch.matching.meaningful):
            return NOTHING
        return self.loss.of_list(self.batch.listed())["loss"].entry()


class SupConLoss(_TemperatureLoss):
    r"""SupCon (Khosla et al., NeurIPS 2020): the mean over anchors a whose loss is not zero of

    .. math:: \log \sum_{j} e^{c_{aj} / T} - \frac{1}{|P(a)|} \sum_{p \in P(a)} c_{ap} / T

    with j over all other samples. Not zero is the loss of every anchor that has a positive and at
    least one more sample, however small. Zero if the batch has no positive or no negative pair.
    See :class:`PairLoss` for arguments.
    """

    default_reducer = AvgNonZeroReducer

    def __init__(self, temperature: float = 0.1, *, backend: str = "auto", **options: Any) -> None:
        super().__init__(temperature, backend, options)

    def of_batch(self, batch: Batch) -> dict[str, Part]:
        matching = batch.matching
        positives = matching.positives
        lone = positives == 1
        if self.measure.cosine:
            per_row = self._of_cosines(batch)
        else:
            per_row = batch.of(self.formula(AgainstAll), lone=lone.to(wide(batch.rows)))
            own = batch.of(self.formula(OwnLogits)) / positives.clamp(min=1)
            per_row = per_row - torch.where(lone, 0.0, own)
        others = positives + matching.negatives
        some = (positives > 0) & (others > 1) & matching.meaningful
        return {"loss": Rows(torch.where(some, per_row, 0.0), some)}

    def of_list(self, listed: Listed) -> dict[str, Part]:
        listed = listed.distinct.without_both_kinds()
        anchors, others = listed.pairs.anchors, listed.pairs.others
        positives, negatives = listed.counts(anchors), listed.counts(others)
        lone = positives == 1
        per_row = listed.rows_of(self.formula(AgainstAll), lone=lone.to(wide(listed.rows)))
        own = listed.rows_of(self.formula(OwnLogits)) / positives.clamp(min=1)
        meaningful = len(anchors) > 0 and len(others) > 0 and not listed.pairs.few
        some = (positives > 0) & (positives + negatives > 1) & meaningful
        losses = torch.where(some, per_row - torch.where(lone, 0.0, own), 0.0)
        return {"loss": Rows(losses, some)}

    def per_anchor(
        self, embeddings: Tensor, columns: Tensor | None, matching: Matching, offset: int | None
    ) -> Tensor:
        """(N,) losses by cosines of anchors that have a positive and at least one more sample."""
        return self._of_cosines(Batch(embeddings, columns, matching, offset, self.backend))

    def _of_cosines(self, batch: Batch) -> Tensor:
        # Two positives or more: the loss is at least the logarithm of their number, and the
        # difference of two large numbers exact enough. A lone positive p may leave next to nothing:
        # log(e^N + e^p) - p is softplus(N - p), with the negatives' log-sum-exp N.
        lone = batch.matching.positives == 1
        log_sum = self._log_sum(batch, lone)
        dtype = log_sum.dtype
        rows = normalize_rows(batch.rows.to(dtype))
        unit = rows if batch.columns is None else normalize_rows(batch.columns.to(dtype))
        backend = dispatch.resolve(self.backend, batch.rows.device.type, batch.rows.dtype)
        sums = sums_of_matching(unit, batch.matching, plain=backend == "reference")
        if batch.offset is not None:
            sums = sums - unit[batch.offset : batch.offset + len(rows)]
        mean = (rows * sums).sum(dim=1) / batch.matching.positives.clamp(min=1)
        gap = log_sum - mean / self.temperature
        return torch.where(lone, F.softplus(gap), gap)

    def _log_sum(self, batch: Batch, lone: Tensor) -> Tensor:
        """(N,) log-sum-exp of the negatives where ``lone``, elsewhere of all other samples: those
        rows have a label that no column has.
        """
        matching = batch.matching
        absent = torch.full_like(matching.rows, len(matching.columns))
        if batch.columns is None:
            # Here rows are columns too: a label for each.
            absent = absent + torch.arange(len(absent), device=absent.device)
        return functional.fused_pair_logsumexp(
            batch.rows,
            torch.where(lone, matching.rows, absent),
            scale=1.0 / self.temperature,
            reduction="none",
            **batch.against,
        )
