"""Adapters without the libraries that they stand in for: what they refuse, keep and leave out."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import TARGETS, Target, run_python
from support.largest import Largest
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same

from unitsface_kernels.adapters.metric_learning import (
    ArcFaceLoss,
    CircleLoss,
    CosFaceLoss,
    CrossBatchMemory,
    MultiSimilarityLoss,
    NTXentLoss,
    SupConLoss,
)
from unitsface_kernels.adapters.metric_learning.measures import Measure
from unitsface_kernels.functional.matching import match, sums_of_matching

each_pair_loss = pytest.mark.parametrize("cls", [NTXentLoss, SupConLoss])
each_loss = pytest.mark.parametrize(
    "cls", [NTXentLoss, SupConLoss, MultiSimilarityLoss, CircleLoss]
)


def test_adapters_are_imported_when_used_and_without_the_library() -> None:
    source = """
import sys
import unitsface_kernels
assert "unitsface_kernels.adapters" not in sys.modules
unitsface_kernels.adapters.metric_learning.NTXentLoss()
assert not any(name.startswith("pytorch_metric_learning") for name in sys.modules)
"""
    done = run_python("-c", source)
    assert done.returncode == 0, done.stderr


def _random(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 8), torch.arange(rows) % 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NTXentLoss(temperature=0.0), ValueError, "temperature must be > 0"),
        (lambda: SupConLoss(distance=object()), ValueError, r"distance must be .* got object\(\)"),
        (lambda: CosFaceLoss(5, 8, distance=Measure(normalize=False)), ValueError, "are cosines"),
        (lambda: NTXentLoss(reducer=object()), TypeError, "reducer must be a reducer"),
        (lambda: NTXentLoss(embedding_regularizer=3), TypeError, "embedding_regularizer must be"),
        (lambda: CosFaceLoss(5, 8, weight_regularizer=3), TypeError, "weight_regularizer must be"),
        (lambda: CosFaceLoss(5, 8, collect_stats=True), ValueError, "no statistics"),
        (lambda: ArcFaceLoss(5, 8, maargin=1), TypeError, "unexpected keyword .*maargin"),
        (lambda: ArcFaceLoss(0, 8), ValueError, "num_classes must be >= 1"),
        (lambda: CrossBatchMemory(torch.nn.Identity(), 8), TypeError, "loss must be an NTXent"),
        (lambda: CrossBatchMemory(NTXentLoss(), 8, miner=3), TypeError, "miner must be callable"),
        (lambda: CrossBatchMemory(NTXentLoss(), 8, 0), ValueError, "memory_size must be >= 1"),
    ],
)
def test_constructors_refuse(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda loss, e, y: loss(e, None), ValueError, "labels must be given"),
        (lambda loss, e, y: loss(e, [1] * 6), TypeError, "labels must be a torch.Tensor"),
        (lambda loss, e, y: loss(e, y[:3]), ValueError, r"labels must have shape \(6,\)"),
        (lambda loss, e, y: loss(e, y.float()), TypeError, "labels must have an integer dtype"),
        (lambda loss, e, y: loss(e, y, (y, y)), ValueError, "indices_tuple must be .anchors"),
        (lambda loss, e, y: loss(e[0], y), ValueError, "embeddings must have shape"),
    ],
)
@pytest.mark.parametrize(
    "loss",
    [NTXentLoss(), SupConLoss(), CosFaceLoss(3, 8), CrossBatchMemory(NTXentLoss(), 8)],
    ids=lambda loss: type(loss).__name__,
)
def test_calls_refuse(loss, call, error: type[Exception], message: str) -> None:
    embeddings, labels = _random()
    with pytest.raises(error, match=message):
        call(loss, embeddings, labels)


def test_references_come_in_pairs_and_only_over_samples() -> None:
    embeddings, labels = _random()
    with pytest.raises(ValueError, match="ref_labels must be given for every row of ref_emb"):
        NTXentLoss()(embeddings, labels, ref_emb=embeddings)
    with pytest.raises(ValueError, match="ref_emb must be given together with ref_labels"):
        NTXentLoss()(embeddings, labels, ref_labels=labels)
    with pytest.raises(ValueError, match=r"ref_labels must have shape \(6,\)"):
        NTXentLoss()(embeddings, labels, ref_emb=embeddings, ref_labels=labels[:2])
    with pytest.raises(ValueError, match="ref_emb must be None"):
        CosFaceLoss(3, 8)(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)


@pytest.mark.parametrize("label", [-1, 3])
def test_class_labels_are_classes(label: int) -> None:
    """No label means ignore, as there."""
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 3\), got {label}"):
        CosFaceLoss(3, 8)(torch.randn(1, 8), torch.tensor([label]))


def test_weights_are_laid_out_as_kernels_read_them() -> None:
    """A transposed copy of them in every step would cost as much memory as their gradient."""
    loss = CosFaceLoss(5, 8, weight_init_func=torch.nn.init.ones_)
    assert bool((loss.W == 1).all())
    loss.load_state_dict({"W": torch.randn(8, 5)})
    loss(*_random()).backward()
    for tensor in (loss.W, loss.W.grad, copy.deepcopy(loss).W):
        assert tensor.shape == (8, 5)
        assert tensor.t().is_contiguous()


# --- memory ------------------------------------------------------------------------------------


def test_memory_refuses_what_it_cannot_hold() -> None:
    memory = CrossBatchMemory(NTXentLoss(), 8, memory_size=5)
    embeddings, labels = _random()
    with pytest.raises(ValueError, match="number of queued embeddings must be <= 5, got 6"):
        memory(embeddings, labels)
    with pytest.raises(ValueError, match="embeddings must have D = 8 columns"):
        memory(embeddings[:4, :7], labels[:4])
    with pytest.raises(TypeError, match="enqueue_mask must have dtype bool"):
        memory(embeddings, labels, enqueue_mask=labels)
    with pytest.raises(ValueError, match=r"enqueue_mask must have shape \(6,\), got \(2,\)"):
        memory(embeddings, labels, enqueue_mask=labels[:2] == 0)
    assert not memory.queue_idx
    assert not bool(memory.embedding_memory.any())


@each_pair_loss
def test_single_samples_leave_out_their_own_copy(cls: type) -> None:
    """A batch of one sample is compared with the memory without it."""
    embeddings, labels = torch.randn(9, 8), torch.tensor([0, 1, 0, 1, 2, -1, -1, 0, 1])
    memory = CrossBatchMemory(cls(), 8, memory_size=4)
    for i in range(9):
        got = memory(embeddings[i : i + 1], labels[i : i + 1])
        held = slice(max(i - 3, 0), i)
        want = cls()(
            embeddings[i : i + 1],
            labels[i : i + 1],
            ref_emb=embeddings[held],
            ref_labels=labels[held],
        )
        # Differences of logits, which are as large as 1 / temperature.
        logit = 1 / memory.loss.temperature
        check_same("loss", got + logit, want + logit, SAME_LOSS)


@each_pair_loss
def test_nothing_queued_changes_nothing(cls: type) -> None:
    memory = CrossBatchMemory(cls(), 8, memory_size=16)
    embeddings, labels = _random()
    none_queued = torch.zeros(6, dtype=torch.bool)
    assert float(memory(embeddings, labels, enqueue_mask=none_queued)) == 0
    assert (memory.queue_idx, memory.has_been_filled) == (0, False)
    memory(embeddings, labels)
    got = memory(embeddings, labels, enqueue_mask=none_queued)
    want = cls()(embeddings, labels, ref_emb=embeddings, ref_labels=labels.clone())
    check_same("loss", got, want, SAME_LOSS)
    assert float(memory(embeddings[:0], labels[:0])) == 0


@each_pair_loss
def test_backward_after_later_steps(cls: type) -> None:
    """A loss keeps the memory that it was computed with."""
    batches = [_random() for _ in range(4)]

    def gradients(at_once: bool) -> list[torch.Tensor]:
        memory = CrossBatchMemory(cls(), 8, memory_size=10)
        leaves = [embeddings.clone().requires_grad_() for embeddings, _ in batches]
        total = torch.zeros(())
        for leaf, (_, labels) in zip(leaves, batches, strict=True):
            loss = memory(leaf, labels)
            if at_once:
                loss.backward()
            total = total + loss
        if not at_once:
            total.backward()
        return [leaf.grad for leaf in leaves]

    for got, want in zip(gradients(False), gradients(True), strict=True):
        assert bool(want.any())
        assert torch.equal(got, want)


def test_state_dict_continues_where_the_memory_was(tmp_path) -> None:
    memory = CrossBatchMemory(SupConLoss(), 8, memory_size=10)
    for _ in range(3):
        memory(*_random())
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    loaded = CrossBatchMemory(SupConLoss(), 8, memory_size=10)
    loaded.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert (loaded.queue_idx, loaded.has_been_filled) == (8, True)
    batch = _random()
    assert torch.equal(loaded(*batch), memory(*batch))
    assert torch.equal(loaded.embedding_memory, memory.embedding_memory)


# --- without N x M -----------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(7, 11), (11, 7), (1, 1), (0, 3), (3, 0)])
def test_sums_of_matching(rows: int, columns: int) -> None:
    """The matmul with the matrix of equal labels, and its transpose as the gradient."""
    labels, others = torch.randint(-3, 4, (rows,)), torch.randint(-3, 4, (columns,))
    values = torch.randn(columns, 5, dtype=torch.float64, requires_grad=True)
    matrix = (labels[:, None] == others[None, :]).double()
    matching = match(labels, others, holds_itself=False)
    assert torch.equal(matching.rows[:, None] == matching.columns[None, :], matrix.bool())
    assert matching.positives.tolist() == matrix.sum(1).tolist()
    assert matching.negatives.tolist() == (1 - matrix).sum(1).tolist()
    upstream = torch.randn(rows, 5, dtype=torch.float64)
    got = sums_of_matching(values, matching)
    (gradient,) = torch.autograd.grad(got, values, upstream)
    check_same("sums", got.detach(), matrix @ values.detach(), SAME_LOSS)
    check_same("gradient", gradient, matrix.T @ upstream, SAME_GRADIENT)


@each_loss
@pytest.mark.parametrize("memory", [False, True], ids=["batch", "memory"])
def test_nothing_of_size_n_by_m(cls: type, memory: bool) -> None:
    """Work outside the fused functions is linear in N and M, forward and backward."""
    embeddings, labels = torch.randn(200, 4, requires_grad=True), torch.arange(200) % 3
    loss = CrossBatchMemory(cls(), 4, memory_size=300) if memory else cls()
    with Largest() as largest:
        for _ in range(3):
            loss(embeddings, labels).backward()
    assert 200 * 4 <= largest.numel <= 310 * 4


@pytest.mark.parametrize("target", TARGETS, ids=str)
@each_loss
def test_every_backend(cls: type, target: Target) -> None:
    embeddings, labels = (t.to(target.device) for t in _random(20))
    leaf = embeddings.clone().requires_grad_()
    loss = cls(backend=target.backend)(leaf, labels)
    loss.backward()
    want = embeddings.clone().requires_grad_()
    expected = cls(backend="reference")(want, labels)
    expected.backward()
    check_same("loss", loss, expected, SAME_LOSS)
    check_same("gradient", leaf.grad, want.grad, SAME_GRADIENT)


@each_loss
def test_nan_is_not_hidden(cls: type) -> None:
    embeddings, labels = _random()
    embeddings[2] = torch.nan
    assert bool(cls()(embeddings, labels).isnan())
