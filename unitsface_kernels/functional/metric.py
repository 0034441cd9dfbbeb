"""Losses of metric learning over pairs of samples."""

from __future__ import annotations

from torch import Tensor

from ..distributed.collectives import Group
from ..losses import REGISTRY, TOWERS
from .call import Options, Samples
from .ranks import pair_loss

_CONTRASTIVE, _HARD = (REGISTRY[name].default for name in ("contrastive", "batch_hard"))
_SIMPLE = TOWERS["simple_pairs"].default


def fused_contrastive_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    positive_margin: float = _CONTRASTIVE.positive_margin,
    negative_margin: float = _CONTRASTIVE.negative_margin,
    distance: str = _CONTRASTIVE.distance,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Contrastive loss: positives are drawn together, negatives pushed apart to a margin.

    With :math:`d_{ij} = \lVert \hat x_i - \hat x_j \rVert = \sqrt{2 - 2 c_{ij}}`:

    .. math:: L_i = \tfrac12 \sum_{p \in P(i)} [d_{ip} - m_p]_+^2
                  + \tfrac12 \sum_{j \in N(i)} [m_n - d_{ij}]_+^2

    Source: Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping",
    CVPR 2006, eq. 4, which has no margin of positives.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, skip_tolerance, group,
            exchange: as of :func:`fused_uss_loss`.
        positive_margin: m_p >= 0; positives that are as near have no loss.
        negative_margin: m_n >= 0; negatives that are as far have no loss.
        distance: "euclidean", of unit vectors, from 0 to 2, where less than 0.01 counts as that; or
            "cosine", 1 - c.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0 at
            ignored rows.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["contrastive"],
        {
            "positive_margin": positive_margin,
            "negative_margin": negative_margin,
            "distance": distance,
        },
        Samples(feats, labels, None, memory, memory_labels, batch_offset),
        Options(reduction, backend, skip_tolerance),
        group,
        exchange,
    )


def fused_triplet_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    margin: float = _HARD.margin,
    k: int = _HARD.k,
    distance: str = _HARD.distance,
    hinge: str = _HARD.hinge,
    reduction: str = "mean",
    backend: str = "auto",
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""Triplets of every row: its hardest positive and its k hardest negatives (batch-hard).

    With the distance d of unit vectors, :math:`2 - 2 c` or its root, the farthest positive p of row
    i and its k nearest negatives n:

    .. math:: L_i = \frac1k \sum_n [d_{ip} - d_{in} + m]_+

    or, with ``hinge="soft"``, the mean of :math:`\sigma^+(d_{ip} - d_{in})`. With fewer than k
    negatives it is the mean over those.

    Source: Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
    arXiv 1703.07737, eq. 5, with Euclidean distances; on squared ones of unit vectors as Schroff et
    al., "FaceNet", CVPR 2015, eq. 2.

    Args:
        feats, labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`.
        margin: m.
        k: number of negatives per row, an int from 1 to 64.
        distance: "squared", from 0 to 4, or "euclidean", where less than 0.01 counts as that.
        hinge: "hard" or "soft".
        reduction: "mean" over the rows that have a positive and a negative, "sum", or "none" for
            (N,) with 0 at rows that have not or are ignored.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        REGISTRY["batch_hard"],
        {"margin": margin, "k": k, "distance": distance, "hinge": hinge},
        Samples(feats, labels, None, memory, memory_labels, batch_offset),
        Options(reduction, backend),
        group,
        exchange,
    )


def fused_simple_loss(
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    batch_offset: int | None = None,
    b_theta: float = _SIMPLE.b_theta,
    alpha: float = _SIMPLE.alpha,
    r: float = _SIMPLE.r,
    margin: float = _SIMPLE.margin,
    loss_weight: float = _SIMPLE.loss_weight,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
) -> Tensor:
    r"""SimPLE: a logistic decision of every pair, by inner products of features as they are.

    With the score :math:`s_{ij} = \langle x_i, x_j \rangle
    - b_\theta \lVert x_i \rVert \lVert x_j \rVert`, the numbers :math:`|P|, |N|` of all positive
    and of all negative pairs, and :math:`\sigma^+(z) = \log(1 + e^z)`, the mean over rows is

    .. math:: L = w \Big[\frac{\alpha}{|P|} \sum_P \sigma^+\big(-(s_{ij} - m + b) / r\big)
                  + \frac{1 - \alpha}{|N|} \sum_N \sigma^+\big((s_{ij} + m + b)\, r\big)\Big]

    and a row's loss the number of rows times its part of the sums.

    Source: Wen et al., "Pairwise Similarity Learning is SimPLE", ICCV 2023 (arXiv 2310.09449), as
    in opensphere/module/head/simple.py of ydwen/opensphere.

    Args:
        feats: (N, D) float32 or bfloat16 features, whose norms matter; float16 on the CPU, float64
            with the reference backend.
        labels, memory, memory_labels, batch_offset, backend, group, exchange: as of
            :func:`fused_uss_loss`. Published with a memory of the last features of a momentum
            encoder, the batch's among them.
        b: bias, added to the scores (the opposite sign of a threshold): a float (no gradient) or a
            one-element tensor.
        b_theta: the cosine at which a score is 0.
        alpha: weight of positives in [0, 1]; negatives weigh 1 - alpha.
        r: > 0, divides logits of positives and multiplies those of negatives.
        margin: m.
        loss_weight: w > 0.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0 at
            ignored rows.
        skip_tolerance: without effect, since every pair reads norms.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return pair_loss(
        TOWERS["simple_pairs"],
        {
            "b_theta": b_theta,
            "alpha": alpha,
            "r": r,
            "margin": margin,
            "loss_weight": loss_weight,
        },
        Samples(feats, labels, b, memory, memory_labels, batch_offset),
        Options(reduction, backend, skip_tolerance),
        group,
        exchange,
    )
