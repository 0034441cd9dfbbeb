"""Optimizer and gradient scaler, with or without classes in shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import unitsface_kernels as uk
from train.config import Config
from train.distributed import DistributedEnv
from train.errors import reported


def build_optimizer(
    config: Config, backbone: nn.Module, loss: nn.Module, head: uk.PartialFC | None = None
) -> torch.optim.Optimizer:
    """SGD or AdamW.

    Thresholds (parameters of the losses without a feature axis: one, or one per identity, whatever
    its name) have no weight decay: they are positions on the cosine axis, and
    nothing draws them to zero. All else decays, norms and biases of a ViT's too, as it does where
    insightface trains ViTs.
    """
    train = config.train
    learned = [p for p in loss.parameters() if p.requires_grad]
    learned += [] if head is None else list(head.parameters())
    weights = [p for p in backbone.parameters() if p.requires_grad]
    weights += [p for p in learned if p.dim() >= 2]
    thresholds = [p for p in learned if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": weights, "lr_scale": 1.0}]
    if thresholds:
        groups.append({"params": thresholds, "lr_scale": train.threshold_lr, "weight_decay": 0.0})
    given: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    optimizer: torch.optim.Optimizer
    if train.optimizer == "adamw":
        adamw = torch.optim.AdamW if head is None else uk.SampledAdamW
        optimizer = adamw(groups, betas=(train.momentum, 0.999), **given)
    else:
        sgd = torch.optim.SGD if head is None else uk.SampledSGD
        optimizer = sgd(groups, momentum=train.momentum, **given)
    fused = config.partial_fc.fused_optimizer
    if head is not None and fused != "none":
        with reported(f"partial_fc.fused_optimizer={fused}", ValueError):
            head.fuse(optimizer, fused)
    return optimizer


def build_scaler(config: Config, world: DistributedEnv) -> torch.amp.GradScaler:
    """The gradient scaler; with several processes all skip a step, or none does."""
    enabled, kind = config.train.amp == "fp16", world.device.type
    if world.size == 1:
        return torch.amp.GradScaler(kind, enabled=enabled)
    return ShardedGradScaler(kind, enabled=enabled, process_group=world.group)
