"""Exchanges between the ranks of a process group; no-ops without an initialized group.

``group=None`` is the default group. Rows of ranks lie in rank order and may differ in number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup | None


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def own_rank(group: Group = None) -> int:
    """Rank within ``group``; 0 without one."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather_numbers(numbers: Sequence[int], device: torch.device, group: Group = None) -> Tensor:
    """(ranks, len(numbers)) int64 on the host; waits for ``device``, see :func:`host_device`."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    if world_size(group) == 1:
        return own[None].cpu()
    parts = own.new_empty(world_size(group) * len(numbers))
    _all_gather(parts, own, group).wait()
    return parts.view(-1, len(numbers)).cpu()


def start_gather_rows(
    tensor: Tensor, counts: Sequence[int], group: Group = None
) -> Callable[[], Tensor]:
    """Begins to gather every rank's rows; the result waits for them and returns (sum, ...).

    Args:
        tensor: (n, ...) rows of this rank; its gradient is not followed.
        counts: every rank's n.
    """
    if world_size(group) == 1:
        return lambda: tensor.detach()
    longest = max(counts)
    own = tensor.detach().contiguous()
    if own.shape[0] < longest:
        own = torch.cat([own, own.new_zeros((longest - own.shape[0], *own.shape[1:]))])
    parts = own.new_empty((len(counts) * longest, *own.shape[1:]))
    if not longest:
        return lambda: parts
    work = _all_gather(parts, own, group)

    def finish() -> Tensor:
        work.wait()
        if min(counts) == longest:
            return parts
        return torch.cat([block[:n] for block, n in zip(parts.split(longest), counts, strict=True)])

    return finish


def gather_rows(*tensors: Tensor, group: Group = None) -> tuple[Tensor, ...]:
    """Each rank's rows, concatenated in rank order; not differentiable.

    The tensors of a rank have the same number of rows, which may differ between ranks and be 0.
    """
    if world_size(group) == 1:
        return tensors
    counts = gather_numbers([tensors[0].shape[0]], host_device(group), group)[:, 0].tolist()
    pending = [start_gather_rows(tensor, counts, group) for tensor in tensors]
    return tuple(finish() for finish in pending)


def start_scatter_sums(
    tensor: Tensor, counts: Sequence[int], group: Group = None
) -> Callable[[], Tensor]:
    """Begins to add up all ranks' ``tensor``; the result returns the own rows of the sum.

    The counterpart of :func:`start_gather_rows`: it carries gradients back.

    Args:
        tensor: (sum of counts, ...); may be overwritten.
        counts: how many rows of it belong to every rank.
    """
    if world_size(group) == 1:
        return lambda: tensor
    longest, own = max(counts), counts[own_rank(group)]
    if not longest:
        return lambda: tensor
    padded = tensor.contiguous()
    if min(counts) < longest:
        padded = tensor.new_zeros((len(counts) * longest, *tensor.shape[1:]))
        for block, part in zip(padded.split(longest), tensor.split(list(counts)), strict=True):
            block[: part.shape[0]] = part
    result = tensor.new_empty((longest, *tensor.shape[1:]))
    # Newer releases have another name for it.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work = scatter(result, padded, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return result[:own]

    return finish


def sum_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """The sum of every rank's ``value``, the same on all of them; not differentiable."""
    if world_size(group) == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def maximum_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """The elementwise maximum of every rank's ``value``; not differentiable."""
    if world_size(group) == 1:
        return value
    highest = value.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    return highest


def mean_over_ranks(value: Tensor, group: Group = None) -> Tensor:
    """The mean of every rank's ``value``; not differentiable."""
    return sum_over_ranks(value, group) / world_size(group)


def _all_gather(parts: Tensor, own: Tensor, group: Group) -> dist.Work:
    # Newer releases have another name for it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(parts, own, group=group, async_op=True)


def start_pass_on(sent: Tensor, received: Tensor, group: Group = None) -> Callable[[], None]:
    """Begins to send ``sent`` to the next rank of a ring and to receive from the previous one.

    Nothing travels in place of an empty tensor; both sides have to know. Neither tensor may be
    written to, nor ``received`` be read, before the result has been called.
    """
    size, own = world_size(group), own_rank(group)
    operations = []
    for operation, tensor, peer in (
        (dist.isend, sent, (own + 1) % size),
        (dist.irecv, received, (own - 1) % size),
    ):
        if tensor.numel():
            place = peer if group is None else dist.get_global_rank(group, peer)
            operations.append(dist.P2POp(operation, tensor, place, group))
    pending = dist.batch_isend_irecv(operations) if operations else []

    def finish() -> None:
        for work in pending:
            work.wait()

    return finish


def ordered_sum(value: Tensor, group: Group = None) -> Tensor:
    """The sum of every rank's () ``value``, in rank order and in float64; not differentiable."""
    if world_size(group) == 1:
        return value
    parts = start_gather_rows(value.reshape(1), [1] * world_size(group), group)()
    return parts.sum(dtype=torch.float64).to(value.dtype)


def host_device(group: Group = None) -> torch.device:
    """Device on which host values are exchanged: the CPU if the group supports it."""
    if world_size(group) == 1 or "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    members = dist.group.WORLD if group is None else group
    bound = None if members is None else members.bound_device_id
    return bound or torch.device("cuda", torch.cuda.current_device())


TEXT_WORDS = 256


def gather_texts(text: str, group: Group = None) -> list[str]:
    """Every rank's text, cut off at some two thousand bytes."""
    data = text.encode()[: 8 * TEXT_WORDS]
    data = data.ljust(8 * TEXT_WORDS, b"\0")
    words = [int.from_bytes(data[k : k + 8], "little", signed=True) for k in range(0, len(data), 8)]
    gathered = gather_numbers(words, host_device(group), group).tolist()
    raw = (b"".join(w.to_bytes(8, "little", signed=True) for w in row) for row in gathered)
    return [row.rstrip(b"\0").decode(errors="replace") for row in raw]
