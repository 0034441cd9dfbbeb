"""Moving statistics of AdaFace, and the margins that ElasticFace draws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.row_margins import C, D, N, batch, cosines, of_targets
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor

import unitsface_kernels as uk

# -- state ----------------------------------------------------------


def test_statistics_of_adaface_are_the_published_ones() -> None:
    """head.py of mk-minchul/AdaFace, of the rows that are not ignored."""
    module = uk.AdaFaceLoss(D, C, t_alpha=0.3)
    mean, std = 20.0, 100.0
    for step in range(4):
        feats = torch.randn(N, D, generator=torch.Generator().manual_seed(step)) * 10 ** (step / 2)
        labels = torch.arange(N) % (C + 1) - 1
        safe = feats[labels >= 0].double().norm(dim=1).clip(0.001, 100)
        mean = 0.3 * float(safe.mean()) + 0.7 * mean
        std = 0.3 * float(safe.std()) + 0.7 * std
        got = module(feats, labels)
        assert abs(float(module.batch_mean) - mean) < 1e-4 * mean
        assert abs(float(module.batch_std) - std) < 1e-4 * std
        # Those of the batch itself are part of them.
        want = uk.fused_adaface_loss(feats, module.weight, labels, mean, std)
        check_same("loss", got, want, SAME_LOSS)


def test_what_is_no_training_step_leaves_statistics_and_draws_alone() -> None:
    feats, _, labels = batch()
    elastic = [uk.ElasticFaceLoss(D, C, assignment=name) for name in ("random", "sorted")]
    for module in (uk.AdaFaceLoss(D, C), *elastic):
        before = copy.deepcopy(dict(module.named_buffers()))
        with torch.no_grad():
            module(feats, labels)
        module.eval()(feats, labels)
        module.train()
        for wrong in (feats[:, :3], feats.to(torch.int64)):
            with pytest.raises((TypeError, ValueError)):
                module(wrong, labels)
        for places in (None, torch.arange(C - 1)):
            with pytest.raises(ValueError, match="labels"):
                module(feats, labels + C, places)
        for name, value in module.named_buffers():
            assert torch.equal(value, before[name]), name
        module(feats, labels)
        assert any(not torch.equal(v, before[n]) for n, v in module.named_buffers())


def test_statistics_are_not_moved_by_what_has_none() -> None:
    module = uk.AdaFaceLoss(D, C)
    feats, _, labels = batch()
    spoiled = feats.detach().clone()
    spoiled[1, 0] = math.inf
    assert not bool(module(spoiled, labels).isfinite())
    assert (float(module.batch_mean), float(module.batch_std)) == (20.0, 100.0)
    spoiled[1] = feats[1].detach()
    spoiled[4] = math.nan  # of an ignored row
    module(spoiled, labels)
    moved = float(module.batch_mean)
    assert moved != 20.0
    std = float(module.batch_std)
    module(feats[:1], labels[:1])
    assert float(module.batch_mean) != moved
    assert float(module.batch_std) == std
    module(feats[4:5], labels[4:5])
    module(feats[:0], labels[:0])
    assert math.isfinite(float(module.batch_mean))


def test_given_margins_count_in_a_sharded_step() -> None:
    feats, _, labels = batch()
    head = uk.PartialFC("elasticface", D, C)
    margin = torch.linspace(0.1, 0.9, N)
    want = uk.fused_elasticface_loss(feats, head.weight, labels, margin)
    for _ in range(2):
        check_same("loss", head(feats, labels, margin=margin), want, SAME_LOSS)
        head.eval()


@pytest.mark.parametrize("name", ["adaface", "elasticface", "curricularface", "adacos"])
def test_initial_values_include_state(name: str) -> None:
    """The module is created on the meta device."""
    with torch.device("meta"):
        module = uk.CLASS_LOSSES[name](D, C)
    module.to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.fill_(7)
    module.reset_parameters()
    for key, value in uk.CLASS_LOSSES[name](D, C).named_buffers():
        assert torch.equal(module.get_buffer(key), value), key


def test_statistics_are_resumed() -> None:
    feats, _, labels = batch()
    for name in ("adaface", "elasticface"):
        module, other = (uk.CLASS_LOSSES[name](D, C) for _ in range(2))
        module(feats, labels)
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(feats, labels), other(feats, labels))
        assert module.state_dict().keys() >= dict(module.named_buffers()).keys()


# -- drawn margins ----------------------------------------------------------


def _drawn(module: uk.ElasticFaceLoss, labels: Tensor, cosine: Tensor | None = None) -> Tensor:
    return module._margins(labels, cosine, 0)


def test_drawn_margins_are_normal_and_repeatable() -> None:
    labels = torch.zeros(20_000, dtype=torch.int64)
    module = uk.ElasticFaceLoss(D, C, std=0.05, margin_seed=3)
    first = _drawn(module, labels)
    assert abs(float(first.mean()) - 0.5) < 0.002
    assert abs(float(first.std()) - 0.05) < 0.001
    # Normal: shares within one and two deviations.
    within = [(first - 0.5).abs().lt(0.05 * k).double().mean().item() for k in (1, 2)]
    assert abs(within[0] - 0.6827) < 0.01
    assert abs(within[1] - 0.9545) < 0.005
    assert torch.equal(_drawn(module, labels), first)
    module.draws.add_(1)
    again = _drawn(module, labels)
    other = _drawn(uk.ElasticFaceLoss(D, C, std=0.05, margin_seed=4), labels)
    for values in (again, other):
        both = torch.corrcoef(torch.stack([first, values]))[0, 1]
        assert abs(float(both)) < 0.03
    neighbors = torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1]
    assert abs(float(neighbors)) < 0.03


def test_margins_are_assigned_as_published() -> None:
    """utils/losses.py of fdbtrs/ElasticFace with plus=True, and as its paper describes it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, C, (N,), generator=generator)
    cosine = torch.rand(N, generator=generator)
    labels[[2, 9]] = -1
    index = torch.where(labels != -1)[0]
    modules = {
        name: uk.ElasticFaceLoss(D, C, assignment=name)
        for name in ("random", "sorted", "published")
    }
    margin = _drawn(modules["random"], labels)[index].sort().values
    _, order = torch.sort(cosine[index], descending=True)
    assert torch.equal(_drawn(modules["published"], labels, cosine)[index], margin[order])
    ranked = _drawn(modules["sorted"], labels, cosine)[index]
    assert torch.equal(ranked[order], margin)


@pytest.mark.parametrize("assignment", ["random", "sorted", "published"])
def test_a_step_of_elasticface_has_its_margins(assignment: str) -> None:
    feats, weight, labels = batch()
    module = uk.ElasticFaceLoss(D, C, assignment=assignment, kind="cos", scale=16.0)
    module.weight.data.copy_(weight.data)
    own = of_targets(cosines(feats, weight), labels).detach()
    margin = module._margins(labels, None if assignment == "random" else own, 0)
    got = module(feats, labels)
    want = uk.fused_elasticface_loss(feats, weight, labels, margin, kind="cos", scale=16.0)
    check_same("loss", got, want, SAME_LOSS)
    index = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1, 0])
    module.draws.zero_()
    places = torch.where(labels < 0, labels, 8 - labels)
    check_same("subset", module(feats, places, index), want, SAME_LOSS)
    module.eval()
    want = uk.fused_margin_softmax_loss(feats, weight, labels, scale=16.0, m3=0.35)
    check_same("evaluation", module(feats, labels), want, SAME_LOSS)
