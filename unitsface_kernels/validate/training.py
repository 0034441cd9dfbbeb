"""Ranks, shards and optimizers."""

from __future__ import annotations

import torch
from torch import Tensor


def no_rank_failed(mistakes: dict[int, str]) -> None:
    if mistakes:
        raise ValueError("; ".join(f"rank {k}: {text}" for k, text in mistakes.items()))


def same_on_ranks(arguments: list[dict[str, str]]) -> None:
    """Arguments by name, of every rank, that have to be the same."""
    for name in arguments[0]:
        values = [of_rank.get(name, "nothing") for of_rank in arguments]
        if len(set(values)) > 1:
            found = ", ".join(f"{value} on rank {k}" for k, value in enumerate(values))
            raise ValueError(f"{name} must be the same on every rank of the group, got {found}")


def process_group(name: str, value: object) -> None:
    """A group that this process is a member of, or None."""
    distributed = torch.distributed
    if value is None:
        return
    if not isinstance(value, distributed.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup of which this process is a member, "
            f"or None, got {type(value).__name__}"
        )


def shardable(name: str, usable: bool, given: str, known: list[str]) -> None:
    if not usable:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")


def fused_backend(backend: str, why: str | None = None) -> None:
    """``why``: what keeps "auto" from another one than the reference."""
    if backend == "reference":
        raise ValueError(
            "backend must be 'native' or 'triton' for sharded classes, got 'reference', which "
            f"knows no shards{'' if why is None else f' ({why})'}"
        )


def same_shard(saved: dict[str, object], own: dict[str, object]) -> None:
    """A saved shard against the one that is to take it."""
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the saved shard has {name} = {saved.get(name)}, this one has {value}; "
                "unitsface_kernels.partial_fc.load_checkpoint loads checkpoints on another "
                "number of ranks"
            )


def no_pending_step(pending: bool) -> None:
    if pending:
        raise RuntimeError(
            "a fused optimizer takes one backward pass per step: call optimizer.step() and "
            "zero_grad() between them, or train without PartialFC.fuse to accumulate gradients"
        )


def owned(group: dict[str, object] | None) -> dict[str, object]:
    if group is None:
        raise ValueError("parameter must be one of the optimizer's parameters, got another")
    return group


def row_options(group: dict[str, object], refused: tuple[str, ...]) -> None:
    """Options of a parameter group that steps on single rows cannot have."""
    for name in refused:
        if group.get(name):
            raise ValueError(
                f"{name} must be {'0' if name == 'dampening' else 'False'} for a parameter that "
                f"is updated by rows, got {group[name]}"
            )


def fused_marker(gradient: Tensor) -> None:
    if not gradient.is_sparse or gradient.sparse_dim() != 2 or gradient._values().numel() > 1:
        raise ValueError(
            "the gradient of a fused parameter must come from one backward pass of its loss "
            f"alone, got one of shape {tuple(gradient.shape)} and layout {gradient.layout}"
            " from elsewhere or added up"
        )
