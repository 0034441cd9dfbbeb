"""State that outlives a step: not changed by batches that are not finite or by skipped steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from support.helpers import DEVICES
from support.ranks import run_ranks
from support.training import tiny, trainer_of, write_faces
from torch import Tensor, nn

import unitsface_kernels as uk
from unitsface_kernels.adapters.metric_learning import CrossBatchMemory, NTXentLoss, SupConLoss

D, IDENTITIES = 8, 6
BAD = [math.nan, math.inf, -math.inf]
each_device = pytest.mark.parametrize("device", DEVICES)


def _batch(seed: int, device: str = "cpu", bad: float | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(9, D, generator=generator)
    if bad is not None:
        feats[4, 3] = bad
    labels = torch.arange(9) % IDENTITIES
    labels[7] = -1
    return feats.to(device), labels.to(device)


def _same(one: nn.Module, other: dict[str, Tensor]) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other[name]), name


# --- thresholds -----------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["uss", "pair_bce"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_threshold_waits_for_a_finite_batch(
    device: str, bad: float, name: str, backend: str
) -> None:
    make = uk.USSLoss if name == "uss" else lambda **k: uk.PairBCELoss(IDENTITIES, **k)
    module, fresh = make(backend=backend).to(device), make(backend=backend).to(device)
    before = copy.deepcopy(module.state_dict())
    for seed in range(2):
        assert bool(module(*_batch(seed, device, bad)).isnan())
        _same(module, before)
    loss = module(*_batch(2, device))
    assert bool(loss.isfinite())
    assert torch.equal(loss, fresh(*_batch(2, device)))
    assert bool(module.initialized)
    restored = make(backend=backend).to(device)
    restored.load_state_dict(before)
    assert torch.equal(restored(*_batch(2, device)), loss)


@each_device
@pytest.mark.parametrize("bad", BAD)
def test_a_threshold_waits_where_only_positives_are_not_finite(device: str, bad: float) -> None:
    module = uk.USSLoss().to(device)
    feats, labels = _batch(0, device)
    memory, identities = _batch(1, device, bad)
    for own in (1, 0):  # what is not finite is a negative, then a positive
        labels.fill_(own)
        assert bool(module(feats, labels, memory=memory, memory_labels=identities % 2).isnan())
    assert not bool(module.initialized)
    identities[4] = -1  # ignored: whatever it holds is of no account
    assert bool(module(feats, labels, memory=memory, memory_labels=identities).isfinite())
    assert bool(module.initialized)


@pytest.mark.parametrize("bad", BAD)
def test_a_scaled_run_recovers_from_its_first_batch(bad: float) -> None:
    module = uk.USSLoss()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    for seed in range(3):
        feats, labels = _batch(seed, bad=None if seed else bad)
        optimizer.zero_grad()
        loss = module(feats.requires_grad_(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(loss.isfinite()) == bool(seed)
        assert bool(module.threshold.isfinite())


# --- features of identities -----------------------------------------------------------------------


def _modules(device: str) -> dict[str, nn.Module]:
    found = {
        "memory": uk.FeatureMemory(IDENTITIES, D),
        "epl": uk.EPLLoss(D, IDENTITIES, start_epoch=0),
        "vpl": uk.VPLLoss(D, IDENTITIES, start_iteration=0),
    }
    return {name: module.to(device) for name, module in found.items()}


@each_device
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["memory", "epl", "vpl"])
def test_features_are_not_replaced_by_what_is_not_finite(
    device: str, bad: float, name: str
) -> None:
    module = _modules(device)[name]
    module.update(*_batch(0, device))
    before = copy.deepcopy(module.state_dict())
    module.update(*_batch(1, device, bad))
    _same(module, before)
    if name != "memory":
        assert bool(module(*_batch(1, device, bad)).isnan())
        for key in ("prototypes", "features", "stamps"):
            if key in before:
                assert torch.equal(module.state_dict()[key], before[key])
        assert bool(module(*_batch(2, device)).isfinite())
    module.update(*_batch(2, device))
    assert all(bool(t.isfinite().all()) for t in module.state_dict().values())
    changed = ("features", "prototypes")
    assert any(
        not torch.equal(t, before[key]) for key, t in module.state_dict().items() if key in changed
    )


def test_a_half_precision_batch_beyond_its_range_is_not_stored() -> None:
    memory = uk.FeatureMemory(IDENTITIES, D)
    feats, labels = _batch(0)
    memory.update((feats * 1e6).half(), labels)
    assert bool((memory.labels == -1).all())
    memory.update(feats.double() * 1e300, labels)
    assert bool((memory.labels == -1).all())


@pytest.mark.parametrize("name", ["epl", "vpl"])
def test_state_of_shards(name: str) -> None:
    options = {"epl": {"start_epoch": 0}, "vpl": {"start_iteration": 0}}[name]
    head = uk.PartialFC(name, D, IDENTITIES, **options)
    head(*_batch(0))
    before = {key: t.clone() for key, t in head.state_dict().items() if torch.is_tensor(t)}
    assert bool(head(*_batch(1, bad=math.nan)).isnan())
    for key, tensor in head.state_dict().items():
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            assert torch.equal(tensor, before[key]), key
    assert bool(head(*_batch(2)).isfinite())


@each_device
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
@pytest.mark.parametrize("batches", [0, 1, 4], ids=["empty", "some", "full"])
def test_a_cross_batch_memory_holds_what_is_finite(
    device: str, bad: float, loss: type, batches: int
) -> None:
    memory = CrossBatchMemory(loss(), D, memory_size=20).to(device)
    for seed in range(batches):
        memory(*_batch(seed, device))
    held = {tuple(row) for row in memory.embedding_memory.tolist()}
    assert bool(memory(*_batch(8, device, bad)).isnan())
    assert bool(memory.embedding_memory.isfinite().all())
    assert {tuple(row) for row in memory.embedding_memory.tolist()} <= held
    feats, labels = _batch(9, device)
    mask = torch.arange(9, device=device) < 4
    assert bool(memory(feats, labels, enqueue_mask=mask).isfinite())
    feats, labels = _batch(10, device, bad)
    queued = torch.zeros(9, dtype=torch.bool, device=device)
    queued[4] = True
    assert bool(memory(feats, labels, enqueue_mask=queued).isnan())
    assert bool(memory.embedding_memory.isfinite().all())


@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
@pytest.mark.parametrize("labels", ["distinct", "one", "mixed"])
@pytest.mark.parametrize("bad", BAD)
def test_adapters_show_what_is_not_finite(loss: type, labels: str, bad: float) -> None:
    feats, mixed = _batch(0, bad=bad)
    kinds = {"distinct": torch.arange(9), "one": torch.zeros(9, dtype=torch.int64), "mixed": mixed}
    feats.requires_grad_()
    value = loss()(feats, kinds[labels])
    assert bool(value.isnan())


# --- processes ------------------------------------------------------------------------------------


def _on_ranks(rank: int) -> list[Tensor]:
    """The second rank's first batch is not finite."""
    uss, memory = uk.USSLoss(), uk.FeatureMemory(IDENTITIES, D)
    found = []
    for step in range(2):
        batch = _batch(10 * step + rank, bad=math.nan if (step, rank) == (0, 1) else None)
        uss(*batch)
        memory.update(*batch)
        found += [uss.threshold.detach().clone(), uss.initialized.clone(), memory.labels.clone()]
        found.append(memory.features.clone())
    return found


def test_ranks_agree_on_a_batch_that_is_not_finite() -> None:
    first, second = run_ranks(2, _on_ranks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    threshold, initialized, labels, _ = first[:4]
    assert (float(threshold), bool(initialized)) == (0.0, False)
    assert bool((labels == -1).all())
    threshold, initialized, labels, features = first[4:]
    assert bool(initialized)
    assert bool(threshold.isfinite())
    assert bool((labels >= 0).all())
    assert bool(features.isfinite().all())


# --- training -------------------------------------------------------------------------------------


def test_a_skipped_step_leaves_no_trace(tmp_path: Path) -> None:
    """Gradients overflow while features are finite: neither memory nor average moves."""
    faces = write_faces(tmp_path / "faces")
    options = {"amp": "fp16", "ema": 0.5, "max_steps": 1}
    pair = {"pair": "uss", "memory": True}
    trainer = trainer_of(tiny(faces, tmp_path / "run", train=options, loss=pair))
    assert trainer.memory is not None
    assert trainer.ema is not None
    weights = {k: v.clone() for k, v in trainer.backbone.named_parameters()}
    averaged = {k: v.clone() for k, v in trainer.ema.module.state_dict().items()}
    hook = trainer.backbone.fc.weight.register_hook(lambda g: g * math.inf)
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.fit(tmp_path / "run")
    hook.remove()
    for name, parameter in trainer.backbone.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert bool((trainer.memory.labels == -1).all())
    assert int(trainer.ema.n_averaged) == 0
    _same(trainer.ema.module, averaged)
