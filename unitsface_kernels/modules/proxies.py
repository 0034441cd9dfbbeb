"""Losses with proxies, one per class, as their weights."""

from __future__ import annotations

from ..distributed.collectives import Group
from ..losses import proxy_anchor, proxy_nca
from .class_loss import RegisteredClassLoss

_NCA, _ANCHOR = proxy_nca.SPEC.default, proxy_anchor.SPEC.default


class ProxyNCALoss(RegisteredClassLoss):
    """Proxies and Proxy-NCA; see :func:`fused_proxy_nca_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, denominator, reduction, backend, skip_tolerance: as the function's.
        init_std: standard deviation of the initial proxies; None: 0.01. Their norms do not matter
            to the loss, but to how far a step turns them: the code published for ProxyNCA++ has
            1 / 8.

    Attributes:
        weight: (C, D) parameter, the proxies.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or init_std; from a call, as the function.
    """

    loss = "proxy_nca"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = _NCA.scale,
        denominator: str = _NCA.denominator,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(locals())


class ProxyAnchorLoss(RegisteredClassLoss):
    """Proxies and Proxy-Anchor; see :func:`fused_proxy_anchor_loss`. Not for :class:`PartialFC`.

    Args:
        embedding_size: D.
        num_classes: C.
        alpha, margin, reduction, backend, group: as the function's.
        init_std: standard deviation of the initial proxies; None: 0.01. The published code has
            (2 / C) ** 0.5.

    Attributes:
        weight: (C, D) parameter, the proxies.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or init_std; from a call, as the function.
    """

    loss = "proxy_anchor"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        alpha: float = _ANCHOR.alpha,
        margin: float = _ANCHOR.margin,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        init_std: float | None = None,
    ) -> None:
        super().__init__(locals())
