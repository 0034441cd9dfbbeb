"""Sample-to-sample losses: rows against the batch itself or a memory of features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.collectives import Group
from ..losses import REGISTRY
from .call import Options, Samples
from .ranks import pair_loss

_USS, _PAIR_BCE, _PAIR_SOFTMAX, _PAIR_LOGSUMEXP, _CIRCLE, _MULTI_SIMILARITY = (
    REGISTRY[name].default
    for name in ("uss", "pair_bce", "pair_softmax", "pair_logsumexp", "circle", "multi_similarity")
)


def fused_uss_loss(
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float | Tensor = _USS.scale,
    margin: float | Tensor = _USS.margin,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Unified threshold integrated sample-to-sample loss (USS; with a margin USS-m).

    With cosines :math:`c_{ij}` of the rows of ``feats`` against the columns (the batch itself
    without the pair (i, i), or ``memory``) and :math:`\sigma^+(z) = \log(1 + e^z)`:

    .. math:: L_i = \sum_{j \in P(i)} \sigma^+(-(s (c_{ij} - m) - b))
                  + \sum_{j \in N(i)} \sigma^+(s\, c_{ij} - b)

    Source: Li et al., "UniTSFace: Unified Threshold Integrated Sample-to-Sample Loss for Face
    Recognition", NeurIPS 2023 (arXiv 2311.02523), eq. 11 and, with the margin, eq. 24. The
    published code clamps logits to [-s, s]; this function does not.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        labels: (N,) integer identities; -1 ignores the row, and the column it is in the batch.
        b: threshold in logit units, a float (no gradient) or a one-element tensor. The unified
            cosine threshold is ``b / scale``.
        memory: (M, D) features to compare with instead of the batch; it gets a gradient only if
            it requires one.
        memory_labels: (M,) integer identities; -1 is neither positive nor negative.
        batch_offset: for a memory that holds the batch itself: the pair of row i and memory row
            i + batch_offset is left out. None: no pair is.
        scale: s > 0. Both numbers may be tensors of one element, which may need a gradient.
        margin: m, subtracted from the cosines of positive pairs.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: gradient filtering: tiles of pairs are left out of the gradients as long
            as the magnitudes of d loss_i / d cosine left out of a row add up to at most this, in
            units of the largest of a single pair; docs/math.md bounds the gradients' error. 0:
            nothing is left out. Loss and gradient of b are exact in any case. The reference backend
            ignores it; on CUDA the host synchronizes with the device.
        group: compare with the batches of all its ranks (``torch.distributed.group.WORLD`` for
            every rank), which may differ in size and be empty. Every rank makes the same call,
            and the same backward pass. Rows are the rank's own; columns are the rows of all
            ranks, or ``memory``, which has to be the same on every rank, as has b: they are
            compared by checksums (on CUDA a later call reports a difference). Features of a second
            network are gathered first, in rank order. The loss is that of one process with all
            batches, the same on every rank ("none": of the own rows). Gradients are those of the
            mean over ranks of the objectives, after averaging by data parallelism: the gradient of
            ``feats`` is W times that of the single process, for W ranks; those of ``b`` and
            ``memory`` are complete on every rank, averaged again or not. ``skip_tolerance`` filters
            tiles of the own batch only. A mistake on one rank is an error on all.
            ``torch.compile`` breaks the graph here. Sizes are exchanged first, which synchronizes
            the host with the other ranks and, if the group is one of NCCL alone (not
            "cpu:gloo,cuda:nccl"), with the device. None, or a group of one: the own batch.
        exchange: transport of the other ranks' features. "gather": all at once; "ring": half a
            batch at a time, so that at most the size of the largest batch is held; "auto":
            "gather" up to 64 MB. Both are deterministic; they add up in different orders.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["uss"],
        {"scale": scale, "margin": margin},
        Samples(feats, labels, b, memory, memory_labels, batch_offset),
        Options(reduction, backend, skip_tolerance),
        group,
        exchange,
    )


def fused_pair_bce_loss(
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float | Tensor = _PAIR_BCE.scale,
    margin: float | Tensor = _PAIR_BCE.margin,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Binary cross-entropy over pairs with a threshold per identity (BCE; with a margin BCE-m).

    As :func:`fused_uss_loss`, with the threshold of the column's identity:

    .. math:: L_i = \sum_{j \in P(i)} \sigma^+(-(s (c_{ij} - m) - b_{y_j}))
                  + \sum_{j \in N(i)} \sigma^+(s\, c_{ij} - b_{y_j})

    Source: Li et al., "UniTSFace", NeurIPS 2023, eq. 22.

    Args:
        feats: (N, D) features, as for :func:`fused_uss_loss`.
        labels: (N,) integer identities in [0, K); -1 ignores the row, and the column it is in
            the batch.
        b: (K,) thresholds in logit units, or a float for all (no gradient).
        memory: (M, D) features to compare with instead of the batch.
        memory_labels: (M,) integer identities in [0, K); -1 is neither positive nor negative.
        batch_offset: as for :func:`fused_uss_loss`.
        scale: s > 0.
        margin: m, subtracted from the cosines of positive pairs.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance, group, exchange: as for :func:`fused_uss_loss`. Every rank has the
            thresholds of all identities.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["pair_bce"],
        {"scale": scale, "margin": margin},
        Samples(feats, labels, b, memory, memory_labels, batch_offset),
        Options(reduction, backend, skip_tolerance),
        group,
        exchange,
    )


def fused_pair_softmax_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float | Tensor = _PAIR_SOFTMAX.scale,
    margin: float | Tensor = _PAIR_SOFTMAX.margin,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Softmax of each positive of a row against all negatives of the row.

    .. math:: L_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} -\log
        \frac{e^{s (c_{ip} - m)}}{e^{s (c_{ip} - m)} + \sum_{j \in N(i)} e^{s c_{ij}}}

    Known as soft-m in UniTSFace; with s = 1, m = 0 the (N+1)-tuplet or multi-class N-pair loss on
    cosines. Positives of a row do not compete with each other.

    Source: Li et al., "UniTSFace", NeurIPS 2023, eq. 17; Sohn, "Improved Deep Metric Learning
    with Multi-class N-pair Loss Objective", NIPS 2016, eq. 6.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`.
        scale: s > 0.
        margin: m, subtracted from the cosines of positive pairs.
        reduction: "mean" over the rows that have a positive, "sum", or "none" for (N,) with 0
            at rows that have none or are ignored.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["pair_softmax"],
        {"scale": scale, "margin": margin},
        Samples(feats, labels, None, memory, memory_labels, batch_offset),
        Options(reduction, backend),
        group,
        exchange,
    )


def fused_circle_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float | Tensor = _CIRCLE.scale,
    margin: float | Tensor = _CIRCLE.margin,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""All positives of a row against all of its negatives, each weighted by its distance from an
    optimum.

    .. math:: L_i = \log\Big(1 + \sum_{j \in N(i)} e^{s\,[c_{ij} + m]_+ (c_{ij} - m)}
        \sum_{p \in P(i)} e^{-s\,[1 + m - c_{ip}]_+ (c_{ip} - 1 + m)}\Big)

    The weights :math:`[\cdot]_+` are constants of the gradient. A row without a positive, or
    without a negative, has the loss 0.

    Source: Sun et al., "Circle Loss", CVPR 2020, eq. 6.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`.
        scale: s > 0.
        margin: m; the optimum of a positive is 1 + m, that of a negative -m.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0 at
            ignored rows.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["circle"],
        {"scale": scale, "margin": margin},
        Samples(feats, labels, None, memory, memory_labels, batch_offset),
        Options(reduction, backend),
        group,
        exchange,
    )


def fused_multi_similarity_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    alpha: float | Tensor = _MULTI_SIMILARITY.alpha,
    beta: float | Tensor = _MULTI_SIMILARITY.beta,
    base: float | Tensor = _MULTI_SIMILARITY.base,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Soft hinges at one cosine, of a row's hardest positives and of its hardest negatives.

    .. math:: L_i = \frac{1}{\alpha}
        \log\Big(1 + \sum_{p \in P(i)} e^{-\alpha (c_{ip} - \lambda)}\Big)
        + \frac{1}{\beta} \log\Big(1 + \sum_{j \in N(i)} e^{\beta (c_{ij} - \lambda)}\Big)

    Every pair of a row counts: the mining of pairs before it, in its paper, is not part of it.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019; the default
    beta is the paper's, the other defaults are those of its code.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`.
        alpha, beta: scales > 0 of positives and of negatives.
        base: the cosine lambda that positives are to be above, and negatives below.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0 at
            ignored rows.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["multi_similarity"],
        {"alpha": alpha, "beta": beta, "base": base},
        Samples(feats, labels, None, memory, memory_labels, batch_offset),
        Options(reduction, backend),
        group,
        exchange,
    )


def fused_pair_logsumexp(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float | Tensor = _PAIR_LOGSUMEXP.scale,
    lower: float | Tensor = _PAIR_LOGSUMEXP.lower,
    upper: float | Tensor = _PAIR_LOGSUMEXP.upper,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Log-sum-exp of every row's negatives, :math:`\log \sum_{j \in N(i)} e^{s c_{ij}}`.

    The soft maximum, at scale s, of the cosines between a row and other identities.

    Source: Li et al., "UniTSFace", NeurIPS 2023, published code (initial threshold).

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`.
        scale: s > 0.
        lower, upper: negatives whose cosine lies outside are left out. A row that has negatives,
            none of which lies inside, has the value -inf and no gradient.
        reduction: "mean" over the rows that have a negative, "sum", or "none" for (N,) with 0
            at rows that have none or are ignored.

    Returns:
        float32 (float64 for float64 features) value, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["pair_logsumexp"],
        {"scale": scale, "lower": lower, "upper": upper},
        Samples(feats, labels, None, memory, memory_labels, batch_offset),
        Options(reduction, backend),
        group,
        exchange,
    )


@torch.no_grad()
def uss_threshold_init(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    scale: float | Tensor = _USS.scale,
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Initial USS threshold from a batch, as in UniTSFace's published code.

    .. math:: b_0 = \mathrm{mean}_i \log \sum_{j \in N(i)} e^{s c_{ij}}

    The mean is over the rows that have a negative.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`.
        scale: s > 0, the one of the loss.

    Returns:
        () float32 (float64 for float64 features) threshold in logit units, without gradient.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return fused_pair_logsumexp(
        feats,
        labels,
        memory=memory,
        memory_labels=memory_labels,
        batch_offset=batch_offset,
        scale=scale,
        backend=backend,
        group=group,
        exchange=exchange,
    )
