"""Sample-to-class losses whose negatives depend on the target's cosine."""

from __future__ import annotations

from torch import Tensor

from ..losses import REGISTRY
from .call import class_loss
from .numbers import Values

_CURRICULARFACE, _MV_SOFTMAX = (REGISTRY[name].default for name in ("curricularface", "mv_softmax"))


def fused_curricularface_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    t: float | Tensor,
    scale: float | Tensor = _CURRICULARFACE.scale,
    margin: float | Tensor = _CURRICULARFACE.margin,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""CurricularFace: ArcFace whose hard negatives weigh by a number that follows the training.

    With the target's angle :math:`\theta` and :math:`T = \cos(\theta + m)`, a negative of cosine c
    has the logit

    .. math:: s\, c \text{ if } c \le T, \text{ else } s\, c\, (t + c),

    and the target s T or, where the angle would pass pi, :math:`s (\cos\theta - m \sin m)`; then
    softmax cross-entropy. Which negatives are hard has no gradient.

    Source: Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face
    Recognition", CVPR 2020, and its published code (head/metrics.py of HuangYG123/CurricularFace),
    which also defines the target beyond pi.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        t: mean of the target cosines of past batches, see :class:`CurricularFaceLoss`: a number, or
            a tensor of one element, which gets a gradient if it requires one. Gradients in float16
            may overflow for t beyond 10.
        scale: s > 0.
        margin: m in [0, pi], in radians.
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get
            zero gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: as for :func:`fused_margin_softmax_loss`; no tile is left out.
        centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["curricularface"],
        {"scale": scale, "margin": margin},
        *(feats, weight, labels, None, class_index, reduction, backend, skip_tolerance),
        variables={"t": t},
        centers=centers,
    )


def fused_mv_softmax_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = _MV_SOFTMAX.scale,
    margin: float | Tensor = _MV_SOFTMAX.margin,
    t: float | Tensor = _MV_SOFTMAX.t,
    margin_type: str = _MV_SOFTMAX.margin_type,
    weighting: str = _MV_SOFTMAX.weighting,
    margin_at: str = _MV_SOFTMAX.margin_at,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""MV-Softmax: the vectors that mis-classify a sample by its margin are emphasized.

    With the target's angle :math:`\theta` and :math:`T = \cos\theta - m` ("am") or
    :math:`\cos(\theta + m)` ("arc"), a negative of cosine :math:`c > T` has the logit

    .. math:: s\,((1 + t)\, c + t) \text{ ("adaptive"), or } s\,(c + t) \text{ ("fixed")},

    any other s c, and the target s T; then softmax cross-entropy. Which negatives are
    mis-classified has no gradient.

    Source: Wang et al., "Mis-classified Vector Guided Softmax Loss for Face Recognition", AAAI
    2020, and its published code (fc_layers.py of xiaoboCASIA/SV-X-Softmax).

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) class weights, not normalized; with ``centers`` K (C * K, D) or (C, K, D).
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0.
        margin: m in [0, pi]; for "arc" in radians.
        t: weight >= 0 of what is mis-classified; 0 leaves the base loss.
        margin_type: "am", the additive margin of the cosine, or "arc", that of the angle.
        weighting: "adaptive", by exp(s t (c + 1)), or "fixed", by exp(s t).
        margin_at: "acute": a target at a right angle or more has the logit s cos(theta), without
            margin, which is the default of the published code (its ``easy_margin``); "all": every
            target has the margin, as in the paper.
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get
            zero gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: as for :func:`fused_margin_softmax_loss`; no tile is left out.
        centers: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    values: Values = {
        "scale": scale,
        "margin": margin,
        "t": t,
        "margin_type": margin_type,
        "weighting": weighting,
        "margin_at": margin_at,
    }
    return class_loss(
        REGISTRY["mv_softmax"],
        values,
        *(feats, weight, labels, None, class_index, reduction, backend, skip_tolerance),
        centers=centers,
    )
