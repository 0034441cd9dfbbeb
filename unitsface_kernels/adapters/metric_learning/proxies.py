"""Proxy-Anchor and Proxy-NCA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import functional, validate
from ...losses.measured_pairs import SoftHinges
from . import indices
from .measures import SQUARED
from .reducers import DivisorReducer, MultipleReducers, Part, Rows, kind_of
from .weighted import ClassLoss, Fill, Reduced


class _ProxyLoss(ClassLoss):
    """With ``proxies``, a (C, D) parameter; see :class:`ClassLoss`."""

    weights = "proxies"
    proxies: nn.Parameter

    def rows(self) -> Tensor:
        return self.proxies

    def filled(self, fill: Fill | None) -> nn.Parameter:
        weight = torch.empty(self.num_classes, self.embedding_size)
        (fill or self.fill)(weight)
        return nn.Parameter(weight)

    def fill(self, weight: Tensor) -> None:
        nn.init.normal_(weight)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) similarities, or distances, of embeddings and proxies."""
        validate.features("embeddings", embeddings)
        return self.measure(embeddings, self.proxies.to(embeddings.dtype))


class ProxyAnchorLoss(_ProxyLoss):
    r"""Proxy-Anchor (Kim et al., CVPR 2020): with samples :math:`X_c` of class c and :math:`C^+`
    classes that have some,

    .. math:: \frac{1}{C^+} \sum_c \log\Big(1 + \sum_{x \in X_c} e^{-\alpha (c_{xc} - m)}\Big)
              + \frac1C \sum_c \log\Big(1 + \sum_{x \notin X_c} e^{\alpha (c_{xc} + m)}\Big)

    See :class:`ClassLoss` for arguments; weights of a miner are added to the logits of rows, less
    1, as in the original.
    """

    parts = ("pos_loss", "neg_loss")
    default_reducer = DivisorReducer

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32,
        *,
        weight_init_func: Fill | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, weight_init_func, backend, options)
        validate.number("margin", margin)
        validate.number("alpha", alpha, above=0.0)
        self.margin, self.alpha = margin, alpha

    def fill(self, weight: Tensor) -> None:
        nn.init.kaiming_normal_(weight, mode="fan_out")

    def of_rows(
        self,
        embeddings: Tensor,
        weights: Tensor,
        labels: Tensor,
        found: tuple[Tensor, ...] | None,
    ) -> dict[str, Part]:
        if found is None and self.measure.cosine and self._divides():
            total = functional.fused_proxy_anchor_loss(
                embeddings,
                weights,
                labels,
                alpha=self.alpha,
                margin=self.margin,
                backend=self.backend,
            )
            return {"loss": Reduced(total)}
        offset = torch.zeros(1, device=embeddings.device)
        if found is not None:
            offset = indices.row_weights(found, len(embeddings), self.anchors_only) - 1.0
        identities = torch.arange(self.num_classes, device=embeddings.device)
        some = len(torch.unique(labels))
        parts: dict[str, Part] = {}
        for name, positive in (("pos_loss", True), ("neg_loss", False)):
            form = self.measure.policy(
                SoftHinges,
                alpha=self.alpha,
                beta=self.alpha,
                positive_base=self.measure.sign * self.margin,
                negative_base=-self.measure.sign * self.margin,
                of_positives=float(positive),
                of_negatives=float(not positive),
            )
            losses = functional.fused_pair_loss(
                form,
                weights,
                identities,
                memory=embeddings,
                memory_labels=labels,
                reduction="none",
                backend=self.backend,
                offset=offset,
            )
            parts[name] = Rows(losses, divisor=some if positive else self.num_classes)
        return parts

    def _divides(self) -> bool:
        """Whether the original's own reducers are those of the parts."""
        named = [self._reducer_of(name) for name in self.parts]
        known = kind_of(self.reducer) == MultipleReducers.__name__
        return known and all(kind_of(each) == DivisorReducer.__name__ for each in named)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"margin={self.margin}, alpha={self.alpha}, backend={self.backend!r}"
        )


class ProxyNCALoss(_ProxyLoss):
    r"""Proxy-NCA with all proxies in the denominator (Teh et al., ECCV 2020): the mean over rows of

    .. math:: s\, d_{iy} + \log \sum_j e^{-s\, d_{ij}}

    with squared distances of unit vectors, or minus cosines (``CosineSimilarity()``). See
    :class:`ClassLoss` for arguments.
    """

    allowed = "multiple"
    default_measure = SQUARED
    anchors_only = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        softmax_scale: float = 1,
        *,
        weight_init_func: Fill | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, weight_init_func, backend, options)
        validate.number("softmax_scale", softmax_scale, above=0.0)
        self.softmax_scale = softmax_scale

    def losses(self, embeddings: Tensor, weights: Tensor, labels: Tensor, reduction: str) -> Tensor:
        factor = self.measure.cosines_per_unit
        assert factor is not None
        return functional.fused_proxy_nca_loss(
            embeddings,
            weights,
            labels,
            # The function's logits are twice the scaled cosines.
            scale=self.softmax_scale * factor / 2.0,
            denominator="all",
            reduction=reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"softmax_scale={self.softmax_scale}, backend={self.backend!r}"
        )
