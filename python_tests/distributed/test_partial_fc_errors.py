"""Errors of PartialFC, on every rank."""

from __future__ import annotations

import pytest
import torch
from support.partial_fc import SIZE, batch
from support.ranks import run_ranks

import unitsface_kernels as uk


def _raised(action) -> str:
    try:
        action()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _mistakes(rank: int) -> list[str]:
    head = uk.PartialFC("cosface", SIZE, 23)
    feats, labels = batch(0, 23)
    wrong = labels.clone()
    if rank == 1:
        wrong[2] = 23
    calls = [
        lambda: head(feats, wrong),
        lambda: head(feats if rank else feats[:, :5], labels),
        lambda: head(feats, labels if rank else labels.float()),
        lambda: head(feats if rank else feats.half(), labels),
        lambda: uk.PartialFC("cosface", SIZE, 23 + rank)(feats, labels),
        lambda: uk.PartialFC("cosface", SIZE, 23, seed=rank)(feats, labels),
        lambda: uk.PartialFC("cosface", SIZE, 23, scale=60.0 + rank)(feats, labels),
        lambda: uk.PartialFC("cosface", SIZE, 23, 0.5 + rank / 4)(feats, labels),
        lambda: (head if rank else head.eval())(feats, labels),
    ]
    found = [_raised(call) for call in calls]
    head.train()
    # After all of that the ranks still understand each other.
    return [*found, _raised(lambda: head(feats, labels))]


def test_mistakes_are_errors_on_every_rank():
    first, second = run_ranks(2, _mistakes)
    pairs = list(zip(first, second, strict=True))
    label = "labels must be in [-1, 23) (-1: ignored), got 23"
    assert pairs[0] == (f"ValueError: rank 1: {label}", f"ValueError: {label}")
    assert pairs[1][0].startswith("ValueError: feats must have D = 16 columns")
    assert pairs[1][1].startswith("ValueError: rank 0: feats must have D = 16 columns")
    assert pairs[2][0].startswith("TypeError: labels must have an integer dtype")
    assert pairs[2][1].startswith("ValueError: rank 0: labels must have an integer dtype")
    differing = {
        "dtype of feats": "torch.float16 on rank 0, torch.float32 on rank 1",
        "num_classes": "23 on rank 0, 24 on rank 1",
        "seed": "0 on rank 0, 1 on rank 1",
        "options": "[('scale', 60.0)] on rank 0, [('scale', 61.0)] on rank 1",
        "sample_rate": "0.5 on rank 0, 0.75 on rank 1",
        "training": "False on rank 0, True on rank 1",
    }
    for pair, (name, values) in zip(pairs[3:9], differing.items(), strict=True):
        message = f"ValueError: {name} must be the same on every rank of the group, got {values}"
        assert pair == (message, message)
    assert pairs[9] == ("nothing", "nothing")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("softmax", 8, 8), {}, "loss must be one of .*arcface, .*, got 'softmax'"),
        (("cosface", 0, 8), {}, "embedding_size must be >= 1"),
        (("cosface", 8, 0), {}, "num_classes must be >= 1"),
        (("cosface", 8, 8, 0.0), {}, "sample_rate must be > 0"),
        (("cosface", 8, 8, 1.5), {}, "sample_rate must be <= 1"),
        (("cosface", 8, 8, float("nan")), {}, "sample_rate must be finite"),
        (("cosface", 8, 8), {"seed": -1}, "seed must be >= 0"),
        (("cosface", 8, 8), {"scale": -1.0}, "scale must be > 0"),
        (("cosface", 8, 8), {"backend": "reference"}, "backend must be 'native' or 'triton'"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        uk.PartialFC(*arguments, **options)


def test_the_reference_backend_is_refused_however_it_is_chosen(monkeypatch):
    head = uk.PartialFC("cosface", 8, 10)
    with pytest.raises(ValueError, match="'native' or 'triton'"):
        head(torch.randn(4, 8, dtype=torch.float64), torch.arange(4))
    monkeypatch.setenv("UNITSFACE_BACKEND", "reference")
    with pytest.raises(ValueError, match="'native' or 'triton'"):
        head(torch.randn(4, 8), torch.arange(4))


def test_a_saved_shard_is_loaded_by_its_like_alone():
    saved = uk.PartialFC("cosface", 8, 10, seed=1)
    saved(torch.randn(4, 8), torch.arange(4))
    same = uk.PartialFC("cosface", 8, 10, seed=1)
    same.load_state_dict(saved.state_dict())
    assert same.step == 1
    assert torch.equal(same.weight, saved.weight)
    for other, what in (
        (uk.PartialFC("cosface", 8, 11, seed=1), "num_classes = 10, this one has 11"),
        (uk.PartialFC("cosface", 9, 10, seed=1), "embedding_size = 8, this one has 9"),
        (uk.PartialFC("arcface", 8, 10, seed=1), "loss = cosface, this one has arcface"),
        (uk.PartialFC("cosface", 8, 10, seed=2), "seed = 1, this one has 2"),
    ):
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(saved.state_dict())


def test_fused_optimizers_refuse_what_they_cannot_do():
    head = uk.PartialFC("cosface", SIZE, 23)
    with pytest.raises(TypeError, match="SampledSGD or SampledAdamW"):
        head.fuse(torch.optim.SGD(head.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="when must be"):
        head.fuse(uk.SampledSGD(head.parameters(), lr=0.1), when="later")
    stranger = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="optimi"):
        head.fuse(uk.SampledSGD([stranger], lr=0.1))
    head.fuse(uk.SampledSGD(head.parameters(), lr=0.1), when="step")
    feats, labels = batch(0, 23)
    head(feats, labels).backward()
    with pytest.raises(RuntimeError, match="one backward pass per step"):
        head(feats, labels).backward()
