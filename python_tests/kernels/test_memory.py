"""FeatureMemory: what is stored, by one process and by several."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import DEVICES, TARGETS, Target
from torch import Tensor

import unitsface_kernels
from unitsface_kernels import FeatureMemory, PairSoftmaxLoss
from unitsface_kernels.losses import REGISTRY, LossSpec

each_device = pytest.mark.parametrize("device", DEVICES)


def _expected(memory: FeatureMemory, feats: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    features, known = memory.features.clone(), memory.labels.clone()
    for feature, label in zip(feats, labels.tolist(), strict=True):
        if label >= 0:
            features[label], known[label] = feature, label
    return features, known


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_occurrence_wins(device: str, dtype: torch.dtype) -> None:
    memory = FeatureMemory(50, 8).to(device)
    generator = torch.Generator().manual_seed(0)
    for step, count in enumerate((1, 300, 7, 0, 64)):
        feats = torch.randn(count, 8, generator=generator).to(device, dtype).requires_grad_()
        labels = torch.randint(-1, 50 if step else 3, (count,), generator=generator).to(device)
        features, known = _expected(memory, feats.detach().float(), labels)
        memory.update(feats, labels)
        assert torch.equal(memory.features, features)
        assert torch.equal(memory.labels, known)
        assert not memory.features.requires_grad
    memory.reset()
    assert not bool(memory.features.any())
    assert bool((memory.labels == -1).all())


def test_only_ignored_rows_store_nothing() -> None:
    memory = FeatureMemory(3, 4)
    memory.update(torch.ones(2, 4), torch.tensor([0, 2]))
    before = copy.deepcopy(memory.state_dict())
    memory.update(torch.full((2, 4), 7.0), torch.tensor([-1, -1]))
    for name, tensor in memory.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_loss_compares_with_what_was_seen() -> None:
    memory, loss = FeatureMemory(6, 8), PairSoftmaxLoss(scale=8.0)
    feats, labels = torch.randn(4, 8), torch.tensor([0, 1, 4, 5])
    columns = {"memory": memory.features, "memory_labels": memory.labels}
    assert float(loss(feats, labels, **columns)) == 0.0
    memory.update(feats[:3], labels[:3])
    want = loss(feats, labels, memory=feats[:3], memory_labels=labels[:3])
    assert float(want) > 0
    torch.testing.assert_close(loss(feats, labels, **columns), want)


def test_memory_copies_and_compiles() -> None:
    memory = FeatureMemory(6, 8)
    feats, labels = torch.randn(4, 8), torch.tensor([3, 1, 3, -1])
    torch.compiler.reset()
    compiled = copy.deepcopy(memory)
    torch.compile(compiled.update, fullgraph=True, backend="eager")(feats, labels)
    memory.update(feats, labels)
    fresh = FeatureMemory(6, 8)
    fresh.load_state_dict(memory.state_dict())
    for other in (compiled, fresh, copy.deepcopy(memory)):
        assert torch.equal(other.features, memory.features)
        assert torch.equal(other.labels, memory.labels)
    assert repr(memory) == "FeatureMemory(num_identities=6, dim=8)"


@pytest.mark.parametrize(
    ("feats", "labels", "error", "part"),
    [
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), ValueError, "D = 4"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), ValueError, "(2,)"),
        (torch.zeros(2, 4), torch.tensor([0, 3]), ValueError, "[-1, 3)"),
        (torch.zeros(2, 4), torch.zeros(2), TypeError, "integer"),
    ],
)
def test_mistakes(feats: Tensor, labels: Tensor, error: type, part: str) -> None:
    with pytest.raises(error) as raised:
        FeatureMemory(3, 4).update(feats, labels)
    assert part in str(raised.value)


# --- processes ------------------------------------------------------------------------------------


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    """Batches of different sizes; the second rank has none."""
    generator = torch.Generator().manual_seed(rank)
    count = (5, 0, 3)[rank]
    return torch.randn(count, 4, generator=generator), torch.randint(0, 4, (count,))


def _worker(rank: int, store: str, queue) -> None:
    torch.manual_seed(7)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=3
    )
    memory = FeatureMemory(4, 4)
    memory.update(*_batch(rank))
    queue.put((memory.features.tolist(), memory.labels.tolist()))


def test_replicas_stay_identical(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, str(tmp_path / "store"), queue), daemon=True)
        for rank in range(3)
    ]
    for worker in workers:
        worker.start()
    try:
        found = [queue.get(timeout=120) for _ in workers]
    finally:
        for worker in workers:
            worker.kill()
    batches = []
    for rank in range(3):
        torch.manual_seed(7)
        batches.append(_batch(rank))
    together = FeatureMemory(4, 4)
    together.update(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    for features, labels in found:
        assert torch.equal(torch.tensor(features), together.features)
        assert torch.equal(torch.tensor(labels), together.labels)


# --- updates between a loss and its backward pass -------------------------------------------------


def _stored(device: str) -> tuple[FeatureMemory, Tensor, Tensor]:
    """A memory that has seen most identities, and a batch with all kinds of pairs."""
    generator = torch.Generator().manual_seed(1)
    memory = FeatureMemory(12, 8).to(device)
    memory.update(torch.randn(9, 8, generator=generator).to(device), torch.arange(9, device=device))
    feats = torch.randn(8, 8, generator=generator).to(device)
    return memory, feats, torch.tensor([3, 1, 3, -1, 9, 11, 0, 5], device=device)


def _gradients(
    target: Target, spec: LossSpec, order: str, reduction: str, offset: int | None, step
) -> list[Tensor]:
    """Gradients of features and threshold; ``order``: what comes before the backward pass."""
    memory, feats, labels = _stored(target.device)
    feats.requires_grad_()
    b = []
    if spec.threshold != "none":
        shape = () if spec.threshold == "scalar" else (12,)
        b = [torch.full(shape, 2.0, device=target.device, requires_grad=True)]
    loss = step(
        feats,
        labels,
        *b,
        memory=memory.features,
        memory_labels=memory.labels,
        batch_offset=offset,
        **({"scale": 8.0} if "scale" in spec.defaults() else {}),
        reduction=reduction,
        backend=target.backend,
    )
    upstream = torch.linspace(0.5, 1.5, 8, device=target.device) if loss.dim() else loss * 0 + 1.5
    if order == "update":
        memory.update(feats, labels)
    first = torch.autograd.grad(loss, [feats, *b], upstream, retain_graph=True)
    if order == "between":
        memory.update(feats, labels)
    second = torch.autograd.grad(loss, [feats, *b], 2.0 * upstream)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other, 2.0 * one)
    return [loss.detach(), *first]


PAIR_LOSSES = [spec for spec in REGISTRY.values() if spec.topology == "pair"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("spec", PAIR_LOSSES, ids=lambda spec: spec.name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("offset", [None, 2], ids=["apart", "offset"])
def test_a_memory_may_be_updated_before_the_backward_pass(
    target: Target, spec: LossSpec, reduction: str, offset: int | None
) -> None:
    if target.interpreted and (offset or reduction == "sum"):
        pytest.skip("the work of a driver: a compiled backend's")
    step = getattr(unitsface_kernels, spec.function)
    want = _gradients(target, spec, "backward", reduction, offset, step)
    for order in ("update", "between"):
        got = _gradients(target, spec, order, reduction, offset, step)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), order


@pytest.mark.parametrize("spec", PAIR_LOSSES, ids=lambda spec: spec.name)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_memory_may_be_updated_after_a_compiled_loss(spec: LossSpec, reduction: str) -> None:
    torch.compiler.reset()
    target = Target("native", "cpu")
    plain = getattr(unitsface_kernels, spec.function)
    step = torch.compile(plain, fullgraph=True, backend="aot_eager")
    want = _gradients(target, spec, "backward", reduction, None, plain)
    for order in ("update", "between"):
        for a, b in zip(_gradients(target, spec, order, reduction, None, step), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", PAIR_LOSSES, ids=lambda spec: spec.name)
def test_nothing_of_a_memory_is_kept(spec: LossSpec) -> None:
    """Neither it nor a copy."""
    memory, feats, labels = _stored("cpu")
    feats.requires_grad_()
    b = {} if spec.threshold == "none" else {"b": torch.zeros(12 if spec.name != "uss" else ())}
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        getattr(unitsface_kernels, spec.function)(
            feats, labels, **b, memory=memory.features, memory_labels=memory.labels
        )
    assert saved
    assert not any(t.shape == memory.features.shape for t in saved)
    assert not any(t.data_ptr() == memory.labels.data_ptr() for t in saved)


def test_a_memory_with_a_gradient_is_watched() -> None:
    memory, feats, labels = _stored("cpu")
    features = memory.features.clone().requires_grad_()
    stored = features * 1.0
    loss = PairSoftmaxLoss()(feats, labels, memory=stored, memory_labels=memory.labels)
    with torch.no_grad():
        stored.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
