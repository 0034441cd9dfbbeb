"""Losses between two towers: rows of one against rows of the other, both with gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import validate
from ..distributed import pairs
from ..distributed.collectives import Group
from ..losses import TOWERS
from .call import Options, Samples
from .info_nce import Queries, several_positives
from .tower_ranks import matched_by_place, places, tower_loss


def fused_siglip_loss(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""SigLIP: a logistic decision of every pair of two towers, of which rows i and i match.

    With cosines :math:`c_{ij}` of row i of ``a`` and row j of ``b``, and y = 1 if i = j, else -1,

    .. math:: L_i = \sum_j \log\big(1 + e^{-y_{ij} (s\, c_{ij} + \mathrm{bias})}\big)

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, eq. 3. It is USS
    without a margin, at the threshold -bias.

    Args:
        a, b: (N, D) features of the towers, float32, bfloat16 or float16, not normalized; float64
            with the reference backend.
        scale: s > 0, a float (no gradient) or a one-element tensor: ``log_scale.exp()`` of the
            parameter that is learned.
        bias: a float (no gradient) or a one-element tensor.
        reduction: "mean" over the rows, "sum", or "none" for (N,).
        backend: "auto", "native", "triton" or "reference".
        group, exchange: as of :func:`fused_uss_loss`: every rank has its own rows of both towers,
            as many of one as of the other. The loss is that of one process with all of them.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """

    def check() -> None:
        _check_towers(a, b, scale, reduction)
        validate.threshold("bias", bias, a)

    where = places(check, a, b, group, exchange)
    labels = matched_by_place(where, a.device)
    # Several ranks compute both directions of all pairs; one process needs the rows' alone.
    both = where.group is not None
    samples = Samples(a, labels[0], -bias, b, labels[1], None, both)
    options = Options(reduction, backend, variables={"scale": scale})
    loss = tower_loss(TOWERS["siglip"], samples, options, where, exchange)
    if reduction == "mean" or not both:
        return loss
    return loss / 2 if reduction == "sum" else loss[: len(a)]


def fused_clip_loss(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""CLIP: the mean of two cross-entropies, of rows of ``a`` against all of ``b`` and vice versa.

    With the logits :math:`z_{ij} = s\, c_{ij}` of row i of ``a`` and row j of ``b``, of which rows
    i and i match,

    .. math:: L_i = \frac12 \Big(\log \sum_j e^{z_{ij}} + \log \sum_j e^{z_{ji}}\Big) - z_{ii}

    Both directions come from one set of tiles: one GEMM for the statistics, three for gradients.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    ICML 2021, figure 3; Zhang et al., "Contrastive Learning of Medical Visual Representations from
    Paired Images and Text", MLHC 2022, eq. 2 to 4.

    Args:
        a, b: (N, D) features of the towers, float32, bfloat16 or float16, not normalized; float64
            with the reference backend.
        scale: s > 0, a float (no gradient) or a one-element tensor: ``log_scale.exp()`` of the
            parameter that is learned.
        reduction: "mean" over the N pairs, "sum", or "none" for (N,).
        backend: "auto", "native", "triton" or "reference".
        group, exchange: as of :func:`fused_uss_loss`: every rank has its own rows of both towers,
            as many of one as of the other. The loss is that of one process with all of them.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    where = places(lambda: _check_towers(a, b, scale, reduction), a, b, group, exchange)
    labels = matched_by_place(where, a.device)
    samples = Samples(a, labels[0], None, b, labels[1], None, both=True)
    options = Options(reduction, backend, variables={"scale": scale})
    loss = tower_loss(TOWERS["clip"], samples, options, where, exchange)
    if reduction == "mean":
        return loss  # over as many losses of rows as of columns
    return loss / 2 if reduction == "sum" else loss.view(2, -1).mean(dim=0)


def fused_info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor | None,
    key_labels: Tensor | None,
    scale: float | Tensor,
    *,
    both: bool = False,
    batch_offset: int | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""InfoNCE of queries against keys, with any number of positives and of hard negatives.

    With the logits :math:`z_{ij} = s\, c_{ij}` of query i and key j, and P(i) the keys of the
    query's label,

    .. math:: L_i = \log \sum_j e^{z_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} z_{ip}

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv
    1807.03748, eq. 4; several positives as in Khosla et al., "Supervised Contrastive Learning",
    NeurIPS 2020, eq. 2.

    Args:
        queries: (N, D) features, float32, bfloat16 or float16, not normalized; float64 with the
            reference backend.
        keys: (M, D) features. Hard negatives are keys whose label no query has.
        labels, key_labels: (N,) and (M,) integers >= 0; -1 ignores a query, or a key. Both None:
            key i is the positive of query i, and keys from N on are negatives.
        scale: s > 0, a float (no gradient) or a one-element tensor.
        both: also the losses of keys against queries, from the same tiles.
        batch_offset: for keys that hold the queries: the pair of query i and key i + batch_offset
            is left out. Not without labels, with ``both`` or with a group.
        reduction: "mean" over the queries, and with ``both`` the keys, that have a positive; "sum";
            or "none" for (N,), with ``both`` (N + M,), 0 where there is none.
        backend: "auto", "native", "triton" or "reference".
        group, exchange: as of :func:`fused_uss_loss`: every rank has its own queries and keys. The
            loss is that of one process with all of them.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,) or (N + M,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    batch = Queries(queries, labels, keys, key_labels, batch_offset, both)
    check = partial(_check_queries, batch, scale, reduction, group)
    same = {"reduction": reduction, "both": both, "whether there are labels": labels is not None}
    where = places(check, queries, keys, group, exchange, same)
    if labels is None:
        own = matched_by_place(where, queries.device)
        # The losses of keys are not wanted, but across ranks computed.
        split = where.group is not None and not both
        samples = Samples(queries, own[0], None, keys, own[1], None, both or split)
        options = Options("none" if split else reduction, backend, variables={"scale": scale})
        loss = tower_loss(TOWERS["clip"], samples, options, where, exchange)
        if not split:
            return loss
        loss = loss[: len(queries)]
        valid = own[0] >= 0
    else:
        loss, valid = several_positives(batch, scale, backend, where, exchange)
    if reduction == "none":
        return loss
    if where.group is not None:
        return pairs.reduced(loss, valid, reduction, where.group)
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum().clamp(min=1)


def _check_towers(a: Tensor, b: Tensor, scale: float | Tensor, reduction: str) -> None:
    validate.features("a", a)
    validate.features("b", b, like=a, other="a")
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"b must have {a.shape[0]} rows like a, got shape {tuple(b.shape)}")
    validate.choice("reduction", reduction, validate.REDUCTIONS)
    _check_scale(scale, a)


def _check_queries(batch: Queries, scale: float | Tensor, reduction: str, group: Group) -> None:
    queries, labels, keys, key_labels, batch_offset, both = batch
    validate.features("queries", queries)
    validate.features("keys", keys, like=queries, other="queries")
    validate.instance("both", both, bool, "a bool")
    validate.choice("reduction", reduction, validate.REDUCTIONS)
    validate.both_or_none("labels", labels, "key_labels", key_labels)
    _check_scale(scale, queries)
    count, columns = queries.shape[0], keys.shape[0]
    if batch_offset is not None:
        if group is not None:
            raise ValueError(f"batch_offset must be None with a group, got {batch_offset}")
        validate.integer("batch_offset", batch_offset)
        if labels is None or both or not 0 <= batch_offset <= columns - count:
            raise ValueError(
                "batch_offset must be the place of the queries among the keys, and None without "
                f"labels or with both, got {batch_offset}"
            )
    if labels is None or key_labels is None:
        if columns < count:
            raise ValueError(
                f"keys must have a row for each of {count} queries without labels, got {columns}"
            )
        return
    validate.labels("labels", labels, count, queries, counted="queries")
    validate.labels("key_labels", key_labels, columns, queries, counted="keys")
    if not torch.compiler.is_compiling():
        validate.in_range("labels", labels, -1, None)
        validate.in_range("key_labels", key_labels, -1, None)


def _check_scale(scale: float | Tensor, like: Tensor) -> None:
    """A number above 0, or a one-element tensor of one."""
    validate.threshold("scale", scale, like)
    if not isinstance(scale, Tensor):
        validate.number("scale", scale, above=0.0)
    elif not torch.compiler.is_compiling():
        wrong = scale.detach() <= 0
        if scale.is_cuda:
            validate.report_later(wrong.any(), "scale must be > 0")
        elif wrong.any():
            raise ValueError(f"scale must be > 0, got {scale.item():g}")
