"""Losses with proxies, one per class, as their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import validate
from ..distributed.collectives import Group
from ..losses import proxy_anchor, proxy_nca, simple_proxy
from .class_loss import RegisteredClassLoss

_NCA, _ANCHOR = proxy_nca.SPEC.default, proxy_anchor.SPEC.default
_SIMPLE = simple_proxy.SPEC.default


class ProxyNCALoss(RegisteredClassLoss):
    """Proxies and Proxy-NCA; see :func:`fused_proxy_nca_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, denominator, reduction, backend, skip_tolerance, centers: as the function's.
        init_std: standard deviation of the initial proxies; None: 0.01. Their norms do not matter
            to the loss, but to how far a step turns them: the code published for ProxyNCA++ has
            1 / 8.

    Attributes:
        weight: (C, D) parameter, the proxies, with several centers (C, centers, D).

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
        centers: int = 1,
    ) -> None:
        super().__init__(locals())


class ProxyAnchorLoss(RegisteredClassLoss):
    """Proxies and Proxy-Anchor; see :func:`fused_proxy_anchor_loss`.

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


class SimPLEProxyLoss(RegisteredClassLoss):
    """Proxies and SimPLE with its learnable bias; see :func:`fused_simple_proxy_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        b_theta, alpha, r, margin, loss_weight, reduction, backend, skip_tolerance: as the
            function's. Defaults are those of the published configuration for pairs of samples.
        init_bias: first value of b.
        init_std: standard deviation of the initial proxies, whose norms matter; None: D ** -0.5,
            norms of about 1.

    Attributes:
        weight: (C, D) parameter, the proxies.
        bias: () parameter b.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_bias or init_std; from a call, as the function.
    """

    loss = "simple_proxy"
    _threshold_name = "bias"
    bias: nn.Parameter

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        b_theta: float | Tensor = _SIMPLE.b_theta,
        alpha: float | Tensor = _SIMPLE.alpha,
        r: float | Tensor = _SIMPLE.r,
        margin: float | Tensor = _SIMPLE.margin,
        loss_weight: float | Tensor = _SIMPLE.loss_weight,
        init_bias: float = -10.0,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        validate.number("init_bias", init_bias)
        self.init_bias = init_bias
        super().__init__(locals())

    def _default_std(self, embedding_size: int) -> float:
        return embedding_size**-0.5

    def reset_thresholds(self) -> None:
        nn.init.constant_(self.bias, self.init_bias)

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "init_bias": self.init_bias}
