"""Training by several ranks, whose losses compare the batches of all, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import IDENTITIES, identities, normal, own_rows, run_ranks
from support.tolerances import TRAINED, TRAINED_LOSS, check_same, relative_norm
from torch import Tensor
from torch import distributed as dist

import unitsface_kernels as uk

D, WIDTH, STEPS = 11, 8, 20


class _Model(torch.nn.Module):
    """A layer and its loss in one module, as data parallelism requires."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(D, WIDTH)
        self.loss = uk.USSLoss(scale=16.0, group=group)

    def forward(self, x: Tensor, labels: Tensor, *memory: Tensor) -> tuple[Tensor, Tensor]:
        feats = self.layer(x)
        return self.loss(feats, labels, *memory), feats


def _counts_of_step(step: int, size: int) -> list[int]:
    return [(3 * step + 5 * rank) % 9 for rank in range(size)]


def _trained(rank: int, size: int, with_memory: bool) -> dict[str, Any]:
    """Twenty steps on the share of ``rank``; size 0: alone, on the batches of ``rank`` ranks."""
    torch.manual_seed(0)
    single = size == 0
    model = _Model(None if single else dist.group.WORLD)
    wrapped = model if single else torch.nn.parallel.DistributedDataParallel(model)
    memory = uk.FeatureMemory(IDENTITIES, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    losses = []
    for step in range(STEPS):
        counts = _counts_of_step(step, rank if single else size)
        own = slice(None) if single else own_rows(counts, rank)
        x, labels = normal(sum(counts), D, seed=step), identities(sum(counts), seed=100 + step)
        # Copies: the backward pass follows the update.
        columns = (memory.features.clone(), memory.labels.clone()) if with_memory else ()
        optimizer.zero_grad()
        loss, feats = wrapped(x[own], labels[own], *columns)
        memory.update(feats, labels[own])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = {**model.state_dict(), "remembered": memory.features, "seen": memory.labels}
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return {"losses": torch.stack(losses), "state": state, "momenta": momenta}


@pytest.mark.parametrize(
    "size", [1, 3, *(pytest.param(k, marks=pytest.mark.extended) for k in (2, 4))]
)
@pytest.mark.parametrize("with_memory", [False, True], ids=["batch", "memory"])
def test_training_is_that_of_one_process(size: int, with_memory: bool) -> None:
    """Batches of unequal sizes, some of them empty."""
    found = run_ranks(size, _trained, size, with_memory)
    want = _trained(size, 0, with_memory)
    torch.manual_seed(0)
    assert relative_norm(_Model(None).layer.weight.detach(), want["state"]["layer.weight"]) > 0.1
    for of_rank in found:
        check_same("losses", of_rank["losses"], want["losses"], TRAINED_LOSS)
        for name, tensor in want["state"].items():
            check_same(name, of_rank["state"][name].float(), tensor.float(), TRAINED)
            assert torch.equal(of_rank["state"][name], found[0]["state"][name]), name
        for k, (got, tensor) in enumerate(zip(of_rank["momenta"], want["momenta"], strict=True)):
            check_same(f"momentum {k}", got, tensor, TRAINED)
