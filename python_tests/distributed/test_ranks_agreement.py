"""Disagreement between ranks, or a mistake on one of them, is an error on every rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.ranks import run_ranks
from torch import Tensor
from torch import distributed as dist

import unitsface_kernels as uk
from unitsface_kernels import validate
from unitsface_kernels.distributed.agreement import agree, checksum, same_on_device

D = 11


def _message(error: type, call, *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    assert raised.type is error
    return str(raised.value)


def _mistakes(rank: int) -> None:
    world = dist.group.WORLD
    right = {"feats": torch.ones(4, D), "labels": torch.arange(4), "b": torch.zeros(4)}

    def call(**changes: Any) -> Tensor:
        return uk.fused_pair_bce_loss(**{**right, "group": world, **changes})

    want = call()
    of_one = [
        ({"labels": torch.tensor([0, 1, 2, 4])}, ValueError, "labels must be in [-1, 4)"),
        ({"feats": torch.ones(D)}, ValueError, "feats must have shape"),
        ({"feats": None}, TypeError, "feats must be a torch.Tensor"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must have an integer dtype"),
        ({"b": torch.zeros(2, 2)}, ValueError, "b must have shape (K,)"),
        ({"scale": -1.0}, ValueError, "scale must be > 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"exchange": "mail"}, ValueError, "exchange must be one of auto, gather, ring"),
        ({"memory": torch.ones(2, D)}, ValueError, "memory_labels must be given"),
    ]
    for changes, error, text in of_one:
        if rank == 1:
            message = _message(error, call, **changes)
            assert message.startswith(text), message
        else:
            assert _message(ValueError, call).startswith(f"rank 1: {text}")
    differing = [
        ("D", {"feats": torch.ones(4, D + rank)}, f"{D} on rank 0, {D + 1} on rank 1"),
        ("margin", {"margin": 0.5 * rank}, "0.0 on rank 0, 0.5 on rank 1, 1.0 on rank 2"),
        ("b", {"b": torch.zeros(4 + rank)}, "(4,) on rank 0, torch.float32 of shape (5,) on"),
        ("the dtype of feats", {"feats": torch.ones(4, D).to(_DTYPES[rank])}, "bfloat16 on rank"),
        ("whether feats, memory and b need a gradient", _NEEDING[rank], "on rank 0, (True, False"),
    ]
    memory = torch.arange(5.0 * D).reshape(5, D)
    columns = {"memory": memory, "memory_labels": torch.arange(5) % 4}
    alike = call(**columns)
    last = memory.clone()
    last[4, D - 1] += rank
    for name, changes in (
        ("memory", {"memory": last}),
        ("memory", {"memory": memory if rank else memory.flip(0)}),
        ("memory_labels", {"memory_labels": torch.arange(5) % (4 - rank)}),
        ("b", {"b": torch.full((4,), float(rank))}),
    ):
        changes = {**columns, **changes}
        differing.append((f"the checksum of {name}", changes, "on rank 0"))
    for name, changes, text in differing:
        message = _message(ValueError, call, **changes)
        assert message.startswith(f"{name} must be the same on every rank"), message
        assert text in message, message
    if rank != 1:
        with pytest.raises(ValueError, match=r"rank 1: feats must have D = 3 columns"):
            uk.FeatureMemory(4, 3).update(torch.ones(2, 3), torch.arange(2))
    else:
        memory = uk.FeatureMemory(4, 3)
        with pytest.raises(ValueError, match=r"^feats must have D = 3 columns"):
            memory.update(torch.ones(2, 4), torch.arange(2))
    # The ranks' messages still match.
    assert torch.equal(call(), want)
    wide = torch.cat([columns["memory"]] * 2, dim=1)[:, :D]
    same = {"memory": wide, "memory_labels": columns["memory_labels"].to(_LABELS[rank])}
    assert torch.equal(call(**same), alike)


_DTYPES = (torch.float32, torch.bfloat16, torch.float32)
_LABELS = (torch.int64, torch.int32, torch.int8)
_NEEDING = ({}, {"feats": torch.ones(4, D, requires_grad=True)}, {})


def test_mistakes_of_one_rank_are_errors_on_all() -> None:
    run_ranks(3, _mistakes)


def _lacking(rank: int) -> None:
    """As on devices, where a number that is a tensor is compared later."""
    same: dict[str, object] = {"scale": 9.0} if rank else {}
    text = _message(ValueError, agree, lambda: (True, 1, same), dist.group.WORLD)
    assert text.endswith("got nothing on rank 0, 9.0 on rank 1"), text


def test_what_the_first_rank_lacks_is_a_difference() -> None:
    run_ranks(2, _lacking)


def _verdicts(rank: int) -> list[tuple[bool, str]]:
    """As on a CUDA device, where a later call raises."""
    found = []
    with mock.patch.object(validate, "report_later", lambda *given: found.append(given)):
        held = {"memory": torch.ones(3, D) * rank, "b": torch.ones(3)}
        same_on_device(held, dist.group.WORLD)
    return [(bool(bad), message) for bad, message in found]


def test_memories_on_devices_are_compared_there() -> None:
    for of_rank in run_ranks(2, _verdicts):
        (memory, text), (threshold, _) = of_rank
        assert (memory, threshold) == (True, False)
        assert text == "memory must be the same on every rank of the group"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3), (1, 7), (9, 7), (9, 16)])
def test_checksums_are_of_all_bits_and_places(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape).mul(50.0).to(dtype)
    of_values = checksum(values)
    assert torch.equal(checksum(values.clone()), of_values)
    strided = torch.stack([values, values], dim=-1)[..., 0]
    assert torch.equal(checksum(strided), of_values)
    for place in range(values.numel()):
        other = values.clone()
        other.view(-1)[place] += 1
        assert not torch.equal(checksum(other), of_values)
    if len(shape) == 2 and shape[0] > 1:
        assert not torch.equal(checksum(values.roll(1, 0)), of_values)


def test_exchange_is_checked_without_a_group() -> None:
    with pytest.raises(ValueError, match="exchange must be one of"):
        uk.fused_uss_loss(torch.ones(2, 3), torch.arange(2), 0.0, exchange="mail")
