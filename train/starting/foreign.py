"""``train.init``: a run that starts from backbone and class weights of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from train import checkpoint
from train.errors import UserError
from train.starting.finetuning import WEIGHT, loss_tensors
from train.starting.foreign_classes import read_class_weights
from train.trainer import Trainer


@torch.no_grad()
def start_from(trainer: Trainer, file: Path) -> str:
    """Load what ``train.init`` names; every process calls. A line on what was found.

    Raises:
        UserError: another backbone, or other classes than those of ``data.path``.
    """
    path, values = checkpoint.read_any(file)
    config = trainer.config
    trainer.load_backbone(values, path)
    weights = read_class_weights(values, path)
    if weights is None:
        raise UserError(
            f"{path} holds no class weights of another program; model.weights={path} "
            "starts from its backbone alone"
        )
    names = trainer.source.images.identities
    own = loss_tensors(trainer).get(WEIGHT)
    if own is None or own.dim() != 2:
        given = "no weights of classes" if own is None else f"class weights {tuple(own.shape)}"
        raise UserError(
            f"loss.class: expected a loss with one weight vector per class, (C, D); "
            f"{config.loss.class_name} has {given}"
        )
    if weights.shape != (len(names), own.shape[1]):
        raise UserError(
            f"{path} holds {len(weights)} classes of {weights.shape[1]} numbers; "
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
