"""NT-Xent and SupCon."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import dispatch, functional, validate
from ...backends.reference import normalize_rows
from ...functional.matching import Matching, match, sums_of_matching
from ...memory import all_finite, nan_unless
from . import arguments


class PairLoss(nn.Module):
    """Base of the losses over pairs of samples.

    Args:
        temperature: > 0; logits are cosines divided by it.
        backend: "auto", "native", "triton" or "reference".
        options: the original's other keywords, of which only the defaults can be had.

    Shape:
        embeddings (N, D), labels (N,) any integers; the pairs are those within the batch, without
        (i, i), or those with ref_emb (M, D), ref_labels (M,). -> () float32.
    """

    #: The original's default reducer, which is built in.
    reducer: str

    def __init__(self, temperature: float, backend: str, options: dict[str, object]) -> None:
        super().__init__()
        validate.number("temperature", temperature, above=0.0)
        arguments.options_of_original(options, self.reducer)
        self.temperature = temperature
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        given, labels = labels, arguments.batch(embeddings, labels, indices_tuple)
        validate.both_or_none("ref_emb", ref_emb, "ref_labels", ref_labels)
        if ref_emb is None:
            return self.compare(embeddings, labels, None, labels, 0)
        validate.features("ref_emb", ref_emb, like=embeddings)
        # The original leaves (i, i) out if both are one tensor on the device, and only then.
        # Compared as given: transforms of torch.func make every conversion another tensor.
        one = given is not None and ref_labels is given and given.device == embeddings.device
        ref_labels = arguments.labels_of("ref_labels", ref_labels, ref_emb, "ref_emb")
        return self.compare(embeddings, labels, ref_emb, ref_labels, 0 if one else None)

    def compare(
        self,
        embeddings: Tensor,
        labels: Tensor,
        columns: Tensor | None,
        column_labels: Tensor,
        batch_offset: int | None,
    ) -> Tensor:
        """The loss of rows against columns (None: the batch), checked arguments.

        The pair of row i and column i + batch_offset, of the same identity, is left out.
        """
        matching = match(labels, column_labels, holds_itself=batch_offset is not None)
        loss = self._loss(embeddings, columns, matching, batch_offset)
        # A row without a positive has no term, and would hide its NaN.
        return loss + nan_unless(all_finite(embeddings), loss.dtype)

    def _loss(
        self, embeddings: Tensor, columns: Tensor | None, matching: Matching, offset: int | None
    ) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, backend={self.backend!r}"


class NTXentLoss(PairLoss):
    r"""NT-Xent (InfoNCE; Chen et al., ICML 2020): the mean over positive pairs (a, p) of

    .. math:: -\log \frac{e^{c_{ap} / T}}{e^{c_{ap} / T} + \sum_{n \in N(a)} e^{c_{an} / T}}

    Zero if the batch has no positive or no negative pair. See :class:`PairLoss` for arguments.
    """

    reducer = "MeanReducer"

    def __init__(self, temperature: float = 0.07, *, backend: str = "auto", **options) -> None:
        super().__init__(temperature, backend, options)

    def _loss(
        self, embeddings: Tensor, columns: Tensor | None, matching: Matching, offset: int | None
    ) -> Tensor:
        per_row = functional.fused_pair_softmax_loss(
            embeddings,
            matching.rows,
            memory=columns,
            memory_labels=None if columns is None else matching.columns,
            batch_offset=None if columns is None else offset,
            scale=1.0 / self.temperature,
            margin=0.0,
            reduction="none",
            backend=self.backend,
        )
        # A row has the mean over its positives; every pair weighs the same.
        pairs = matching.positives * matching.meaningful
        weights = pairs.to(per_row.dtype) / pairs.sum().clamp(min=1)
        return (per_row * weights).sum()


class SupConLoss(PairLoss):
    r"""SupCon (Khosla et al., NeurIPS 2020): the mean over anchors a whose loss is not zero of

    .. math:: \log \sum_{j} e^{c_{aj} / T} - \frac{1}{|P(a)|} \sum_{p \in P(a)} c_{ap} / T

    with j over all other samples. Not zero is the loss of every anchor that has a positive and at
    least one more sample, however small. Zero if the batch has no positive or no negative pair.
    See :class:`PairLoss` for arguments.
    """

    reducer = "AvgNonZeroReducer"

    def __init__(self, temperature: float = 0.1, *, backend: str = "auto", **options) -> None:
        super().__init__(temperature, backend, options)

    def _loss(
        self, embeddings: Tensor, columns: Tensor | None, matching: Matching, offset: int | None
    ) -> Tensor:
        per_row = self.per_anchor(embeddings, columns, matching, offset)
        others = matching.positives + matching.negatives
        valid = (matching.positives > 0) & (others > 1) & matching.meaningful
        return torch.where(valid, per_row, 0.0).sum() / valid.sum().clamp(min=1)

    def per_anchor(
        self, embeddings: Tensor, columns: Tensor | None, matching: Matching, offset: int | None
    ) -> Tensor:
        """(N,) losses of anchors that have a positive and at least one more sample."""
        # Two positives or more: the loss is at least the logarithm of their number, and the
        # difference of two large numbers exact enough. A lone positive p may leave next to nothing:
        # log(e^N + e^p) - p is softplus(N - p), with the negatives' log-sum-exp N.
        positives = matching.positives
        lone = positives == 1
        log_sum = self._log_sum(embeddings, columns, matching, offset, lone)
        dtype = log_sum.dtype
        rows = normalize_rows(embeddings.to(dtype))
        unit = rows if columns is None else normalize_rows(columns.to(dtype))
        backend = dispatch.resolve(self.backend, embeddings.device.type, embeddings.dtype)
        sums = sums_of_matching(unit, matching, plain=backend == "reference")
        if offset is not None:
            sums = sums - unit[offset : offset + len(rows)]
        mean = (rows * sums).sum(dim=1) / positives.clamp(min=1)
        gap = log_sum - mean / self.temperature
        return torch.where(lone, F.softplus(gap), gap)

    def _log_sum(
        self,
        embeddings: Tensor,
        columns: Tensor | None,
        matching: Matching,
        offset: int | None,
        lone: Tensor,
    ) -> Tensor:
        """(N,) log-sum-exp of the negatives where ``lone``, elsewhere of all other samples: those
        rows have a label that no column has.
        """
        absent = torch.full_like(matching.rows, len(matching.columns))
        column_labels: Tensor | None = matching.columns
        if columns is None:
            # Here rows are columns too: a label for each.
            absent = absent + torch.arange(len(absent), device=absent.device)
            column_labels, offset = None, None
        labels = torch.where(lone, matching.rows, absent)
        return functional.fused_pair_logsumexp(
            embeddings,
            labels,
            memory=columns,
            memory_labels=column_labels,
            batch_offset=offset,
            scale=1.0 / self.temperature,
            reduction="none",
            backend=self.backend,
        )
