"""Losses between two towers with their learnable scale, as a logarithm, and bias."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import validate
from ..distributed.collectives import Group
from .pair import RegisteredGroupLoss


class _TowerLoss(RegisteredGroupLoss):
    """A loss of logits that are a learnable scale times cosines.

    The scale is kept as its logarithm, so that a step cannot make it negative. As in CLIP's code it
    is cut at ``max_scale`` before a batch in training mode, so that it can come back.
    """

    init_scale: float
    max_scale: float | None
    log_scale: nn.Parameter

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.init_scale, self.max_scale = given["scale"], given["max_scale"]
        validate.number("scale", self.init_scale, above=0.0)
        if self.max_scale is not None:
            validate.number("max_scale", self.max_scale, at_least=self.init_scale)
        validate.instance("learn_scale", given["learn_scale"], bool, "a bool")
        self.log_scale = nn.Parameter(torch.empty(()), requires_grad=given["learn_scale"])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.init_scale))

    def scale(self) -> Tensor:
        """() factor of the cosines."""
        if self.training and self.max_scale is not None and self.log_scale.requires_grad:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def _shown(self) -> dict[str, Any]:
        start = {"scale": self.init_scale, "learn_scale": self.log_scale.requires_grad}
        return {**start, "max_scale": self.max_scale, **super()._shown()}


class CLIPLoss(_TowerLoss):
    """CLIP with its learnable scale; see :func:`fused_clip_loss`.

    Args:
        scale: first value of s.
        learn_scale: whether s is learned.
        max_scale: largest s; None: there is none.
        reduction, backend, group, exchange: as the function's.

    Attributes:
        log_scale: () parameter, the logarithm of s.

    Shape:
        a (N, D), b (N, D) -> () float32.

    Raises:
        TypeError, ValueError: a wrong scale; from a call, as the function.
    """

    loss = "clip"

    def __init__(
        self,
        scale: float = 1.0 / 0.07,
        learn_scale: bool = True,
        max_scale: float | None = 100.0,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b, self.scale(), **self._keywords())


class SigLIPLoss(_TowerLoss):
    """SigLIP with its learnable scale and bias; see :func:`fused_siglip_loss`.

    Args:
        scale, bias: first values of s and of the bias.
        learn_scale, learn_bias: whether they are learned.
        max_scale: largest s; None: there is none.
        reduction, backend, group, exchange: as the function's.

    Attributes:
        log_scale: () parameter, the logarithm of s.
        bias: () parameter.

    Shape:
        a (N, D), b (N, D) -> () float32.

    Raises:
        TypeError, ValueError: a wrong scale or bias; from a call, as the function.
    """

    loss = "siglip"
    init_bias: float
    bias: nn.Parameter

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        learn_scale: bool = True,
        learn_bias: bool = True,
        max_scale: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        validate.number("bias", bias)
        validate.instance("learn_bias", learn_bias, bool, "a bool")
        self.init_bias = bias
        super().__init__(locals())
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn_bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "bias"):
            nn.init.constant_(self.bias, self.init_bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b, self.scale(), self.bias, **self._keywords())

    def _shown(self) -> dict[str, Any]:
        return {"bias": self.init_bias, "learn_bias": self.bias.requires_grad, **super()._shown()}


class InfoNCELoss(_TowerLoss):
    """InfoNCE of queries against keys; see :func:`fused_info_nce_loss`.

    Args:
        scale: s, or its first value.
        learn_scale: whether s is learned.
        max_scale: largest s; None: there is none.
        both: also the losses of keys against queries.
        reduction, backend, group, exchange: as the function's.

    Attributes:
        log_scale: () parameter, the logarithm of s.

    Shape:
        queries (N, D), keys (M, D) and optionally labels (N,), key_labels (M,) and the int
        batch_offset -> () float32.

    Raises:
        TypeError, ValueError: a wrong scale; from a call, as the function.
    """

    loss = "info_nce"

    def __init__(
        self,
        scale: float = 20.0,
        learn_scale: bool = False,
        max_scale: float | None = None,
        both: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())
        validate.instance("both", both, bool, "a bool")
        self.both = both

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        key_labels: Tensor | None = None,
        batch_offset: int | None = None,
    ) -> Tensor:
        arguments = (queries, keys, labels, key_labels, self.scale())
        options = {"both": self.both, "batch_offset": batch_offset}
        return self.function(*arguments, **options, **self._keywords())

    def _shown(self) -> dict[str, Any]:
        return {"both": self.both, **super()._shown()}
