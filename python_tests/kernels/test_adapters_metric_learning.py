"""The adapters against pytorch-metric-learning itself: losses, gradients, memories, state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.helpers import DEVICES
from support.rounding import spreads
from support.tolerances import (
    AUTOCAST_GRADIENT,
    AUTOCAST_LOSS,
    SAME_LOSS,
    check_all,
    check_same,
)
from torch import Tensor, nn

from unitsface_kernels.adapters import metric_learning as ours

theirs = pytest.importorskip(
    "pytorch_metric_learning.losses",
    reason="pytorch-metric-learning is not installed; `make env` installs it",
)

PAIR_LOSSES = ("NTXentLoss", "SupConLoss")
CLASS_LOSSES = ("CosFaceLoss", "ArcFaceLoss")
SMALLEST, LARGEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max

each_device = pytest.mark.parametrize("device", DEVICES)
each_pair_loss = pytest.mark.parametrize("name", PAIR_LOSSES)
each_class_loss = pytest.mark.parametrize("name", CLASS_LOSSES)

Evaluated = tuple[Tensor, list[Tensor]]


def _evaluate(run: Callable[..., Tensor], tensors: list[Tensor], *more: nn.Parameter) -> Evaluated:
    """Loss and gradients; a tensor that the loss does not reach has gradient 0."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = run(*leaves)
    inputs = [*leaves, *more]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = [
        torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)
    ]
    return loss.detach(), gradients


def _check(got: Evaluated, original: Callable[[], Evaluated]) -> None:
    """By the rule; ``original`` evaluates in float64, and changes nothing when it does."""

    def named(loss: Tensor, gradients: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": loss} | {f"gradient {k}": g for k, g in enumerate(gradients)}

    assert got[0].dtype == torch.float32
    check_all(named(*got), spreads(lambda: named(*original())))


def _compare(name: str, tensors: list[Tensor], call: Callable[..., Tensor], **options) -> None:
    """Ours against the original in float64."""
    mine, original = getattr(ours, name)(**options), getattr(theirs, name)(**options)
    exact = [t.double() for t in tensors]
    got = _evaluate(lambda *t: call(mine, *t), tensors)
    _check(got, lambda: _evaluate(lambda *t: call(original, *t), exact))


IN_BATCH = {
    "random": [2, 0, -1, 1, 2, 2, -1, 0, -7, 1, 2, 0],
    "no_positives": list(range(-4, 4)),
    "no_negatives": [7] * 6,
    "one_anchor_without_negatives_is_none": [3, 3, 3, 4],
    "one_sample": [0],
    "two_of_one": [-1, -1],
    "two_of_two": [0, 1],
    "extreme_labels": [SMALLEST, LARGEST, SMALLEST, LARGEST, -1, 0],
}


@each_device
@each_pair_loss
@pytest.mark.parametrize("labels", IN_BATCH.values(), ids=IN_BATCH)
@pytest.mark.parametrize("seed", range(3))
def test_in_batch(name: str, device: str, labels: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    embeddings = torch.randn(len(labels), 8, device=device)
    _compare(name, [embeddings], lambda loss, e: loss(e, torch.tensor(labels)))


@each_device
@each_pair_loss
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2])
def test_temperatures_and_duplicates(name: str, device: str, temperature: float) -> None:
    """Every embedding twice, once under its own label and once under any."""
    embeddings = torch.randn(20, 24, device=device).repeat(2, 1)
    labels = torch.cat([torch.arange(20) % 7, torch.randint(-3, 7, (20,))])
    _compare(name, [embeddings], lambda loss, e: loss(e, labels), temperature=temperature)


WITH_REFERENCE = {
    "random": ([2, 0, -1, 1, 2, 2, -1, 0], [1, -1, 2, 2, 0, 5, -1, 2, 2, -9, 0]),
    "disjoint": ([0, 1, 2], [3, 4, -5, 6]),
    "no_negatives": ([4, 4], [4, 4, 4]),
    "anchor_with_a_lone_positive": ([0, 1, 1, 0], [0]),
    "anchors_without_negatives": ([0, 1, 2], [0, 0, 0]),
    "one_pair_of_either_kind": ([0], [0, 1]),
    "two_positive_pairs": ([0], [0, 1, 0]),
    "one_sample_one_reference": ([0], [0]),
}


@each_device
@each_pair_loss
@pytest.mark.parametrize("labels", WITH_REFERENCE.values(), ids=WITH_REFERENCE)
@pytest.mark.parametrize("seed", range(3))
def test_with_reference(
    name: str, device: str, labels: tuple[list[int], list[int]], seed: int
) -> None:
    torch.manual_seed(seed)
    rows, columns = (torch.tensor(some) for some in labels)
    tensors = [torch.randn(len(some), 8, device=device) for some in labels]
    _compare(name, tensors, lambda loss, e, r: loss(e, rows, ref_emb=r, ref_labels=columns))


@each_pair_loss
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_one_tensor_as_both_labels_leaves_out_equal_places(name: str, dtype: torch.dtype) -> None:
    """Two views of a batch: the original looks at the identity of the tensors."""
    labels = torch.tensor([0, 1, -1, 0, 1, 5], dtype=dtype)
    tensors = [torch.randn(6, 8), torch.randn(6, 8)]
    for both in (labels, labels.clone()):
        _compare(name, tensors, lambda loss, e, r, b=both: loss(e, labels, ref_emb=r, ref_labels=b))


@each_pair_loss
def test_the_original_wraps_ours(name: str) -> None:
    embeddings, other = torch.randn(2, 6, 8)
    for symmetric in (False, True):
        got, want = (
            theirs.SelfSupervisedLoss(getattr(library, name)(), symmetric)(embeddings, other)
            for library in (ours, theirs)
        )
        check_same("loss", got, want, SAME_LOSS)


# --- losses over classes -----------------------------------------------------------------------


def _class_losses(name: str, device: str, **options) -> list[nn.Module]:
    """Ours, and the original in float64, with the same weights."""
    mine, original = (getattr(library, name)(15, 8, **options) for library in (ours, theirs))
    original.load_state_dict(mine.state_dict())
    return [mine.to(device), original.to(device, torch.float64)]


@each_device
@each_class_loss
@pytest.mark.parametrize("options", [{}, {"margin": 0.1, "scale": 16}], ids=["default", "other"])
@pytest.mark.parametrize("rows", [1, 30])
def test_classes(name: str, device: str, options: dict[str, float], rows: int) -> None:
    embeddings, labels = torch.randn(rows, 8, device=device), torch.randint(0, 15, (rows,))
    mine, original = _class_losses(name, device, **options)
    got = _evaluate(lambda e: mine(e, labels), [embeddings], mine.W)
    exact = embeddings.double()
    _check(got, lambda: _evaluate(lambda e: original(e, labels), [exact], original.W))
    assert got[1][1].shape == (8, 15)


@each_class_loss
def test_state_dicts_are_exchanged_and_initialized_alike(name: str) -> None:
    drawn = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        drawn.append(getattr(library, name)(15, 8))
    mine, original = drawn
    assert torch.equal(mine.W, original.W)
    fresh = getattr(ours, name)(num_classes=15, embedding_size=8)
    fresh.load_state_dict(original.state_dict())
    assert torch.equal(fresh.W, original.W)
    assert original.load_state_dict(fresh.state_dict()).missing_keys == []
    embeddings = torch.randn(5, 8)
    check_same("logits", mine.get_logits(embeddings), original.get_logits(embeddings), SAME_LOSS)
    assert mine.margin == pytest.approx(original.margin)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SubCenterArcFaceLoss"])
def test_arcface_past_pi_minus_margin(name: str) -> None:
    """The logit jumps down there, as the original's."""
    sizes = {"num_classes": 2, "embedding_size": 2, "scale": 8.0}
    losses = [getattr(library, name)(**sizes) for library in (ours, theirs)]
    margin = losses[0].margin
    angles = torch.linspace(0.2, torch.pi - 1e-3, 200, dtype=torch.float64)
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    target = torch.zeros(1, dtype=torch.int64)
    values = []
    for loss in losses:
        with torch.no_grad():
            # The other class is opposite to the target.
            centers = loss.W.shape[1] // 2
            ends = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
            loss.W.copy_(ends.repeat_interleave(centers, dim=1))
            values.append(torch.stack([loss(e[None], target) for e in embeddings]))
    mine, original = values
    near = angles < torch.pi - margin
    check_same("loss", mine[near], original[near], SAME_LOSS)
    far = angles[~near]
    assert len(far) > 10
    jumps = far.cos() - margin * torch.tensor(margin).sin()

    def log_loss(cosine_of_target: Tensor) -> Tensor:
        return nn.functional.softplus(8.0 * (-far.cos() - cosine_of_target))

    check_same("original", original[~near], log_loss(jumps), SAME_LOSS)
    check_same("ours", mine[~near], log_loss(jumps), SAME_LOSS)


# --- memory ------------------------------------------------------------------------------------


def _memories(name: str, size: int, device: str) -> list[nn.Module]:
    return [
        library.CrossBatchMemory(getattr(library, name)(), 8, size).to(device)
        for library in (ours, theirs, theirs)
    ]


def _check_step(memories: list[nn.Module], embeddings: Tensor, labels: Tensor, **options) -> None:
    """Loss, gradient and what is held afterwards."""
    mine, exact, original = memories

    def step(memory: nn.Module, dtype: torch.dtype) -> Evaluated:
        return _evaluate(lambda e: memory(e, labels, **options), [embeddings.to(dtype)])

    _check(step(mine, torch.float32), lambda: step(copy.deepcopy(exact), torch.float64))
    step(exact, torch.float64)
    step(original, torch.float32)
    assert torch.equal(mine.embedding_memory, original.embedding_memory)
    assert torch.equal(mine.label_memory, original.label_memory)
    assert mine.queue_idx == original.queue_idx
    assert mine.has_been_filled == original.has_been_filled


@each_device
@each_pair_loss
@pytest.mark.parametrize(
    "sizes",
    [[5] * 11, [7, 9, 16, 2, 16, 15, 3, 4, 8], [16] * 3, [2, 3]],
    ids=["equal", "ragged", "whole", "unfilled"],
)
def test_memory(name: str, device: str, sizes: list[int]) -> None:
    """Every step's loss, gradient and buffers, past the end of the ring at least twice."""
    memories = _memories(name, 16, device)
    for size in sizes:
        labels = torch.randint(-2, 3, (size,))
        _check_step(memories, torch.randn(size, 8, device=device), labels)
    assert sum(sizes) > 2 * 16 or not memories[0].has_been_filled
    for memory in memories:
        memory.reset_queue()
    embeddings, labels = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    got, _, want = (memory.cpu()(embeddings, labels) for memory in memories)
    check_same("after a reset", got, want, SAME_LOSS)


@each_device
@each_pair_loss
def test_memory_with_enqueue_mask(name: str, device: str) -> None:
    memories = _memories(name, 16, device)
    for step in range(9):
        labels = torch.randint(-2, 3, (11,), device=device)
        mask = torch.zeros(11, dtype=torch.bool, device=device)
        # From one to nine samples enter; every third step is without a mask.
        mask[torch.randperm(11)[: step + 1]] = True
        options = {} if step % 3 == 2 else {"enqueue_mask": mask}
        _check_step(memories, torch.randn(11, 8, device=device), labels, **options)


def test_state_of_the_original_memory_starts_empty_as_there() -> None:
    mine, original, _ = _memories("NTXentLoss", 16, "cpu")
    fresh = theirs.CrossBatchMemory(theirs.NTXentLoss(), 8, 16)
    original(torch.randn(10, 8), torch.randint(0, 3, (10,)))
    mine(torch.randn(4, 8), torch.randint(0, 3, (4,)))
    for memory in (mine, fresh):
        memory.load_state_dict(original.state_dict())
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 1, 0, 1, 2, 2])
    check_same("loss", mine(embeddings, labels), fresh(embeddings, labels), SAME_LOSS)
    assert mine.queue_idx == fresh.queue_idx == 6


# --- precisions --------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("name", [*PAIR_LOSSES, *CLASS_LOSSES])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "autocast"])
def test_half_precision(name: str, device: str, kind: str) -> None:
    """Against the original in float32 on the same, rounded numbers."""
    sizes = (15, 24) if name in CLASS_LOSSES else ()
    mine, original = (getattr(library, name)(*sizes).to(device) for library in (ours, theirs))
    original.load_state_dict(mine.state_dict())
    embeddings = torch.randn(40, 24, device=device)
    labels = torch.randint(0, 15, (40,), device=device)
    if kind != "autocast":
        embeddings = embeddings.to(getattr(torch, kind))
    want, want_gradients = _evaluate(lambda e: original(e, labels), [embeddings.float()])
    with torch.autocast(device, torch.bfloat16, enabled=kind == "autocast"):
        got, gradients = _evaluate(lambda e: mine(e, labels), [embeddings])
    # As there; computed in float32.
    assert got.dtype == embeddings.dtype
    assert gradients[0].dtype == embeddings.dtype
    check_same("loss", got, want, AUTOCAST_LOSS)
    check_same("gradient", gradients[0], want_gradients[0], AUTOCAST_GRADIENT)


@each_pair_loss
def test_defaults_of_the_original_may_be_spelled_out(name: str) -> None:
    from pytorch_metric_learning import distances, reducers

    reducer = getattr(reducers, getattr(ours, name).default_reducer.__name__)()
    loss = getattr(ours, name)(distance=distances.CosineSimilarity(), reducer=reducer)
    embeddings, labels = torch.randn(8, 4), torch.arange(8) % 3
    want = getattr(theirs, name)()(embeddings, labels)
    check_same("loss", loss(embeddings, labels), want, SAME_LOSS)


def test_attributes_may_be_changed() -> None:
    from pytorch_metric_learning import distances

    embeddings, labels = torch.randn(8, 4), torch.arange(8) % 3
    changes = {
        "NTXentLoss": {"temperature": 0.5, "distance": distances.LpDistance(power=2)},
        "NormalizedSoftmaxLoss": {"temperature": 0.5},
        "CosFaceLoss": {"margin": 0.1, "scale": 8.0},
    }
    for name, changed in changes.items():
        sizes = {} if name == "NTXentLoss" else {"num_classes": 3, "embedding_size": 4}
        mine, original = (getattr(library, name)(**sizes) for library in (ours, theirs))
        original.load_state_dict(mine.state_dict())
        for attribute, value in changed.items():
            setattr(mine, attribute, value)
            setattr(original, attribute, value)
        check_same("loss", mine(embeddings, labels), original(embeddings, labels), SAME_LOSS)
    with pytest.raises(ValueError, match="distance must be CosineSimilarity"):
        mine.distance = distances.LpDistance()
