"""VPL over shards: what it compares with is mixed tile by tile, while its memory moves on."""

from __future__ import annotations

import copy

import pytest
import torch
from support.partial_fc import COUNTS, SIZE, batch, of_another_backbone, own_part
from support.ranks import run_ranks

import unitsface_kernels as uk
from unitsface_kernels.distributed.collectives import world_size

OPTIONS = {"start_iteration": 0, "mix": 0.4, "scale": 16.0}


def test_a_backward_pass_sees_the_memory_of_its_forward_pass():
    """Two forward passes, the second of which compares with what the first one stored."""
    head = uk.PartialFC("vpl", SIZE, 23, **OPTIONS)
    head(*batch(0, 23))
    dense = copy.deepcopy(head.loss)
    dense.head.backend = "reference"
    found = []
    for module in (head, dense):
        feats = [batch(step, 23)[0].requires_grad_() for step in (1, 2, 3)]
        labels = [batch(step, 23)[1] for step in (1, 2, 3)]
        losses = [module(x, y) for x, y in zip(feats, labels, strict=True)]
        weight = head.weight if module is head else dense.head.weight
        found.append((sum(losses), torch.autograd.grad(sum(losses), [*feats, weight])))
    (loss, gradients), (want, wanted) = found
    torch.testing.assert_close(loss, want)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fuse", ["backward", "step"])
def test_neither_class_weights_nor_the_memory_are_copied(fuse: str):
    classes, rows, size = 80_000, 64, 32
    head = uk.PartialFC("vpl", size, classes, **OPTIONS)
    optimizer = uk.SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
    head.fuse(optimizer, when=fuse)
    feats = torch.randn(rows, size, requires_grad=True)
    labels = torch.randint(classes, (rows,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            # Views, and what writes into a tensor that it is given, make none.
            results = [t for t in (result,) if isinstance(t, torch.Tensor) and not t.is_sparse]
            given = [t for t in args if isinstance(t, torch.Tensor) and not t.is_sparse]
            made = [t for t in results if t._base is None]
            if made and result.data_ptr() not in {t.data_ptr() for t in given}:
                largest = max(largest, result.nbytes)
            return result

    head(feats, labels).backward()
    optimizer.step()
    with Watch():
        head(feats, labels).backward()
        optimizer.step()
    # Stamps and shares are one number per class.
    assert largest <= 8 * classes
    assert largest < classes * size * 4 / 8


@pytest.mark.parametrize("rate", [1.0, pytest.param(0.3, marks=pytest.mark.extended)])
@pytest.mark.parametrize("fuse", [None, pytest.param("step", marks=pytest.mark.extended)])
def test_backends_train_vpl_alike(fuse: str | None, rate: float):
    found = []
    for backend in ("native", "triton"):
        head = uk.PartialFC("vpl", SIZE, 50, rate, backend=backend, **OPTIONS)
        optimizer = uk.SampledSGD(head.parameters(), lr=0.02, momentum=0.9)
        if fuse:
            head.fuse(optimizer, when=fuse)
        gradients = []
        for step in range(3):
            feats, labels = batch(step, 50)
            optimizer.zero_grad()
            head(feats.requires_grad_(), labels).backward()
            optimizer.step()
            gradients.append(feats.grad)
        found.append((torch.stack(gradients), head.weight.detach()))
    for a, b in zip(*found, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-4 * torch.linalg.vector_norm(a)


def test_autocast_mixes_in_float32():
    head = uk.PartialFC("vpl", SIZE, 23, **OPTIONS)
    head(*batch(0, 23))
    values = []
    for enabled in (True, False):
        one = copy.deepcopy(head)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(one(*batch(1, 23)))
    assert values[0] != values[1]
    assert torch.isclose(*values, rtol=0.05)


def _mistakes_of(rank: int) -> list[str]:
    counts = COUNTS[world_size()]
    images, labels = (own_part(t, rank, counts) for t in batch(0, 23))
    found = []
    for loss, kept in (
        ("cosface", images),
        ("vpl", images[:, :-1]),
        ("vpl", images if rank else None),
    ):
        head = uk.PartialFC(loss, SIZE, 23)
        try:
            head(images, labels, momentum_feats=kept)
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.extended
def test_mistakes_in_momentum_features_are_errors_on_all_ranks():
    first, second = run_ranks(2, _mistakes_of)
    assert "momentum_feats must be None, since CosFaceLoss stores no features, got" in first[0]
    assert "momentum_feats must have D = 16 columns" in first[1]
    assert (
        "momentum_feats must be the same on every rank of the group, got None on rank" in first[2]
    )
    assert len(first) == len(second) == 3


@pytest.mark.parametrize(
    ("loss", "width", "message"),
    [
        ("cosface", SIZE, "momentum_feats must be None, since CosFaceLoss stores no features, got"),
        ("vpl", SIZE - 1, "momentum_feats must have D = 16 columns"),
    ],
)
def test_mistakes_in_momentum_features(loss: str, width: int, message: str):
    feats, labels = batch(0, 23)
    with pytest.raises(ValueError, match=message):
        uk.PartialFC(loss, SIZE, 23)(feats, labels, momentum_feats=feats[:, :width])


def test_momentum_features_are_stored_in_place_of_those_that_are_compared():
    head, other = (uk.PartialFC("vpl", SIZE, 23, **OPTIONS) for _ in range(2))
    feats, labels = batch(0, 23)
    kept = of_another_backbone(feats)
    loss = head(feats, labels, momentum_feats=kept)
    assert torch.equal(loss, other(feats, labels))
    other.loss.end_step(kept, labels)
    assert torch.equal(head.loss.features, other.loss.features)
    head.eval()
    before = head.loss.features.clone()
    head(feats, labels, momentum_feats=feats)
    assert torch.equal(head.loss.features, before)
