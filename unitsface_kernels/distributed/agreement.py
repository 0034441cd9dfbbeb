"""Ranks agree on a call before any of them does its work.

Collectives that one rank does not take part in hang all others. So every rank first checks its own
arguments, then all exchange whether they can go on, with how many rows and with which arguments.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .. import validate
from ..compiling import never_compiled
from .collectives import Group, gather_numbers, gather_texts, host_device, maximum_over_ranks

Checked = TypeVar("Checked")


# Traced, it would leave out the checks that read values.
@never_compiled
def agree(
    check: Callable[[], tuple[Checked, int, dict[str, object]]], group: Group
) -> tuple[Checked, list[int]]:
    """The result of ``check`` on this rank, and the number of rows of every rank.

    Args:
        check: raises for a mistake of this rank; else returns anything, the number of rows, and
            what has to be the same on every rank.
        group: every rank of it calls this.

    Raises:
        Exception: what ``check`` raised, on the ranks where it did.
        ValueError: on all others, with the ranks at fault; on all ranks if they differ.
    """
    checked, count, shared, mistake = None, 0, "", None
    try:
        checked, count, same = check()
        shared = json.dumps({name: str(value) for name, value in same.items()})
    except Exception as error:
        mistake = error
    # 56 bits: positive as int64.
    digest = int.from_bytes(hashlib.blake2b(shared.encode(), digest_size=7).digest(), "little")
    headers = gather_numbers([count, mistake is None, digest], host_device(group), group).tolist()
    if not all(able for _, able, _ in headers):
        texts = gather_texts("" if mistake is None else str(mistake), group)
        if mistake is not None:
            raise mistake
        mistakes = [f"rank {k}: {texts[k]}" for k, (_, able, _) in enumerate(headers) if not able]
        raise ValueError("; ".join(mistakes))
    if len({digest for _, _, digest in headers}) > 1:
        # Rare, so the arguments themselves travel only now.
        _refuse_differences([json.loads(text) for text in gather_texts(shared, group)])
    assert checked is not None
    return checked, [count for count, _, _ in headers]


def _refuse_differences(arguments: list[dict[str, str]]) -> None:
    """Compares the arguments of every rank, by name."""
    # A rank may lack some, such as a number that others have as a tensor.
    for name in dict.fromkeys(name for of_rank in arguments for name in of_rank):
        values = [of_rank.get(name, "nothing") for of_rank in arguments]
        if len(set(values)) > 1:
            found = ", ".join(f"{value} on rank {k}" for k, value in enumerate(values))
            raise ValueError(f"{name} must be the same on every rank of the group, got {found}")


def checksum(tensor: Tensor) -> Tensor:
    """() int64 of a tensor's bits and of the rows they lie in, on its device and without waiting.

    Bits are added up in words of eight bytes, at the rate of memory, and rows have a weight each.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if tensor.numel() == 0:
        return total
    rows = tensor.detach().contiguous()
    rows = rows.reshape(rows.shape[0] if rows.dim() else 1, -1)
    if not rows.is_floating_point():
        rows = rows.to(torch.int64)
    # So many rows at once that they have whole words; the few that are left are widened.
    step = 8 // math.gcd(8, rows.shape[1] * rows.element_size())
    whole = rows.shape[0] // step * step
    rest = rows[whole:]
    if rest.is_floating_point():
        rest = rest.to(torch.float64)
    for part in (rows[:whole].reshape(-1, step * rows.shape[1]), rest):
        sums = part.view(torch.int64).sum(dim=1)
        place = torch.arange(sums.shape[0], device=sums.device)
        total = total + ((2 * place + 1) * sums).sum()
    return total


def checksums(tensors: dict[str, Tensor]) -> dict[str, object]:
    """What :func:`agree` compares of tensors that have to be the same on every rank; those of a
    device are left to :func:`same_on_device`.
    """
    return {
        f"the checksum of {name}": checksum(tensor).item()
        for name, tensor in tensors.items()
        if not tensor.is_cuda
    }


def same_on_device(tensors: dict[str, Tensor], group: Group) -> None:
    """Tensors of a CUDA device that have to be the same on every rank; the error is of a later
    call, as for ranges of labels.
    """
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()])
    largest, smallest = maximum_over_ranks(torch.stack([sums, ~sums]), group)
    for name, differs in zip(tensors, largest != ~smallest, strict=True):
        validate.report_later(differs, f"{name} must be the same on every rank of the group")
