"""Backbones by name: (N, 3, S, S) images in [-1, 1] to (N, D) float32 features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from train.backbones.conv4 import Conv4
from train.backbones.ghost import GhostFaceNet
from train.backbones.mobile import MobileFaceNet
from train.backbones.resnets import IResNet, IRNet, LResNet
from train.backbones.timm_models import PREFIX, TimmBackbone
from train.errors import UserError

__all__ = [
    "STAGES",
    "Conv4",
    "GhostFaceNet",
    "IRNet",
    "IResNet",
    "LResNet",
    "MobileFaceNet",
    "TimmBackbone",
    "backbone_names",
    "build_backbone",
    "check_backbone",
]

STAGES = IResNet.STAGES
# All but timm's models, by name: of an input size, dropout and an embedding size.
_BUILDERS: dict[str, Callable[[int, float, int], nn.Module]] = {
    **{
        name: partial(family, stages)
        for family in (IResNet, IRNet, LResNet, MobileFaceNet)
        for name, stages in family.STAGES.items()
    },
    "ghostfacenet": GhostFaceNet,
    "conv4": Conv4,
}


def backbone_names() -> list[str]:
    """All but timm's."""
    return list(_BUILDERS)


def check_backbone(name: str, options: dict[str, Any]) -> None:
    """Check ``model.name`` and ``model.options`` as far as possible without building anything."""
    if name.startswith(PREFIX) and name != PREFIX:
        return
    if name not in _BUILDERS:
        names = ", ".join(backbone_names())
        raise UserError(f"model.name: expected one of {names}, {PREFIX}MODEL; got '{name}'")
    if options:
        raise UserError(f"model.options: {name} takes none, only {PREFIX}MODEL does")


def build_backbone(
    name: str,
    input_size: int = 112,
    dropout: float = 0.0,
    embedding_size: int = 512,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A randomly initialized backbone; ``name`` and ``options`` as :func:`check_backbone` has it.

    Raises:
        UserError: a model of timm that cannot be built or does not take such images.
    """
    if name.startswith(PREFIX):
        return TimmBackbone(name, input_size, dropout, embedding_size, options or {})
    return _BUILDERS[name](input_size, dropout, embedding_size)
