"""The norm of gradients of which some are the same on every rank and some are in shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ... import validate
from ..collectives import sum_over_ranks
from .module import PartialFC


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, heads: Sequence[PartialFC] = ()
) -> Tensor:
    """Scales gradients so that their norm, taken over all ranks, is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_`` for one process that holds every class. For weights whose
    optimizer is fused at its step, the norm takes another pass over the gradient's tiles. Weights
    whose optimizer is fused into the backward pass are already updated and are left out.

    Args:
        parameters: those that are the same on every rank after data-parallel averaging, such as
            the backbone's; without the heads'.
        max_norm: > 0.
        heads: modules whose parameters are included. All ranks pass the same ones.

    Returns:
        () float32 norm before clipping, the same on every rank.

    Raises:
        TypeError, ValueError: max_norm is not a number > 0.
    """
    validate.number("max_norm", max_norm, above=0.0)
    same = [p.grad for p in parameters if p.grad is not None]
    total = torch.zeros((), device=_device(same, heads))
    for head in heads:
        own, shared = head.gradients()
        squares = [_values(g).float().square().sum() for g in own]
        fusion = head.fusion
        if fusion is not None and fusion.when == "step":
            squares.append(fusion.squared_norm())
        part = torch.stack(squares).sum() if squares else total.new_zeros(())
        total = total + sum_over_ranks(part, head.group)
        same += shared
    for gradient in same:
        total = total + _values(gradient).float().square().sum()
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for head in heads:
        same += head.gradients()[0]
        if head.fusion is not None and head.fusion.parameter.grad is not None:
            same.append(head.fusion.parameter.grad)
    for gradient in same:
        _values(gradient).mul_(factor)
    return norm


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _device(gradients: list[Tensor], heads: Sequence[PartialFC]) -> torch.device | None:
    if gradients:
        return gradients[0].device
    return next(heads[0].parameters()).device if heads else None
