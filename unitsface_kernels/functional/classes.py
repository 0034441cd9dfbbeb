"""Sample-to-class losses: rows against class weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import validate
from ..losses import REGISTRY, filtered_margin_softmax, row_margins
from .call import class_loss

_MARGIN_SOFTMAX, _UCE, _SPHEREFACE2, _NPT = (
    REGISTRY[name].default for name in ("filtered_margin_softmax", "uce", "sphereface2", "npt")
)


def fused_margin_softmax_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = _MARGIN_SOFTMAX.scale,
    m1: float | Tensor = _MARGIN_SOFTMAX.m1,
    m2: float | Tensor = _MARGIN_SOFTMAX.m2,
    m3: float | Tensor = _MARGIN_SOFTMAX.m3,
    margin_gradient: str = _MARGIN_SOFTMAX.margin_gradient,
    adaptive_margin: float | Tensor = _MARGIN_SOFTMAX.adaptive_margin,
    interclass_filtering_threshold: float | Tensor = _MARGIN_SOFTMAX.interclass_filtering_threshold,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""Softmax cross-entropy over cosines with an additive or multiplicative margin.

    The target's cosine :math:`\cos\theta` becomes :math:`\cos(m_1\theta + m_2) - m_3`, continued
    as :math:`(-1)^k\cos(\cdot) - 2k` once the angle passes :math:`k\pi`; then softmax
    cross-entropy at scale s. NormFace is (1, 0, 0), CosFace (1, 0, m), ArcFace (1, m, 0),
    SphereFace-R (m, 0, 0).

    Source: Wang et al., "CosFace", CVPR 2018, eq. 4; Deng et al., "ArcFace", CVPR 2019, eq. 3
    and 4; Liu et al., "SphereFace Revived", TPAMI 2022.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0. Each of these numbers may be a tensor of one element, which may need a
            gradient.
        m1: factor of the target's angle, > 0. Any of m1, m2 and m3 may be (N,), a margin for every
            row; a row whose margin is not finite has the loss NaN.
        m2: added to the target's angle, in radians.
        m3: subtracted from the target's cosine.
        margin_gradient: "exact" differentiates the margin; "detached" takes its shift as a
            constant, as insightface's ArcFace and OpenSphere do (OpenSphere also overwrites the
            weights by their unit vectors, see docs/math.md).
        adaptive_margin: k >= 0; k times the target's cosine, taken as a constant, is subtracted
            from it before theta is taken (EPL's prototype block).
        interclass_filtering_threshold: t in [0, 1]; negatives of a cosine above t, which may be of
            the same person, have the logit 0 and no gradient, as in insightface's
            ``CombinedMarginLoss``. 0: none are filtered.
        class_index: (K,) distinct integer rows of ``weight`` that take part (a sampled subset);
            the others get zero gradient. No copy of the sampled rows is made.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: gradient filtering: tiles of pairs are left out of the gradients as long
            as the magnitudes of d loss_i / d cosine left out of a row add up to at most this, in
            units of the largest of a single pair; docs/math.md bounds the gradients' error. 0:
            nothing is left out. The loss is exact in any case. The reference backend and, for this
            loss, ``torch.compile`` ignore it, and so does a call with several centers; on CUDA the
            host synchronizes with the device.
        centers: K, vectors of a class: its cosine is the largest of theirs, whose vector alone,
            of equal ones the first, has the gradient. (Sub-center ArcFace, Deng et al., ECCV 2020,
            section 3.) At most 256; those of a class are consecutive rows of ``weight``.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    values: dict[str, Any] = {
        "scale": scale,
        "m1": m1,
        "m2": m2,
        "m3": m3,
        "margin_gradient": margin_gradient,
        "adaptive_margin": adaptive_margin,
        "interclass_filtering_threshold": interclass_filtering_threshold,
    }
    per_row = None
    if any(isinstance(margin, Tensor) and margin.numel() != 1 for margin in (m1, m2, m3)):
        limit = values.pop("interclass_filtering_threshold")
        # The value of a tensor may be on a device.
        if isinstance(limit, Tensor) or limit != 0:
            raise ValueError(
                "interclass_filtering_threshold must be 0 with margins per row, got "
                f"{type(limit).__name__ if isinstance(limit, Tensor) else limit}"
            )
        per_row = {name: values.pop(name) for name in ("m1", "m2", "m3")}
        if not isinstance(m1, Tensor):
            validate.number("m1", m1, above=0.0, kind="a float or a torch.Tensor")
        elif m1.numel() == 1:
            parameters = filtered_margin_softmax.SPEC.parameters
            validate.number_tensor(next(p for p in parameters if p.name == "m1"), m1, feats)
        spec = row_margins.SPEC
    else:
        spec, values = filtered_margin_softmax.chosen(values)
    return class_loss(
        spec,
        values,
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        per_row,
        centers=centers,
    )


def fused_uce_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    scale: float | Tensor = _UCE.scale,
    margin: float | Tensor = _UCE.margin,
    negative_weight: float | Tensor = _UCE.negative_weight,
    adaptive_margin: float | Tensor = _UCE.adaptive_margin,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""Binary cross-entropy over classes with one threshold (UCE) or one per class (class BCE).

    With y the row's class and :math:`\lambda` the weight of the other classes:

    .. math:: L_i = \sigma^+(-(s (c_{iy} - m) - b_y))
                  + \lambda \sum_{j \neq y} \sigma^+(s\, c_{ij} - b_j)

    Source: Zhou et al., "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition", ICCV
    2023 (one b; its balanced variant has a weight other than 1). The published code clamps
    logits to [-s, s]; this function does not.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        b: threshold in logit units: a float (no gradient), a one-element tensor, or (C,).
        scale: s > 0.
        margin: m, subtracted from the target's cosine.
        negative_weight: lambda > 0.
        adaptive_margin: k >= 0; k times the target's cosine, taken as a constant, is a further
            margin (EPL's prototype block).
        class_index: (K,) distinct integer rows of ``weight`` (and of a (C,) ``b``) that take
            part; the others get zero gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance, centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    per_class = isinstance(b, Tensor) and b.numel() != 1
    return class_loss(
        REGISTRY["class_bce" if per_class else "uce"],
        {
            "scale": scale,
            "margin": margin,
            "negative_weight": negative_weight,
            "adaptive_margin": adaptive_margin,
        },
        feats,
        weight,
        labels,
        b,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        centers=centers,
    )


def fused_sphereface2_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    b: float | Tensor,
    *,
    scale: float | Tensor = _SPHEREFACE2.scale,
    margin: float | Tensor = _SPHEREFACE2.margin,
    t: float | Tensor = _SPHEREFACE2.t,
    alpha: float | Tensor = _SPHEREFACE2.alpha,
    loss_weight: float | Tensor = _SPHEREFACE2.loss_weight,
    margin_type: str = _SPHEREFACE2.margin_type,
    margin_gradient: str = _SPHEREFACE2.margin_gradient,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""SphereFace2: one binary classification per class, on adjusted cosines.

    With :math:`g(c) = 2 ((c + 1) / 2)^t - 1`, scale r, loss weight w and y the row's class:

    .. math:: L_i = \frac{w}{r} \Big[ \alpha\, \sigma^+(-(r (g(c_{iy}) - m) + b))
                  + (1 - \alpha) \sum_{j \neq y} \sigma^+(r (g(c_{ij}) + m) + b) \Big]

    with the additive margin C. With the angular margin A the target's cosine is
    :math:`\cos(\min(\theta + m, \pi))` and no margin is added to the logits.

    Source: Wen et al., "SphereFace2: Binary Classification is All You Need for Deep Face
    Recognition", ICLR 2022; published in OpenSphere, which clips the cosines of A to
    1 - 1e-5 before taking the angle. This function does not.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        b: bias, added to the logits (the opposite sign of a threshold): a float (no gradient)
            or a one-element tensor.
        scale: r > 0.
        margin: m in [0, pi]; for A in radians.
        t: exponent of g, > 0; 1 leaves cosines as they are.
        alpha: weight of the target in (0, 1]; the others weigh 1 - alpha.
        loss_weight: w > 0.
        margin_type: "C" or "A".
        margin_gradient: "detached" takes g and the margin as constant shifts, so that
            d logit / d cosine is r, as published; "exact" differentiates them.
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get
            zero gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance, centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["sphereface2"],
        {
            "scale": scale,
            "margin": margin,
            "t": t,
            "alpha": alpha,
            "loss_weight": loss_weight,
            "margin_type": margin_type,
            "margin_gradient": margin_gradient,
        },
        feats,
        weight,
        labels,
        b,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        centers=centers,
    )


def fused_npt_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor = _NPT.margin,
    k: int = _NPT.k,
    hinges: str = _NPT.hinges,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    centers: int = 1,
) -> Tensor:
    r"""Nearest proxies triplet (NPT): a triplet hinge with the k nearest wrong class weights.

    With cosines :math:`c_{ij}` of the rows with the class weights, the target y and the k
    largest :math:`c_{in}` of the other classes, of equal ones those that come first:

    .. math:: L_i = \frac{1}{k} \sum_n \max(0, 2 (c_{in} - c_{iy}) + m)

    which is :math:`\lVert \hat x_i - \hat w_y \rVert^2 - \lVert \hat x_i - \hat w_n \rVert^2
    + m`. With fewer than k other classes it is the mean over those; without any it is 0.

    Source: Khalid et al., "NPT-Loss: A Metric Loss with Implicit Mining for Face Recognition",
    arXiv 2103.03503. The paper's hyper-parameters were not available to check; the defaults are
    those of code published for its later version (cerebrai/npt-loss: k = 1, and a margin of 0.5
    on half of this difference). That code adds the k hinges, ``hinges="sum"``; with k = 1 both
    are the same.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        margin: m, in squared distances between unit vectors.
        k: number of wrong classes per row, an int from 1 to 64.
        hinges: "mean" over the k hinges, or their "sum", as published.
        class_index: (K,) distinct integer rows of ``weight`` that take part (a sampled subset);
            the others get zero gradient. No copy of the sampled rows is made.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["npt"],
        {"margin": margin, "k": k, "hinges": hinges},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        centers=centers,
    )
