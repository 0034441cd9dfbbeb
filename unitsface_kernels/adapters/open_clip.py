"""Losses of open_clip: its constructors, ``loss(image_features, text_features, ...)`` and numbers.

The package need not be installed. Features are divided by their norms, as open_clip's models do
before the loss. Across ranks the loss is that of one process with all batches, the same on every
rank; open_clip's is that of the own rows, whose mean it is, with ``local_loss``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import functional, validate
from ..distributed.collectives import Group, world_size

_Result = Tensor | dict[str, Tensor]


class _Ranks(nn.Module):
    """Arguments that both losses have.

    Args:
        rank, world_size: of this process in the default group.
        backend: "auto", "native", "triton" or "reference".
    """

    exchange = "auto"

    def __init__(self, rank: int, world_size: int, use_horovod: bool, backend: str) -> None:
        super().__init__()
        validate.integer("rank", rank)
        validate.positive_int("world_size", world_size)
        if use_horovod:
            raise ValueError(
                f"use_horovod must be False: ranks are torch.distributed's, got {use_horovod}"
            )
        self.rank = rank
        self.world_size = world_size
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        group: Group = None
        if self.world_size > 1:
            ranks = world_size()
            if ranks != self.world_size:
                raise ValueError(
                    f"world_size must be that of the default group, {ranks}, got {self.world_size}"
                )
            group = torch.distributed.group.WORLD
        return {"group": group, "exchange": self.exchange, "backend": self.backend}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, backend={self.backend!r}"


class ClipLoss(_Ranks):
    """CLIP; see :func:`fused_clip_loss`.

    Args:
        local_loss, gather_with_grad: with several ranks, which gradients there are. With
            ``gather_with_grad`` all, as of one process: nothing is gathered, and ``local_loss``
            changes nothing but the value, see the module. Without both, other ranks' features are
            constants of a loss that every rank has whole: gradients of features are one over the
            number of ranks of these. ``local_loss`` alone, which drops gradients, is refused.
        cache_labels: there are no labels.
        rank, world_size: of this process in the default group.
        use_horovod: False.

    Shape:
        image_features, text_features (N, D), logit_scale (): the factor of cosines. ``logit_bias``
        changes no cross-entropy, and has a gradient of zero. -> () float32, or a dictionary of it.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(rank, world_size, use_horovod, backend)
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "gather_with_grad must be True with local_loss, which otherwise drops gradients, "
                f"got {gather_with_grad}"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> _Result:
        towers = image_features, text_features
        if self.world_size > 1 and not self.gather_with_grad:
            towers = tuple(_Shared.apply(tower, self.world_size) for tower in towers)
        loss = functional.fused_clip_loss(*towers, logit_scale, **self._options())
        if isinstance(logit_bias, Tensor):
            # Data parallelism waits for the gradient of every parameter: zero, not none.
            loss = loss + (logit_bias.sum() * 0.0).to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Ranks):
    """SigLIP; see :func:`fused_siglip_loss`.

    Args:
        cache_labels: there are no labels.
        rank, world_size: of this process in the default group.
        dist_impl: transport of the other ranks' features: "gather", or another of open_clip's,
            which is a ring; None: whichever suits their size. Gradients are the same.
        bidir, use_horovod: of earlier versions; a ring here has one direction.

    Shape:
        image_features, text_features (N, D), logit_scale (), logit_bias (). -> () float32, or a
        dictionary of it.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        bidir: bool = True,
        use_horovod: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(rank, world_size, use_horovod, backend)
        if dist_impl is not None:
            validate.choice("dist_impl", dist_impl, ("bidir", "shift", "reduce", "gather"))
            self.exchange = "gather" if dist_impl == "gather" else "ring"
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl
        self.bidir = bidir

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> _Result:
        bias = 0.0 if logit_bias is None else logit_bias
        towers = image_features, text_features
        loss = functional.fused_siglip_loss(*towers, logit_scale, bias, **self._options())
        return {"contrastive_loss": loss} if output_dict else loss


class _Shared(Function):
    """Features whose gradient is one of ``ranks`` equal parts."""

    @staticmethod
    def forward(ctx, features: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return gradient / ctx.ranks, None
