"""Options of EPL and VPL against their published code, written anew in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels import EPLLoss, VPLLoss

C, D, N = 7, 10, 5
S, M, K = 16.0, 0.3, 0.7


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    """Each class once: of several samples of one the published codes keep any."""
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(N, D, generator=generator, dtype=torch.float64) + 0.3
    return feats, torch.randperm(C, generator=generator)[:N]


def _same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def _same_with_gradients(
    module: torch.nn.Module, got: Tensor, want: Tensor, feats: Tensor, other: Tensor
) -> None:
    """Losses of ``module`` and of a formula, with gradients of features and parameters."""
    _same(got.detach(), want.detach())
    parameters = list(module.parameters())
    ours = torch.autograd.grad(got, [feats, *parameters])
    theirs = torch.autograd.grad(want, [other, *parameters])
    for a, b in zip(ours, theirs, strict=True):
        _same(a, b)


# --- EPL: head_EPL.py of WakingHours-GitHub/EPL ---------------------------------------------------


def _moved(queue: Tensor, x: Tensor, labels: Tensor, criterion: str) -> Tensor:
    """``update_virtual_prototype``."""
    queue, unit = queue.clone(), F.normalize(x.detach(), dim=1)
    similarity = (queue[labels] * unit).sum(dim=1, keepdim=True)
    factor: Tensor | float = 0.0
    if criterion == "softsign":
        factor = similarity / (1.0 + similarity.abs())
    elif criterion == "sigmoid":
        factor = 1.0 / (1.0 + torch.exp(1.0 - similarity))
    queue[labels] = F.normalize(factor * queue[labels] + (1.0 - factor) * unit, dim=1)
    return queue


def _both(
    x: Tensor, weight: Tensor, queue: Tensor, labels: Tensor, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(2N, C) cosines with class weights and with prototypes, whose targets shrink, and one-hot
    labels of either."""
    unit, places = F.normalize(x, dim=1), torch.arange(len(x))
    on_weights = unit @ F.normalize(weight, dim=1).T
    on_queue = unit @ F.normalize(queue, dim=1).T
    shrunk = on_queue[places, labels]
    on_queue = on_queue.index_put((places, labels), shrunk - k * shrunk.detach())
    return on_weights, on_queue, F.one_hot(labels, C).to(x.dtype)


def _cosface_epl(x: Tensor, weight: Tensor, queue: Tensor, labels: Tensor) -> Tensor:
    """``CosFace_EPL.forward`` from the set epoch on, with its ``EPL`` criterion."""
    on_weights, on_queue, hot = _both(x, weight, queue, labels, K)
    logits = S * torch.cat([on_weights - M * hot, on_queue])
    hot = torch.cat([hot, hot])
    negatives = ((1.0 - hot) * logits.exp()).sum(dim=1)
    positives = (hot * (-logits).exp()).sum(dim=1)
    return torch.log(1.0 + negatives * positives).mean()


def _uniface_epl(
    x: Tensor, weight: Tensor, bias: Tensor, queue: Tensor, labels: Tensor, weight_of_others: float
) -> Tensor:
    """``Uniface_EPL.forward`` likewise."""
    on_weights, on_queue, hot = _both(x, weight, queue, labels, K)
    cosine, hot = torch.cat([on_weights, on_queue]), torch.cat([hot, hot])
    positive, negative = S * (cosine - M) - bias, S * cosine - bias
    # Inside the published clamp, which the module does not have.
    assert float((hot * positive).detach().abs().max()) < S
    assert float(((1.0 - hot) * negative).detach().abs().max()) < S
    terms = hot * torch.log(1.0 + torch.exp(-positive))
    terms = terms + weight_of_others * (1.0 - hot) * torch.log(1.0 + torch.exp(negative))
    return terms.sum(dim=1).mean()


@pytest.mark.parametrize("criterion", ["softsign", "sigmoid", "direct"])
def test_epl_moves_its_prototypes_as_published(criterion: str) -> None:
    torch.manual_seed(1)
    module = EPLLoss(D, C, scale=S, margin=M, start_epoch=0, activation=criterion).double()
    module.head.backend = "reference"
    queue = module.prototypes.clone()
    for seed in range(3):
        feats, labels = _batch(seed)
        feats, other = feats.requires_grad_(), feats.detach().clone().requires_grad_()
        queue = _moved(queue, other, labels, criterion)
        want = _cosface_epl(other, module.head.weight, queue, labels)
        got = module(feats, labels)
        _same(module.prototypes, queue)
        _same_with_gradients(module, got, want, feats, other)
    if criterion == "direct":
        _same(module.prototypes[labels], F.normalize(feats.detach(), dim=1))


@pytest.mark.parametrize("others", [1.0, 0.35, 1.7])
def test_epl_weighs_the_other_classes_of_uniface_by_l(others: float) -> None:
    torch.manual_seed(1)
    options = {"scale": S, "margin": M, "k": K, "start_epoch": 0, "negative_weight": others}
    module = EPLLoss(D, C, base="uce", **options).double()
    module.head.backend = "reference"
    feats, labels = _batch(2)
    feats, other = feats.requires_grad_(), feats.detach().clone().requires_grad_()
    queue = _moved(module.prototypes, other, labels, "softsign")
    head = module.head
    want = _uniface_epl(other, head.weight, head.threshold, queue, labels, others)
    _same_with_gradients(module, module(feats, labels), want, feats, other)


def test_a_learned_weight_of_the_other_classes() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.8))
    module = EPLLoss(D, C, "uce", negative_weight=weight, start_epoch=0, backend="reference")
    feats, labels = _batch(3)
    module(feats.float(), labels).backward()
    assert module.head.negative_weight is weight
    # The two blocks' terms of other classes, which are positive.
    assert float(weight.grad) > 0.0


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"negative_weight": 0.5}, ValueError, "negative_weight must be 1 over 'cosface', got 0.5"),
        (
            {"negative_weight": torch.tensor(1.0), "base": "arcface"},
            ValueError,
            "negative_weight must be 1 over 'arcface', got Tensor",
        ),
        ({"activation": "newest"}, ValueError, "one of softsign, sigmoid, direct"),
    ],
)
def test_mistakes_in_options(options: dict, error: type, part: str) -> None:
    with pytest.raises(error, match=part):
        EPLLoss(D, C, **options)


# --- VPL: recognition/vpl/vpl.py and losses.py of deepinsight/insightface -------------------------


def _published_step(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    queue: tuple[Tensor, Tensor],
    iters: int,
    base: str,
) -> Tensor:
    """The loss of ``VPL.forward_backward`` with mode 0."""
    features, queue_iters = queue
    past = iters - queue_iters
    share = 0.3 * ((past <= 3) & (iters > 3)).to(x.dtype)[:, None]
    injected = F.normalize(weight, dim=1) * (1.0 - share) + features * share
    cosine = F.normalize(x, dim=1) @ F.normalize(injected, dim=1).T
    places = torch.arange(len(x)), labels
    target = cosine[places]
    target = torch.cos(torch.acos(target) + M) if base == "arcface" else target - M
    logits = S * cosine.index_put(places, target)
    return -torch.log_softmax(logits, dim=1)[places].mean()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("base", ["arcface", "cosface"])
def test_vpl_is_the_published_step_with_and_without_momentum(base: str, momentum: bool) -> None:
    torch.manual_seed(1)
    options = {"scale": S, "margin": M, "mix": 0.3, "max_age": 3, "start_iteration": 3}
    module = VPLLoss(D, C, base=base, backend="reference", **options).double()
    # Never seen classes do not count as fresh once the iteration exceeds their age.
    queue = module.features.clone(), torch.zeros(C, dtype=torch.int64)
    mixed = 0.0
    for iters in range(1, 9):
        feats, labels = _batch(iters)
        kept = feats.flip(1) * 2.0 if momentum else None
        feats, other = feats.requires_grad_(), feats.detach().clone().requires_grad_()
        weight = module.head.weight
        want = _published_step(other, weight, labels, queue, iters, base)
        _same_with_gradients(module, module(feats, labels, kept), want, feats, other)
        stored = F.normalize(other.detach() if kept is None else kept, dim=1)
        queue[0][labels], queue[1][labels] = stored, iters
        _same(module.features, queue[0])
        mixed = max(mixed, abs(float((want - module.head(feats, labels)).detach())))
    assert mixed > 1e-3
    module.eval()
    feats, labels = _batch(9)
    assert torch.equal(module(feats, labels, feats), module.head(feats, labels))


@pytest.mark.parametrize(
    ("kept", "error", "part"),
    [
        (torch.zeros(N, D + 1), ValueError, "momentum_feats must have D = 10 columns"),
        (torch.zeros(N - 1, D), ValueError, "momentum_feats must have 5 rows like feats, got 4"),
        (torch.zeros(N, D, dtype=torch.int64), TypeError, "momentum_feats must have dtype"),
        ([0.0], TypeError, "momentum_feats must be a torch.Tensor, got list"),
    ],
)
def test_mistakes_in_momentum_features(kept: object, error: type, part: str) -> None:
    feats, labels = _batch(0)
    with pytest.raises(error, match=part):
        VPLLoss(D, C)(feats.float(), labels, kept)


def test_momentum_features_that_are_not_finite_are_not_stored() -> None:
    module = VPLLoss(D, C, start_iteration=0)
    feats, labels = _batch(0)
    before = module.features.clone()
    kept = feats.float()
    kept[1, 2] = math.nan
    assert bool(module(feats.float(), labels, kept).isfinite())
    assert torch.equal(module.features, before)
    assert not bool(module.stamps.any())
