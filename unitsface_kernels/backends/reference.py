"""Eager PyTorch: the oracle. Materializes the N x M matrix; gradients come from autograd.

Any floating dtype; float16 and bfloat16 inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import EMPTY, LossSpec
from ..policy.variable import (
    COLUMN_NORM,
    COMPUTED,
    NEGATIVES,
    ROW_NORM,
    TARGET_COSINE,
    WITH_POSITIVES,
)
from .streaming.call import CallConfig, CallTensors

NORM_EPS = 1e-5
#: One over the root of the largest number.
_SHRINK = {torch.float32: 2.0**-64, torch.float64: 2.0**-512}


def unavailable(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run such tensors; None if it can."""
    return None


def normalize_rows(x: Tensor) -> Tensor:
    """(N, D) rows at unit length, norms clamped from below at 1e-5.

    Rows whose squares would overflow are shrunk by a power of two first.
    """
    factor = _shrinking(x)
    return F.normalize(x if factor is None else x * factor, dim=1, eps=NORM_EPS)


def _shrinking(x: Tensor) -> Tensor | None:
    """(N, 1) factors with which the squares of rows do not overflow; None: ones."""
    if not x.numel() or x.dtype not in _SHRINK:
        return None
    shrink = _SHRINK[x.dtype]
    large = x.detach().abs().amax(dim=1, keepdim=True) > 2.0**-10 / shrink
    return torch.where(large, shrink, 1.0).to(x.dtype)


def norms(x: Tensor) -> Tensor:
    """(N,) norms of (N, D) rows, at least 1e-5."""
    factor = _shrinking(x)
    if factor is None:
        return torch.linalg.vector_norm(x, dim=1).clamp_min(NORM_EPS)
    return (torch.linalg.vector_norm(x * factor, dim=1) / factor[:, 0]).clamp_min(NORM_EPS)


def similarities(spec: LossSpec, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) what a loss compares by: cosines or inner products. Of classes of
    several centers, (M, K, D), that of the first one that attains the largest.
    """
    if columns.dim() == 3:
        with_centers = similarities(spec, rows, columns.flatten(0, 1))
        return with_centers.unflatten(1, columns.shape[:2]).max(dim=2).values
    if spec.normalize:
        return cosines(rows, columns)
    return _finite_or_nan(rows) @ _finite_or_nan(columns).T


def _finite_or_nan(x: Tensor) -> Tensor:
    """Rows that are not finite as NaN, as at unit length: terms of infinities could be finite."""
    return torch.where(x.isfinite().all(dim=1, keepdim=True), x, torch.nan)


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) cosines, norms clamped from below at 1e-5."""
    return normalize_rows(rows) @ normalize_rows(columns).T


def _term(term, cosine, params, threshold, variables):
    given = (cosine, threshold, params)
    return term(*given, variables) if variables else term(*given)


def _sum(spec, params, cosine, positive, negative, *others):
    # Masked entries are replaced before the formula: 0 * inf of an unused branch is NaN.
    zero = cosine.new_zeros(())
    terms = zero.expand_as(cosine)
    for term, mask in ((spec.negative, negative), (spec.positive, positive)):
        if term is not None:
            of_pairs = _term(term, torch.where(mask, cosine, zero), params, *others)
            terms = terms + torch.where(mask, of_pairs, zero)
    return terms.sum(dim=1)


def _logsumexp(spec, params, cosine, positive, negative, *others):
    assert spec.negative is not None
    negative_logits = _term(spec.negative, cosine, params, *others)
    lowest = torch.finfo(cosine.dtype).min
    # A policy takes pairs out with -inf; NaN is not equal to it and stays.
    negative = negative & (negative_logits != -torch.inf)
    log_negatives = torch.logsumexp(negative_logits.masked_fill(~negative, lowest), dim=1)
    if spec.finish is not None:
        return _finished(spec, params, cosine, positive, negative, log_negatives, *others)
    if spec.positive is None:
        # Also if there is no column at all, or none that is not left out.
        return torch.where(negative.any(dim=1), log_negatives, -torch.inf)
    positive_logits = _term(spec.positive, torch.where(positive, cosine, 0.0), params, *others)
    per_positive = -F.logsigmoid(positive_logits - log_negatives[:, None])
    count = positive.sum(dim=1)
    mean = torch.where(positive, per_positive, 0.0).sum(dim=1) / count.clamp(min=1)
    # A class row without a target in this shard still contributes its negatives.
    without = log_negatives if spec.topology == "class" else torch.zeros_like(log_negatives)
    return torch.where(count > 0, mean, without)


def _finished(spec, params, cosine, positive, negative, log_negatives, *others):
    """Losses over classes by ``finish``: a row has one target at most."""
    logits = _term(spec.positive, torch.where(positive, cosine, 0.0), params, *others)
    has_target = positive.any(dim=1)
    of_target = torch.where(has_target, torch.where(positive, logits, 0.0).sum(dim=1), EMPTY)
    negatives = torch.where(negative.any(dim=1), log_negatives, EMPTY)
    of_rows = [value[:, 0] for value in _of_rows(spec, others[1])]
    per_row = spec.finish.value(of_target, negatives, params, of_rows) + (cosine * 0.0).sum(dim=1)
    return torch.where(has_target, per_row, log_negatives)


def _logsumexps(spec, params, cosine, positive, negative, *others):
    lowest = torch.finfo(cosine.dtype).min
    sums = []
    for term, mask in ((spec.positive, positive), (spec.negative, negative)):
        if term is None:
            sums.append(cosine.new_full((cosine.shape[0],), EMPTY))
            continue
        logits = _term(term, torch.where(mask, cosine, 0.0), params, *others)
        mask = mask & (logits != -torch.inf)
        log_sum = torch.logsumexp(logits.masked_fill(~mask, lowest), dim=1)
        sums.append(torch.where(mask.any(dim=1), log_sum, EMPTY))
    of_rows = _of_rows(spec, others[1])
    return spec.finish.value(*sums, params, [value[:, 0] for value in of_rows])


def _of_rows(spec, variables):
    """Values of scalars (1, 1) and of rows (N, 1)."""
    found = zip(spec.variables, variables, strict=True)
    return [value for variable, value in found if variable.side != "column"]


def _smallest(cosine: Tensor, mask: Tensor) -> Tensor:
    """(N, 1) smallest of each row, of equal ones the first; 0 without any."""
    if not cosine.shape[1]:
        return cosine.new_zeros((cosine.shape[0], 1))
    place = cosine.detach().masked_fill(~mask, torch.inf).neg().argmax(dim=1, keepdim=True)
    return torch.where(mask.any(dim=1, keepdim=True), cosine.gather(1, place), 0.0)


def _nearest(spec, params, cosine, positive, negative, threshold, variables):
    triplet = spec.triplet
    # Stable: of equal cosines the smaller position wins. NaN comes before every number.
    candidates = cosine.detach().masked_fill(~negative, -torch.inf)
    order = torch.sort(candidates, dim=1, descending=True, stable=True).indices
    order = order[:, : triplet.count(params)]
    found = negative.gather(1, order)
    nearest = torch.where(found, cosine.gather(1, order), 0.0)
    if spec.topology == "class":
        target = torch.where(positive, cosine, 0.0).sum(dim=1, keepdim=True)
    else:
        target = _smallest(cosine, positive)
    terms = triplet.value(nearest, target, params, _of_rows(spec, variables))
    # Without the target's cosine, which may be in another shard, there is no triplet.
    scored = found & positive.any(dim=1, keepdim=True)
    total = torch.where(scored, terms, 0.0).sum(dim=1)
    if not triplet.adds(params):
        total = total / found.sum(dim=1).clamp(min=1)
    return total + target.detach()[:, 0] * 0.0  # NaN without any wrong column, too


_REDUCTIONS = {
    "sum": _sum,
    "logsumexp": _logsumexp,
    "logsumexps": _logsumexps,
    "nearest": _nearest,
}


def pair_masks(
    row_labels: Tensor, column_labels: Tensor, self_offset: int | None
) -> tuple[Tensor, Tensor]:
    """(N, M) which pairs are positive, and which negative; labels are int64."""
    valid = (row_labels != -1)[:, None] & (column_labels >= 0)[None, :]
    same = row_labels[:, None] == column_labels[None, :]
    if self_offset is not None:
        place = torch.arange(same.shape[0], device=same.device)[:, None] + self_offset
        valid = valid & (place != torch.arange(same.shape[1], device=same.device)[None, :])
    return valid & same, valid & ~same


def valid_rows(spec: LossSpec, row_labels: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(N,) rows that have a loss."""
    if spec.valid_rows == "labeled":
        return row_labels != -1
    masks = {"with_positives": (positive,), "with_negatives": (negative,)}
    found = [mask.any(dim=1) for mask in masks.get(spec.valid_rows, (positive, negative))]
    return torch.stack(found).all(dim=0)


def _not_finite(
    spec: LossSpec,
    rows: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    threshold: Tensor | None,
    variables: tuple[Tensor, ...],
) -> Tensor:
    """NaN for rows that are not finite, see ``streaming.call.not_finite``."""
    bad = ~rows.isfinite().all(dim=1)
    if threshold is not None:
        if spec.threshold == "per_column":
            threshold = torch.where(column_labels >= 0, threshold, 0.0)
        bad = bad | ~threshold.isfinite().all()
    for value in variables:
        finite = value.isfinite()
        bad = bad | ~(finite[:, 0] if value.shape == (len(bad), 1) else finite.all())
    return torch.where(bad & (row_labels != -1), torch.nan, 0.0).to(rows.dtype)


def _numbers(
    name: str, spec: LossSpec, row_labels: Tensor, positive: Tensor, negative: Tensor
) -> Tensor:
    """(2,) what a variable counts, and the rows that have a loss."""
    some = negative if name == NEGATIVES else positive
    some = some.any(dim=1) if name == WITH_POSITIVES else some
    return torch.stack([some.sum(), valid_rows(spec, row_labels, positive, negative).sum()])


def _variables(
    spec: LossSpec,
    given: Tensor | None,
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor,
    column_labels: Tensor,
    cosine: Tensor,
    directions: Sequence[tuple[Tensor, Tensor, Tensor]],
    over_ranks: Callable[[Tensor], Tensor],
) -> tuple[Tensor, ...]:
    """Values of ``spec.variables``, each to be broadcast against the cosines.

    ``directions``: labels and pairs of the rows, and of columns that have losses.
    """
    positive = directions[0][1]
    shapes = {"scalar": (1, 1), "row": (-1, 1), "column": (1, -1)}
    sizes = {"scalar": 1, "row": cosine.shape[0], "column": cosine.shape[1]}
    found, start = [], 0
    for variable in spec.variables:
        if variable.name == ROW_NORM:
            value = torch.where(row_labels == -1, 1.0, norms(rows))
        elif variable.name == COLUMN_NORM:
            # Before the norms: 0 times the gradient of a norm at 0, which is none, is none.
            taken = (column_labels >= 0)[:, None]
            value = torch.where(taken[:, 0], norms(torch.where(taken, columns, 1.0)), 1.0)
        elif variable.name == TARGET_COSINE:
            value = torch.where(positive, cosine, 0.0).sum(dim=1).detach()
        elif variable.name in COMPUTED:
            found_numbers = [_numbers(variable.name, spec, *pairs) for pairs in directions]
            numbers = over_ranks(torch.stack(found_numbers).sum(dim=0)).clamp(min=1)
            value = numbers[0].to(cosine.dtype) / numbers[1]
        else:
            assert given is not None
            value = given[start : start + sizes[variable.side]].to(cosine.dtype)
            start += sizes[variable.side]
        found.append(value.reshape(shapes[variable.side]))
    return tuple(found)


def _losses(
    config: CallConfig,
    rows: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    cosine: Tensor,
    positive: Tensor,
    negative: Tensor,
    threshold: Tensor | None,
    variables: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """(N,) losses of rows against columns, and which of them there are."""
    spec = config.spec
    reduce = _REDUCTIONS[spec.reduction]
    per_row = reduce(spec, config.params, cosine, positive, negative, threshold, variables)
    if spec.regularizer is not None:
        of_row = _term(spec.regularizer, cosine[:, :1], config.params, threshold, variables)
        per_row = per_row + of_row.reshape(-1)
    valid = valid_rows(spec, row_labels, positive, negative)
    per_row = torch.where(valid, per_row, 0.0)
    doubtful = _not_finite(spec, rows, row_labels, column_labels, threshold, variables)
    return per_row + doubtful, valid


def similarity_loss(
    config: CallConfig, *tensors: Any, over_ranks: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Loss of every row against every column, of :class:`CallTensors`.

    Args:
        over_ranks: the sum of every rank's numbers, which are those of its rows.
    """
    spec = config.spec
    rows, row_labels, columns, column_labels, column_index, *numbers = CallTensors(*tensors)
    threshold, given = numbers
    dtype = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        # Compared as int64: uint8 has no -1.
        row_labels = row_labels.to(torch.int64)
        # 0 times the NaN of an ignored row would be NaN in every gradient.
        rows = torch.where((row_labels == -1)[:, None], 0.0, rows.to(dtype))
        other = rows if columns is None else columns.to(dtype)
        if config.both:
            assert column_labels is not None
            other = torch.where((column_labels == -1)[:, None], 0.0, other)
        if column_index is not None:
            other = other.index_select(0, column_index.to(torch.int64))
        cosine = similarities(spec, rows, other)
        if spec.topology == "class":
            column_labels = torch.arange(other.shape[0], device=rows.device)
        elif columns is None:
            column_labels = row_labels
        assert column_labels is not None
        column_labels = column_labels.to(torch.int64)
        positive, negative = pair_masks(row_labels, column_labels, config.self_offset)
        if threshold is not None:
            threshold = threshold.to(dtype)
        variables: tuple[Tensor, ...] = ()
        if spec.variables:
            directions = [(row_labels, positive, negative)]
            if config.both:
                directions.append((column_labels, positive.T, negative.T))
            operands = (rows, row_labels, other, column_labels, cosine, directions)
            variables = _variables(spec, given, *operands, over_ranks)
        sides = [(rows, row_labels, column_labels, cosine, positive, negative)]
        if config.both:
            back = (cosine.T, positive.T, negative.T)
            sides.append((other, column_labels, row_labels, *back))
        found = [_losses(config, *side, threshold, variables) for side in sides]
        per_row, valid = (torch.cat(parts) for parts in zip(*found, strict=True))
        if config.reduction == "none":
            return per_row
        total = per_row.sum()
        return total if config.reduction == "sum" else total / valid.sum().clamp(min=1)
