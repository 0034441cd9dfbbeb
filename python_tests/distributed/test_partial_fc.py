"""PartialFC: the sharded run equals the single one."""

from __future__ import annotations

import copy
import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from support import partial_fc as partial_fc_support
from support.partial_fc import (
    COUNTS,
    SIZE,
    Run,
    batch,
    compare,
    joined,
    own_part,
    sharded,
)
from support.ranks import run_ranks
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import unitsface_kernels as uk
from unitsface_kernels.distributed.collectives import world_size
from unitsface_kernels.distributed.partial_fc.sampling import sample_classes
from unitsface_kernels.distributed.partial_fc.shard import Shard
from unitsface_kernels.partial_fc import module as module_file

LOSSES = [
    ("cosface", {}),
    ("arcface", {}),
    ("uce", {}),
    ("class_bce", {}),
    ("sphereface2", {}),
    ("npt", {"k": 3}),
    ("proxy_nca", {}),
    ("epl", {}),
    ("epl", {"base": "uce"}),
    ("vpl", {"start_iteration": 2, "max_age": 4}),
]
RUNS = [
    *(Run(loss, options, rate) for loss, options in LOSSES for rate in (1.0, 0.4)),
    *(
        Run(loss, options, rate, optimizer, fuse, steps=6)
        for loss, options in LOSSES
        for rate, optimizer, fuse in (
            (1.0, "sgd", "backward"),
            (0.4, "sgd", "step"),
            (0.4, "adamw", "backward"),
        )
    ),
    Run("arcface", {}, 0.4, "adamw", steps=6),
    Run("vpl", {"start_iteration": 1, "base": "cosface"}, 0.4, steps=6, momentum=True),
    Run("uce", {"reduction": "sum"}, 0.4, steps=6),
    # Fewer classes than ranks, and fewer drawn than there are positives.
    Run("cosface", {}, 1.0, classes=3, steps=6),
    Run("class_bce", {}, 0.05, classes=3, fuse="backward", steps=6),
    Run("npt", {"k": 2, "hinges": "sum"}, 0.4, classes=3, fuse="step", steps=6),
    *(
        Run("cosface", {}, rate, fuse=fuse, max_norm=0.2, steps=6)
        for rate, fuse in ((1.0, None), (0.4, None), (0.4, "step"))
    ),
]


def _all_runs(rank: int) -> list[dict]:
    return [sharded(rank, run) for run in RUNS]


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1, marks=pytest.mark.extended),
        2,
        pytest.param(3, marks=pytest.mark.extended),
        # An odd and an even number of them, unequal and empty batches are in the others.
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_sharded_training_is_that_of_one_process(ranks):
    found = run_ranks(ranks, _all_runs)
    for number, run in enumerate(RUNS):
        together = joined([parts[number] for parts in found], run.classes)
        # Without a draw it does not matter how many ranks there are.
        expected = single(number, 1 if run.sample_rate == 1.0 else ranks)
        compare(together, expected, run.name())


@cache
def single(number: int, ranks: int) -> dict:
    return partial_fc_support.single(RUNS[number], ranks)


@pytest.mark.parametrize("loss", ["uce", "class_bce", "epl"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_thresholds_and_weights_start_as_published_or_as_asked(loss: str, rate: float):
    """UniFace: b = log(10 r C) for a share r of C classes."""
    options = {"base": "uce"} if loss == "epl" else {}
    head = uk.PartialFC(loss, SIZE, 500, rate, init_std=3.0, **options)
    (threshold,) = (p for name, p in head.named_parameters() if name.endswith("threshold"))
    want = torch.full_like(threshold, math.log(10 * rate * 500))
    torch.testing.assert_close(threshold.detach(), want)
    assert 2.8 < float(head.weight.detach().std()) < 3.2


def test_what_is_not_sampled_stays_bit_for_bit():
    classes, rate = 400, 0.1
    head = uk.PartialFC("class_bce", SIZE, classes, rate, seed=5)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    moved = torch.zeros(classes, dtype=torch.bool)
    for step in range(100):
        feats, labels = batch(step, classes)
        index, _ = sample_classes(labels, classes, 40, seed=5, rank=0, step=step)
        others = torch.ones(classes, dtype=torch.bool)
        others[index] = False
        before = [t.clone() for p in head.parameters() for t in (p.data, *_momentum(optimizer, p))]
        optimizer.zero_grad()
        head(feats, labels).backward()
        optimizer.step()
        after = [t for p in head.parameters() for t in (p.data, *_momentum(optimizer, p))]
        if step:
            assert len(before) == len(after) == 4
            for old, new in zip(before, after, strict=True):
                assert torch.equal(old[others], new[others])
                assert not torch.equal(old[index], new[index])
        moved |= ~others
    assert moved.all()


def _momentum(optimizer, parameter) -> list[torch.Tensor]:
    state = optimizer.state.get(parameter, {})
    return [state["momentum_buffer"]] if "momentum_buffer" in state else []


def test_initial_rows_do_not_depend_on_the_number_of_ranks():
    # More than one block of them, and a last one that is not full.
    classes = 5000
    whole = dict(_blocks(Shard(classes, 0, classes)))
    for ranks in (1, 3, 7):
        shards = [Shard.of_rank(classes, rank, ranks) for rank in range(ranks)]
        assert [len(s) for s in shards] == [
            classes // ranks + (r < classes % ranks) for r in range(ranks)
        ]
        for shard in shards:
            for place, row in _blocks(shard):
                assert torch.equal(row, whole[place])
    values = torch.stack(list(whole.values()))
    assert values.std() == pytest.approx(1.0, abs=0.02)
    assert len(torch.unique(values[:, 0])) > 4990


def _blocks(shard: Shard):
    for places, rows in shard.normal_rows(4, "weight", seed=1):
        for place, row in zip(range(places.start, places.stop), rows, strict=True):
            yield place + shard.start, row


# --- gradients ---------------------------------------------------------------------------------


def _gradients(rank: int) -> dict[str, torch.Tensor]:
    """Per-row losses with weights of their own, retained graphs, refused second derivatives."""
    counts = COUNTS[world_size()]
    found = {}
    for loss in ("cosface", "uce", "npt", "epl"):
        head = uk.PartialFC(loss, SIZE, 23, seed=3, reduction="none")
        if loss == "epl":
            head.loss.set_epoch(5)
        images, labels = batch(0, 23)
        feats = own_part(images, rank, counts).requires_grad_()
        weights = own_part(torch.arange(1.0, 13.0), rank, counts)
        losses = head(feats, own_part(labels, rank, counts))
        assert losses.shape == (counts[rank],)
        objective = (weights * losses).sum() * world_size()
        inputs = [feats, head.weight]
        first = torch.autograd.grad(objective, inputs, retain_graph=True)
        again = torch.autograd.grad(objective, inputs, create_graph=True)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(again[1].sum(), head.weight)
        found[loss] = losses.detach()
        # Averaging over ranks divides by their number.
        found[f"{loss} feats"] = first[0] / world_size()
        found[f"loss.{loss} weight"] = first[1]
    return found


def test_losses_of_rows_and_their_gradients():
    (expected,) = run_ranks(1, _gradients)
    for ranks in (2, 3):
        found = run_ranks(ranks, _gradients)
        for key, value in expected.items():
            together = torch.cat([part[key] for part in found])
            error = torch.linalg.vector_norm(together - value)
            assert error <= 1e-5 * torch.linalg.vector_norm(value), key


def test_one_process_computes_what_the_function_does():
    feats, labels = batch(0, 23)
    head = uk.PartialFC("cosface", SIZE, 23, scale=32.0, margin=0.2)
    ours, theirs = (feats.clone().requires_grad_() for _ in range(2))
    weight = head.weight.detach().clone().requires_grad_()
    loss = head(ours, labels)
    expected = uk.fused_margin_softmax_loss(theirs, weight, labels, scale=32.0, m3=0.2)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(head.weight.grad, weight.grad)


def test_evaluation_takes_all_classes_and_changes_nothing():
    feats, labels = batch(0, 23)
    head = uk.PartialFC("epl", SIZE, 23, sample_rate=0.2).eval()
    before = copy.deepcopy(head.state_dict())
    with torch.no_grad():
        loss = head(feats, labels)
    full = uk.PartialFC("epl", SIZE, 23).eval()
    assert torch.equal(loss, full(feats, labels))
    assert head.step == 0
    for key, value in head.state_dict().items():
        assert value == before[key] if isinstance(value, dict) else torch.equal(value, before[key])


def test_autocast_multiplies_in_its_dtype():
    feats, labels = batch(0, 23)
    head = uk.PartialFC("cosface", SIZE, 23)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(feats, labels)
    full = head(feats, labels)
    assert half.dtype == torch.float32
    assert half != full
    assert torch.isclose(half, full, rtol=0.05)


def test_nothing_of_the_size_of_logits_or_sampled_rows_is_stored():
    classes, rows, size = 60_000, 64, 32
    head = uk.PartialFC("cosface", size, classes, 0.5)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
    head.fuse(optimizer)
    feats = torch.randn(rows, size, requires_grad=True)
    labels = torch.randint(classes, (rows,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            sizes = [t.nbytes for t in (result,) if isinstance(t, torch.Tensor)]
            if function.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten.view):
                largest = max([largest, *sizes])
            return result

    head(feats, labels).backward()
    optimizer.step()
    with Watch():
        head(feats, labels).backward()
    sampled = 30_000 * size * 4
    logits = rows * 30_000 * 4
    assert largest < min(sampled, logits) / 2


# --- mixed precision ---------------------------------------------------------------------------


def _overflow(rank: int, fuse: str | None) -> list[tuple]:
    counts = COUNTS[world_size()]
    head = uk.PartialFC("cosface", SIZE, 23, 0.4, seed=3)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
    if fuse:
        head.fuse(optimizer, when=fuse)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0, growth_interval=100)
    seen = []
    for step in range(4):
        images, labels = (own_part(t, rank, counts) for t in batch(step, 23))
        feats = images.requires_grad_()
        before = head.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(head(feats, labels)).backward()
        if step == 1 and rank == 1:
            # An overflow in the gradient of one rank's shard.
            gradient = head.weight.grad
            (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        seen.append((torch.equal(before, head.weight), scaler.get_scale()))
    return [*seen, head.weight.detach()]


@pytest.mark.parametrize("fuse", [None, "step"])
def test_an_overflow_on_one_rank_is_no_step_on_any(fuse):
    for found in run_ranks(2, partial(_overflow, fuse=fuse)):
        assert [same for same, _ in found[:4]] == [False, True, False, False]
        assert [scale for _, scale in found[:4]] == [1024.0, 512.0, 512.0, 512.0]


def test_a_scaled_fused_step_is_an_unscaled_one():
    weights = []
    for scale in (1.0, 4096.0):
        head = uk.PartialFC("uce", SIZE, 23, seed=3)
        optimizer = uk.SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
        head.fuse(optimizer, when="step")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for step in range(3):
            feats, labels = batch(step, 23)
            optimizer.zero_grad()
            scaler.scale(head(feats, labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


def test_nan_features_step_nothing_that_a_scaler_guards():
    head = uk.PartialFC("cosface", SIZE, 23)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.1)
    head.fuse(optimizer, when="step")
    scaler = torch.amp.GradScaler("cpu")
    feats, labels = batch(0, 23)
    feats[3, 3] = torch.nan
    before = head.weight.detach().clone()
    scaler.scale(head(feats, labels)).backward()
    scaler.step(optimizer)
    assert torch.equal(head.weight, before)


def test_gradients_of_two_batches_add_up():
    head = uk.PartialFC("cosface", SIZE, 23, 0.4)
    dense = torch.zeros(23, SIZE)
    for step in range(2):
        feats, labels = batch(step, 23)
        index, positions = sample_classes(labels, 23, 9, seed=0, rank=0, step=step)
        weight = head.weight.detach().clone().requires_grad_()
        uk.fused_margin_softmax_loss(feats, weight, positions, class_index=index).backward()
        dense += weight.grad
        head(feats, labels).backward()
        # Known to ascend, or it would be sorted and copied.
        assert head.weight.grad.is_coalesced()
    torch.testing.assert_close(head.weight.grad.to_dense(), dense)


def test_torch_compile_breaks_the_graph_and_goes_on():
    head = uk.PartialFC("cosface", SIZE, 23)
    body = torch.nn.Linear(SIZE, SIZE)

    def loss(images, labels):
        return head(F.relu(body(images)), labels)

    images, labels = batch(0, 23)
    expected = loss(images, labels)
    compiled = torch.compile(loss, backend="eager")(images, labels)
    torch.testing.assert_close(compiled, expected)


def test_every_class_loss_can_be_sharded():
    assert set(uk.CLASS_LOSSES) == set(module_file.SHARDABLE)


# --- devices -----------------------------------------------------------------------------------


def _trained(device: str, run: Run) -> dict[str, torch.Tensor]:
    head = uk.PartialFC(run.loss, SIZE, 200, run.sample_rate, device=device, **run.options)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)
    if run.fuse:
        head.fuse(optimizer, when=run.fuse)
    feats = [t.to(device) for step in range(run.steps) for t in batch(step, 200)]
    gradients = []
    # The second step on: by then whatever is made once is there.
    for step in range(run.steps):
        images, labels = feats[2 * step].requires_grad_(), feats[2 * step + 1]
        mode = "error" if device == "cuda" and step > 1 else "default"
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            optimizer.zero_grad()
            head(images, labels).backward()
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        gradients.append(images.grad)
    return {"feats": torch.stack(gradients).cpu(), "weight": head.weight.detach().cpu()}


@pytest.mark.parametrize("fuse", [None, "backward", "step"])
@pytest.mark.parametrize("loss", ["cosface", "class_bce", "npt"])
def test_backends_train_alike(loss, fuse):
    native, triton = (
        _trained("cpu", Run(loss, {"backend": name}, 0.2, fuse=fuse, steps=2))
        for name in ("native", "triton")
    )
    for key, value in native.items():
        error = torch.linalg.vector_norm(triton[key] - value)
        assert error <= 1e-4 * torch.linalg.vector_norm(value), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("fuse", [None, "backward", "step"])
@pytest.mark.parametrize("loss", ["cosface", "uce", "class_bce", "epl"])
def test_on_cuda_nothing_waits_and_the_result_is_the_same(loss, fuse, backend):
    runs = [Run(loss, {"backend": name}, 0.4, fuse=fuse, steps=4) for name in ("native", backend)]
    expected, found = _trained("cpu", runs[0]), _trained("cuda", runs[1])
    for key, value in expected.items():
        error = torch.linalg.vector_norm(found[key] - value)
        assert error <= 1e-3 * torch.linalg.vector_norm(value), key


def _fewer_classes_than_ranks(rank: int) -> list[torch.Tensor]:
    found = []
    for loss in ("uce", "sphereface2", "cosface", "class_bce", "npt", "epl"):
        options = {} if loss in ("npt", "epl") else {"skip_tolerance": 1e-4}
        head = uk.PartialFC(loss, 8, 1, **options)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        value = head(x, torch.zeros(3, dtype=torch.int64))
        value.backward()
        found += [value.detach(), x.grad]
    return found


def test_fewer_classes_than_ranks() -> None:
    first, second = run_ranks(2, _fewer_classes_than_ranks)
    for a, b in zip(first[::2], second[::2], strict=True):
        assert torch.equal(a, b)
    assert all(bool(t.isfinite().all()) for t in first + second)
