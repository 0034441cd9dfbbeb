"""A run that starts from the backbone and the class weights of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import checkpoint
from train.errors import UserError
from train.foreign_heads import read_class_weights
from train.trainer import Trainer

_WEIGHTS = ("class_loss.weight", "class_loss.head.weight", "loss.weight", "loss.head.weight")


@torch.no_grad()
def start_from(trainer: Trainer, file: Path) -> str:
    """Load what ``train.init`` names; every process calls. A line on what was found.

    Raises:
        UserError: another backbone, or other classes than those of ``data.path``.
    """
    path, values = checkpoint.read_any(file)
    config = trainer.config
    checkpoint.load_backbone(trainer.backbone, values, path=path, config=config, averaged=True)
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(trainer.backbone.state_dict())
    weights = read_class_weights(values, path)
    if weights is None:
        raise UserError(
            f"train.init: {path} holds no class weights of another program; model.weights={path} "
            "starts from its backbone alone"
        )
    names = trainer.source.images.identities
    losses: nn.Module = trainer.loss if trainer.head is None else trainer.head
    own = next((p for name, p in losses.named_parameters() if name in _WEIGHTS), None)
    if own is None or own.dim() != 2:
        raise UserError(f"train.init: loss.class={config.loss.class_name} has no weight per class")
    if weights.shape != (len(names), own.shape[1]):
        raise UserError(
            f"train.init: {path} holds {len(weights)} classes of {weights.shape[1]} numbers; "
            f"data.path has {len(names)} identities to train on (without those of data.holdout), "
            f"and model.embedding_size is {own.shape[1]}"
        )
    order = "data.path"
    if trainer.source.images.named and _sorted_as_text(values):
        order = "their names as text"
        places = sorted(range(len(names)), key=lambda i: names[i])
        weights[torch.tensor(places)] = weights.clone()
    shard = slice(0, len(names))
    if trainer.head is not None:
        shard = slice(trainer.head.shard.start, trainer.head.shard.stop)
    own.copy_(weights[shard])
    return (
        f"starting from {path}: {config.model.name} and {len(names)} classes in the order of "
        f"{order}; optimizer and learning rate begin anew"
    )


def _sorted_as_text(values: dict[str, Any]) -> bool:
    """Whether AdaFace has read a folder, whose names torchvision sorts: 1, 10, 2."""
    settings = values.get("hyper_parameters")
    return isinstance(settings, dict) and settings.get("use_mxrecord") is False
