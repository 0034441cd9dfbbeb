"""Losses of listed pairs, as miners return them, against formulas written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.adapted import ALL, LOSSES, Formula, Lists, ntxent, similarities
from support.compiled import without_compiler
from support.helpers import DEVICES
from support.largest import Largest
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels.adapters import metric_learning as ours
from unitsface_kernels.adapters.metric_learning import indices

each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    with without_compiler():
        yield


def _some_pairs(rows: int, columns: int, seed: int) -> Lists:
    """Random pairs without labels: some twice, none of both kinds, and row 0 in none."""
    generator = torch.Generator().manual_seed(seed)
    keys = columns + torch.randperm((rows - 1) * columns, generator=generator)
    own, other = keys[: len(keys) // 5], keys[len(keys) // 5 : len(keys) // 2]
    own, other = torch.cat([own, own[:3]]), torch.cat([other, other[:4]])
    return own // columns, own % columns, other // columns, other % columns


def _check(
    make: Callable[..., torch.nn.Module],
    distance: object | None,
    formula: Formula,
    tensors: list[Tensor],
    lists: Lists,
    call: Callable[..., Tensor],
    **options,
) -> None:
    """Loss and gradients of ``call(loss, *tensors)``."""
    given = {} if distance is None else {"distance": distance}
    leaves = [t.clone().requires_grad_() for t in tensors]
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    loss = call(make(**given, **options), *leaves)
    want = formula(similarities(exact[0], exact[-1], distance), lists)
    check_same("loss", loss.detach().cpu(), want.detach(), SAME_LOSS)
    want_gradients = torch.autograd.grad(want, exact)
    for got, expected in zip(torch.autograd.grad(loss, leaves), want_gradients, strict=True):
        check_same("gradient", got.cpu(), expected, SAME_GRADIENT)


@each_device
@pytest.mark.parametrize("name", ALL)
def test_listed_pairs(name: str, device: str) -> None:
    make, distance, formula = ALL[name]
    tensors = [torch.randn(11, 8, device=device), torch.randn(9, 8, device=device)]
    lists = _some_pairs(11, 9, seed=3)

    def call(loss: torch.nn.Module, rows: Tensor, columns: Tensor) -> Tensor:
        return loss(rows, indices_tuple=lists, ref_emb=columns)

    _check(make, distance, formula, tensors, lists, call)


@each_device
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("within", [True, False], ids=["batch", "reference"])
def test_triplets_are_pairs(name: str, device: str, within: bool) -> None:
    make, distance, formula = LOSSES[name]
    tensors = [torch.randn(7, 8, device=device)]
    if not within:
        tensors.append(torch.randn(7, 8, device=device))
    anchors, positives = torch.tensor([0, 0, 2, 5, 5]), torch.tensor([1, 1, 3, 6, 6])
    negatives = torch.tensor([4, 5, 4, 1, 2])

    def call(loss: torch.nn.Module, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        return loss(rows, indices_tuple=(anchors, positives, negatives), ref_emb=columns)

    _check(make, distance, formula, tensors, (anchors, positives, anchors, negatives), call)


@pytest.mark.parametrize("name", ALL)
def test_a_list_of_all_pairs_is_no_list(name: str) -> None:
    """Fused and listed, within a batch and against others."""
    make, distance, _ = ALL[name]
    given = {} if distance is None else {"distance": distance}
    labels = torch.arange(30) % 7
    for columns in (None, torch.randn(40, 8)):
        of_columns = None if columns is None else torch.arange(40) % 9
        leaves = [torch.randn(30, 8).requires_grad_() for _ in range(2)]
        leaves[1].data.copy_(leaves[0].data)
        lists = indices.all_pairs(labels, of_columns)
        loss = make(**given)
        fused = loss(leaves[0], labels, None, columns, of_columns)
        listed = loss(leaves[1], labels, lists, columns, of_columns)
        check_same("loss", listed.detach(), fused.detach(), SAME_LOSS)
        (want,) = torch.autograd.grad(fused, leaves[0])
        (got,) = torch.autograd.grad(listed, leaves[1])
        check_same("gradient", got, want, SAME_GRADIENT)


def test_tiles_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitsface_kernels.adapters.metric_learning.listed._TILE", 20)
    test_listed_pairs("multi_similarity", "cpu")
    test_listed_pairs("ntxent", "cpu")


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_takes_the_memory_of_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: neither N x M numbers nor D of them for every listed pair."""
    monkeypatch.setattr("unitsface_kernels.adapters.metric_learning.listed._TILE", 3000)
    make, distance, _ = LOSSES[name]
    given = {} if distance is None else {"distance": distance}
    rows, columns = torch.randn(200, 4, requires_grad=True), torch.randn(300, 4)
    lists = tuple(torch.randint(0, 200, (2500,)) for _ in range(4))
    loss = make(**given)
    with Largest() as largest:
        loss(rows, indices_tuple=lists, ref_emb=columns).backward()
    assert largest.numel == 3000


@pytest.mark.parametrize("name", ["ntxent", "multi_similarity"])
def test_a_list_is_differentiable_twice_on_the_reference(name: str) -> None:
    make, distance, _ = LOSSES[name]
    given = {} if distance is None else {"distance": distance}
    lists = _some_pairs(4, 4, seed=1)
    loss = make(backend="reference", **given)
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda e: loss(e, indices_tuple=lists), rows)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("few", [True, False], ids=["one_of_each", "none"])
def test_without_pairs_there_is_no_loss(name: str, few: bool) -> None:
    make, distance, _ = LOSSES[name]
    given = {} if distance is None else {"distance": distance}
    one = torch.tensor([0]) if few else torch.tensor([])
    rows = torch.randn(5, 4, requires_grad=True)
    loss = make(**given)(rows, indices_tuple=(one, one, one, one))
    loss.backward()
    assert float(loss) == 0.0
    assert not bool(rows.grad.any())


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        (([0], [1], [2]), TypeError, r"indices_tuple\[0\] must be a torch.Tensor"),
        ("abc", ValueError, "indices_tuple must be .*, got str"),
        ((torch.tensor([0]),) * 2, ValueError, "got 2 of them"),
        ((torch.tensor([0.5]),) * 3, TypeError, r"indices_tuple\[0\] must have an integer dtype"),
        ((torch.tensor([[0]]),) * 3, ValueError, r"must have shape \(1,\), got \(1, 1\)"),
        (
            (torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([1, 2])),
            ValueError,
            r"indices_tuple\[1\] must have shape \(2,\), got \(1,\)",
        ),
        (
            (torch.tensor([0]), torch.tensor([6]), torch.tensor([1])),
            ValueError,
            r"indices_tuple\[1\] must be in \[0, 6\), got 6",
        ),
        (
            (torch.tensor([-1]), torch.tensor([2]), torch.tensor([1])),
            ValueError,
            r"indices_tuple\[0\] must be in \[0, 6\), got -1",
        ),
    ],
)
@pytest.mark.parametrize("loss", [ours.NTXentLoss(), ours.CosFaceLoss(3, 8)])
def test_lists_that_are_none(
    loss: torch.nn.Module, lists: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss(torch.randn(6, 8), torch.arange(6) % 3, lists)


# --- weights of rows -----------------------------------------------------------------------------


def _counted(lists: Lists, rows: int) -> Tensor:
    counts = torch.tensor([sum(int((each == i).sum()) for each in lists) for i in range(rows)])
    return counts.double() / counts.max() if bool(counts.any()) else torch.ones(rows).double()


CLASS_LOSSES = {
    "CosFaceLoss": ours.CosFaceLoss,
    "ArcFaceLoss": ours.ArcFaceLoss,
    "SubCenterArcFaceLoss": ours.SubCenterArcFaceLoss,
    "SphereFaceLoss": ours.SphereFaceLoss,
    "LargeMarginSoftmaxLoss": ours.LargeMarginSoftmaxLoss,
    "NormalizedSoftmaxLoss": ours.NormalizedSoftmaxLoss,
    "ProxyNCALoss": ours.ProxyNCALoss,
}


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("count", [3, 4])
def test_miners_weigh_the_rows_of_class_losses(name: str, count: int) -> None:
    loss = CLASS_LOSSES[name](5, 8)
    rows, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    lists = tuple(torch.tensor(each) for each in ([0, 0, 2], [1, 5, 5], [3, 3, 1], [2, 4, 4]))
    lists = lists[:count]
    of_rows = torch.stack([loss(rows[i : i + 1], labels[i : i + 1]) for i in range(6)]).detach()
    anchors = (lists[0], *lists[2:3]) if count == 4 else (lists[0],)
    weights = _counted(anchors if name == "ProxyNCALoss" else lists, 6)
    want = (of_rows.double() * weights).mean()
    check_same("loss", loss(rows, labels, lists).detach(), want, SAME_LOSS)
    none = tuple(torch.tensor([], dtype=torch.int64) for _ in range(count))
    check_same("loss", loss(rows, labels, none).detach(), of_rows.double().mean(), SAME_LOSS)


def test_miners_weigh_the_logits_of_proxy_anchor() -> None:
    loss = ours.ProxyAnchorLoss(4, 8, margin=0.2, alpha=5)
    rows, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 0])
    lists = tuple(torch.tensor(each) for each in ([0, 0, 2], [1, 5, 5], [3, 3, 1]))
    added = _counted(lists, 6) - 1
    cosines = F.normalize(loss.proxies.double()) @ F.normalize(rows.double()).T
    own = labels == torch.arange(4)[:, None]
    positive = (torch.exp(-5 * (cosines - 0.2) + added) * own).sum(1).log1p().sum() / 3
    negative = (torch.exp(5 * (cosines + 0.2) + added) * ~own).sum(1).log1p().sum() / 4
    got = loss(rows, labels, lists)
    check_same("loss", got.detach(), (positive + negative).detach(), SAME_LOSS)


# --- memory --------------------------------------------------------------------------------------


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
        found = similarities(rows.double(), memory.embedding_memory.double(), None)
        check_same("loss", got, ntxent(found, (a, p, a, n)), SAME_LOSS)


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
