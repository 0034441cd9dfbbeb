"""Cross-batch memory with lists of pairs: from a miner, given, and for losses of the original."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.compiled import without_compiler
from support.listed_pairs import LOSSES, Lists, ntxent, similarities
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels.adapters import metric_learning as ours


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    with without_compiler():
        yield


def _easiest_miner(rows: Tensor, labels: Tensor, columns: Tensor, of_columns: Tensor) -> Lists:
    """Positives of cosines below 0.5 and negatives of cosines above -0.2."""
    cosines = F.normalize(rows) @ F.normalize(columns).T
    same = labels[:, None] == of_columns
    return *torch.where(same & (cosines < 0.5)), *torch.where(~same & (cosines > -0.2))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "enqueue_mask"])
def test_memory_with_a_miner(name: str, masked: bool) -> None:
    make, distance, formula = LOSSES[name]
    given = {} if distance is None else {"distance": distance}
    memory = ours.CrossBatchMemory(make(**given), 8, 16, miner=_easiest_miner)
    for _ in range(5):
        rows, labels = torch.randn(10, 8), torch.arange(10) % 3
        mask = torch.arange(10) < 5
        loss = memory(rows, labels, **({"enqueue_mask": mask} if masked else {}))
        compared, of_compared = (rows[5:], labels[5:]) if masked else (rows, labels)
        held = slice(None) if memory.has_been_filled else slice(0, memory.queue_idx)
        columns, of_columns = memory.embedding_memory[held], memory.label_memory[held]
        lists = _easiest_miner(compared, of_compared, columns, of_columns)
        # The copy of a row has a cosine of 1 and is mined by none.
        want = formula(similarities(compared.double(), columns.double(), distance), lists)
        check_same("loss", loss, want, SAME_LOSS)


def test_memory_with_given_pairs_adds_them() -> None:
    """To all pairs with the memory, the own copies left out, as triplets or pairs."""
    memory = ours.CrossBatchMemory(ours.NTXentLoss(0.5), 8, 8)
    rows, labels = torch.randn(6, 8), torch.arange(6) % 3
    more = torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([1, 2])
    for _ in range(3):
        got = memory(rows, labels, more)
        held = slice(None) if memory.has_been_filled else slice(0, memory.queue_idx)
        columns, of_columns = memory.embedding_memory[held], memory.label_memory[held]
        same = labels[:, None] == of_columns
        kept = same.clone()
        kept[torch.arange(6), memory.curr_batch_idx] = False
        lists = (*torch.where(kept), *torch.where(~same))
        joined = zip(lists, (more[0], more[1], more[0], more[2]), strict=True)
        want = ntxent(
            similarities(rows.double(), columns.double(), None),
            tuple(torch.cat(pair) for pair in joined),
        )
        check_same("loss", got, want, SAME_LOSS)
    with pytest.raises(ValueError, match="indices_tuple must be None with an enqueue_mask"):
        memory(rows, labels, more, torch.ones(6, dtype=torch.bool))


def test_a_miner_of_triplets_leaves_out_own_copies() -> None:
    def miner(rows: Tensor, labels: Tensor, columns: Tensor, of_columns: Tensor) -> Lists:
        same = labels[:, None] == of_columns
        return torch.where(same[:, :, None] & ~same[:, None])

    memory = ours.CrossBatchMemory(ours.NTXentLoss(0.5), 8, 8, miner=miner)
    rows, labels = torch.randn(6, 8), torch.arange(6) % 3
    for _ in range(2):
        got = memory(rows, labels)
        held = slice(None) if memory.has_been_filled else slice(0, memory.queue_idx)
        anchors, positives, negatives = miner(
            rows, labels, memory.embedding_memory[held], memory.label_memory[held]
        )
        kept = memory.curr_batch_idx[anchors] != positives
        a, p, n = (each[kept] for each in (anchors, positives, negatives))
        t = similarities(rows.double(), memory.embedding_memory.double(), None)
        check_same("loss", got, ntxent(t, (a, p, a, n)), SAME_LOSS)


def test_memory_takes_other_losses_by_their_lists() -> None:
    """Losses of the original by name."""
    seen = SimpleNamespace()

    class TripletMarginLoss(torch.nn.Module):
        def forward(self, *given: object) -> Tensor:
            seen.given = given
            return torch.zeros(())

    memory = ours.CrossBatchMemory(TripletMarginLoss(), 8, 8)
    rows, labels = torch.randn(4, 8), torch.tensor([0, 1, 0, 2])
    memory(rows, labels)
    a, p, b, n = seen.given[2]
    assert sorted(zip(a.tolist(), p.tolist(), strict=True)) == [(0, 2), (2, 0)]
    assert len(b) == 10
    assert bool((labels[b] != labels[n]).all())
    assert torch.equal(seen.given[3], rows)
    assert torch.equal(seen.given[4], labels)
