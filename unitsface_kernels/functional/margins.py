"""Softmax losses over classes whose margin is that of the row or of its class."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..losses import adaface, class_margin, elasticface, magface
from .call import class_loss
from .numbers import Values

_ADAFACE, _CLASS_MARGIN, _ELASTICFACE, _MAGFACE = (
    module.SPEC.default for module in (adaface, class_margin, elasticface, magface)
)


def fused_adaface_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    mean: float | Tensor,
    std: float | Tensor,
    *,
    scale: float | Tensor = _ADAFACE.scale,
    margin: float | Tensor = _ADAFACE.margin,
    h: float | Tensor = _ADAFACE.h,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""Margin softmax whose margin follows the norm of the row's features.

    With :math:`q = \mathrm{clip}((\lVert x\rVert - \mu)\,h / \sigma, -1, 1)` the target's cosine
    becomes :math:`\cos(\theta - m q) - m (1 + q)`: angular and additive parts. q is a constant of
    the gradient. :class:`AdaFaceLoss` keeps mean and deviation of the norms.

    Source: Kim, Jain and Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022,
    and its published code; docs/math.md has what differs.

    Args:
        feats, weight, labels: as of :func:`fused_margin_softmax_loss`.
        mean, std: of the norms: numbers or one-element tensors, std >= 0; constants of the
            gradient.
        scale: s > 0. Each of these numbers may be a tensor of one element, which may need a
            gradient.
        margin: m >= 0.
        h: how many margins a deviation from the mean is worth.
        class_index, reduction, backend, skip_tolerance, centers: as of
            :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    if not isinstance(std, Tensor):
        validate.number("std", std, at_least=0.0, kind="a float or a torch.Tensor")
    return class_loss(
        adaface.SPEC,
        {"scale": scale, "margin": margin, "h": h},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        {"mean": mean, "std": std},
        centers=centers,
    )


def fused_magface_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = _MAGFACE.scale,
    l_a: float = _MAGFACE.l_a,
    u_a: float = _MAGFACE.u_a,
    l_margin: float | Tensor = _MAGFACE.l_margin,
    u_margin: float | Tensor = _MAGFACE.u_margin,
    lambda_g: float | Tensor = _MAGFACE.lambda_g,
    margin_type: str = _MAGFACE.margin_type,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""Angular margin softmax whose margin grows with the norm, and a term that keeps norms up.

    With the norm :math:`a` clipped to [l_a, u_a], the angular margin rises linearly from l_margin
    to u_margin, and :math:`\lambda_g (a / u_a^2 + 1 / a)` is added to the loss of the row. The
    gradient passes through the norm.

    Source: Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality
    Assessment", CVPR 2021, eq. 3, and its published code.

    Args:
        feats, weight, labels: as of :func:`fused_margin_softmax_loss`.
        scale: s > 0. Each of these numbers but l_a and u_a may be a tensor of one element, which
            may need a gradient.
        l_a, u_a: bounds of the norm, 0 < l_a < u_a.
        l_margin, u_margin: margins at these norms, in radians.
        lambda_g: weight of the term of the norm, >= 0.
        margin_type: of targets whose angle with the margin leaves [0, pi]: "easy", as published,
            gives a margin to targets of positive cosine alone; "hard" takes
            :math:`m \sin m` from the cosine beyond pi - m.
        class_index, reduction, backend, skip_tolerance, centers: as of
            :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    check_norm_bounds(l_a, u_a)
    values: Values = {"scale": scale, "l_a": l_a, "u_a": u_a, "lambda_g": lambda_g}
    values |= {"l_margin": l_margin, "u_margin": u_margin, "margin_type": margin_type}
    return class_loss(
        magface.SPEC,
        values,
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        centers=centers,
    )


def check_norm_bounds(l_a: float, u_a: float) -> None:
    validate.number("l_a", l_a, above=0.0)
    validate.number("u_a", u_a)
    if u_a <= l_a:
        raise ValueError(f"u_a must be > l_a = {l_a}, got {u_a}")


def fused_elasticface_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: float | Tensor,
    *,
    scale: float | Tensor = _ELASTICFACE.scale,
    kind: str = _ELASTICFACE.kind,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""ArcFace or CosFace with a margin for every row, as :class:`ElasticFaceLoss` draws them.

    :func:`fused_margin_softmax_loss` takes margins of both kinds per row.

    Source: Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPRW
    2022, ElasticFace-Arc and ElasticFace-Cos.

    Args:
        feats, weight, labels: as of :func:`fused_margin_softmax_loss`.
        margin: (N,), or one number for all rows; may need a gradient.
        scale: s > 0, may be a tensor of one element, which may need a gradient.
        kind: "arc": the margin is added to the target's angle, "cos": subtracted from its cosine.
        class_index, reduction, backend, skip_tolerance, centers: as of
            :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        elasticface.SPEC,
        {"scale": scale, "kind": kind},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        {"margin": margin},
        centers=centers,
    )


def fused_class_margin_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: float | Tensor,
    *,
    scale: float | Tensor = _CLASS_MARGIN.scale,
    kind: str = _CLASS_MARGIN.kind,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
    centers: int = 1,
) -> Tensor:
    r"""CosFace or ArcFace with a margin for every class.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss"
    (LDAM), NeurIPS 2019, here on cosines, with the margins of :func:`frequency_margins`; Liu et
    al., "AdaptiveFace", CVPR 2019, learns them.

    Args:
        feats, weight, labels: as of :func:`fused_margin_softmax_loss`.
        margin: (C,), of which a row has that of its class, or one number for all; may need a
            gradient. Learned margins fall without a term that keeps them up.
        scale: s > 0, may be a tensor of one element, which may need a gradient.
        kind: "cos": the margin is subtracted from the target's cosine, "arc": added to its angle.
        class_index, reduction, backend, skip_tolerance, centers: as of
            :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        class_margin.SPEC,
        {"scale": scale, "kind": kind},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
        {"margin": margin},
        centers=centers,
    )


def frequency_margins(
    counts: Tensor, largest: float = 0.5, smallest: float | None = None, power: float = 0.25
) -> Tensor:
    r"""Margins of classes by how many samples they have: rare ones have the largest.

    Without ``smallest``, :math:`m_c = m_{max} (\min_k n_k / n_c)^p` (LDAM, NeurIPS 2019, sec. 3.2,
    p = 1/4). With it :math:`n_c^{-p}` is mapped linearly to [smallest, largest], as the dynamic
    margins of ArcFace in haqishen/Google-Landmark-Recognition-2020-3rd-Place-Solution.

    Args:
        counts: (C,) samples per class; 0 counts as 1.
        largest: margin of the rarest class.
        smallest: of the most frequent one; None: in proportion.
        power: p >= 0.

    Returns:
        (C,) float32.

    Raises:
        TypeError, ValueError: counts that are no vector of numbers >= 0, or wrong numbers.
    """
    validate.instance("counts", counts, Tensor, "a torch.Tensor")
    if counts.dim() != 1 or not counts.shape[0]:
        raise ValueError(f"counts must have shape (C,), got {tuple(counts.shape)}")
    if not bool((counts >= 0).all()):
        raise ValueError(f"counts must be >= 0, got {counts.min().item()}")
    validate.number("largest", largest)
    validate.number("power", power, at_least=0.0)
    inverse = counts.to(torch.float64).clamp_min(1.0) ** -power
    rarest = inverse.max()
    if smallest is None:
        return (largest * inverse / rarest).to(torch.float32)
    validate.number("smallest", smallest)
    width = (rarest - inverse.min()).clamp_min(torch.finfo(torch.float64).tiny)
    # The same for all classes that are as rare.
    share = 1.0 - (rarest - inverse) / width
    return (smallest + (largest - smallest) * share).to(torch.float32)
