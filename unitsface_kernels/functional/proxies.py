"""Losses of metric learning with proxies, one per class."""

from __future__ import annotations

from torch import Tensor

from ..losses import REGISTRY
from .call import class_loss

_PROXY_NCA = REGISTRY["proxy_nca"].default


def fused_proxy_nca_loss(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = _PROXY_NCA.scale,
    denominator: str = _PROXY_NCA.denominator,
    class_index: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    skip_tolerance: float = 0.0,
) -> Tensor:
    r"""Proxy-NCA: the squared distance to the own proxy against those to all others.

    With unit vectors, :math:`d_{ij} = \lVert \hat x_i - \hat w_j \rVert^2 = 2 - 2 c_{ij}` and y the
    row's class:

    .. math:: L_i = s\, d_{iy} + \log \sum_{j \neq y} e^{-s\, d_{ij}}

    With ``denominator="all"`` the sum includes y (ProxyNCA++), which makes it a softmax
    cross-entropy. A row without another class has the loss 0 with "negatives" as well.

    Source: Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017,
    eq. 4; Teh et al., "ProxyNCA++", ECCV 2020, eq. 6.

    Args:
        feats: (N, D) float32, bfloat16 or float16 features, not normalized; float64 with the
            reference backend.
        weight: (C, D) proxies, not normalized.
        labels: (N,) integer classes in [0, C); -1 ignores the row. With ``class_index``:
            positions in it.
        scale: s > 0, one over the temperature: 1 in Proxy-NCA's paper, 9 in ProxyNCA++.
        denominator: "negatives" or "all".
        class_index: (K,) distinct integer rows of ``weight`` that take part; the others get zero
            gradient.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (N,) with 0
            at ignored rows.
        backend: "auto", "native", "triton" or "reference".
        skip_tolerance: as for :func:`fused_margin_softmax_loss`.

    Returns:
        float32 (float64 for float64 features) loss, () or (N,).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or name, or a backend that cannot run the call.
    """
    return class_loss(
        REGISTRY["proxy_nca"],
        {"scale": scale, "denominator": denominator},
        feats,
        weight,
        labels,
        None,
        class_index,
        reduction,
        backend,
        skip_tolerance,
    )
