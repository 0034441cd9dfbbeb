"""Sample-to-class losses: rows against class weights."""

from __future__ import annotations

from torch import Tensor

from ..losses import REGISTRY
from .call import class_loss


def fused_margin_softmax_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.4,
    margin_gradient: str = "exact",
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Softmax cross-entropy over cosines with an additive or multiplicative margin.

    The target's cosine :math:`\cos\theta` becomes :math:`\cos(m_1\theta + m_2) - m_3`, continued
    as :math:`(-1)^k\cos(\cdot) - 2k` once the angle passes :math:`k\pi`; then softmax
    cross-entropy at scale s. NormFace is (1, 0, 0), CosFace (1, 0, m), ArcFace (1, m, 0),
    SphereFace-R (m, 0, 0).

    Source: Wang et al., "CosFace", CVPR 2018, eq. 4; Deng et al., "ArcFace", CVPR 2019, eq. 3
    and 4; Liu et al., "SphereFace Revived", TPAMI 2022.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalised; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalised.
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0.
        m1: factor of the target's angle, > 0.
        m2: added to the target's angle, in radians.
        m3: subtracted from the target's cosine.
        margin_gradient: "exact" differentiates the margin; "detached" takes its shift as a
            constant, as insightface's ArcFace and OpenSphere do.
        class_index: (K,) distinct integer rows of ``weight`` that take part (a sampled subset);
            the others get zero gradient. No copy of the sampled rows is made.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["margin_softmax"],
        {"scale": scale, "m1": m1, "m2": m2, "m3": m3, "margin_gradient": margin_gradient},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
    )


def fused_npt_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    k: int = 1,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Nearest proxies triplet (NPT): a triplet hinge with the k nearest wrong class weights.

    With cosines :math:`c_{ij}` of the rows with the class weights, the target y and the k
    largest :math:`c_{in}` of the other classes, of equal ones those that come first:

    .. math:: L_i = \frac{1}{k} \sum_n \max(0, 2 (c_{in} - c_{iy}) + m)

    which is :math:`\lVert \hat x_i - \hat w_y \rVert^2 - \lVert \hat x_i - \hat w_n \rVert^2
    + m`. With fewer than k other classes it is the mean over those; without any it is 0.

    Source: "NPT-Loss: A Metric Loss with Implicit Mining for Face Recognition". Its published
    hyper-parameters were not available to check: the defaults are this package's choice.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalised; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalised.
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        margin: m, in squared distances between unit vectors.
        k: number of wrong classes per row, an int from 1 to 64.
        class_index: (K,) distinct integer rows of ``weight`` that take part (a sampled subset);
            the others get zero gradient. No copy of the sampled rows is made.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["npt"],
        {"margin": margin, "k": k},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
    )
