"""What ranks of a process group exchange; nothing happens without an initialised group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each rank's rows, concatenated in rank order; not differentiable.

    The tensors of a rank have the same number of rows, which may differ between ranks and be 0.
    """
    world = world_size()
    if world == 1:
        return tensors
    own = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
    counts = own.new_empty(world)
    dist.all_gather_into_tensor(counts, own)
    sizes = counts.tolist()
    longest = max(sizes)
    gathered = []
    for tensor in tensors:
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor.detach()
        parts = tensor.new_empty((world * longest, *tensor.shape[1:]))
        dist.all_gather_into_tensor(parts, padded)
        blocks = parts.split(longest) if longest else ()
        kept = [block[:size] for block, size in zip(blocks, sizes, strict=bool(longest))]
        gathered.append(torch.cat(kept) if kept else padded)
    return tuple(gathered)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's ``value``; not differentiable."""
    world = world_size()
    if world == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world
