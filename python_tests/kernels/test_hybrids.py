"""Losses composed of others (EPL, UNPG, VPL) against their formulas, written out over matrices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from support.helpers import TARGETS, Target
from support.rounding import spreads
from support.tolerances import SAME_LOSS, check_all
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels import EPLLoss, UNPGLoss, VPLLoss

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
C, D = 6, 8


def _batch(target: Target, seed: int = 0, rows: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(rows, D, generator=generator) + 0.3
    labels = torch.randint(0, C, (rows,), generator=generator)
    labels[3] = -1
    return feats.to(target.device).requires_grad_(), labels.to(target.device)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def _softmax_loss(
    cosine: Tensor, labels: Tensor, scale: float, margin: float, angular: bool = False
) -> Tensor:
    """(N,) margin softmax over a matrix of cosines."""
    place = torch.arange(len(labels)), labels
    target = cosine[place]
    target = torch.cos(torch.acos(target) + margin) if angular else target - margin
    return F.cross_entropy(scale * cosine.index_put(place, target), labels, reduction="none")


Formula = Callable[[torch.nn.Module, Tensor], Tensor]


def _evaluated(module: torch.nn.Module, loss: Tensor, feats: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, [feats, *module.parameters()])
    return {"loss": loss.detach()} | {f"gradient {k}": g for k, g in enumerate(gradients)}


def _compare(module: torch.nn.Module, got: Tensor, formula: Formula, feats: Tensor) -> Tensor:
    """``got`` against ``formula(module, feats)``, which is returned; in float64, by the rule."""
    exact, x = copy.deepcopy(module).double(), feats.detach().double().requires_grad_()
    for part in exact.modules():
        if hasattr(part, "backend"):
            part.backend = "reference"
    want = spreads(lambda: _evaluated(exact, formula(exact, x), x))
    check_all(_evaluated(module, got, feats), want)
    return want["loss"].want


# --- UNPG -----------------------------------------------------------------------------------------


def _unpg(module: UNPGLoss, feats: Tensor, labels: Tensor, angular: bool) -> Tensor:
    counted = labels >= 0
    x, y = _unit(feats)[counted], labels[counted]
    cosine = x @ _unit(module.head.weight).T
    first, second = torch.triu_indices(len(x), len(x), 1)
    pairs = (x @ x.T)[first, second][y[first] != y[second]]
    if module.whisker is not None and len(pairs):
        ascending = pairs.detach().sort().values
        low, high = ascending[len(pairs) // 4], ascending[3 * len(pairs) // 4]
        reach = module.whisker * (high - low)
        pairs = pairs[(pairs >= low - reach - 1e-6) & (pairs <= high + reach + 1e-6)]
    place = torch.arange(len(y)), y
    margin = module.head.m2 if angular else module.head.m3
    target = cosine[place]
    target = torch.cos(torch.acos(target) + margin) if angular else target - margin
    logits = cosine.index_put(place, target)
    logits = torch.cat([logits, pairs.expand(len(y), -1)], dim=1)
    return F.cross_entropy(module.scale * logits, y)


@each_target
@pytest.mark.parametrize("base", ["cosface", "arcface"])
@pytest.mark.parametrize("whisker", [None, 0.0, 1.5])
def test_unpg_is_its_formula(target: Target, base: str, whisker: float | None) -> None:
    torch.manual_seed(1)
    options = {"base": base, "whisker": whisker, "scale": 16.0, "margin": 0.3}
    module = UNPGLoss(D, C, **options, backend=target.backend).to(target.device)
    feats, labels = _batch(target)
    want = _compare(
        *(module, module(feats, labels)),
        *(lambda m, x: _unpg(m, x, labels, base == "arcface"), feats),
    )
    # The filter and the pairs matter here.
    without = copy.deepcopy(module)
    without.whisker = 1.5 if whisker == 0.0 else 0.0
    assert float((without(feats, labels) - want).detach().abs()) > 1e3 * SAME_LOSS
    assert float((module.head(feats, labels).sum() / 10 - want).detach().abs()) > 1e3 * SAME_LOSS


@each_target
def test_unpg_without_negative_pairs_is_its_head(target: Target) -> None:
    module = UNPGLoss(D, C, scale=16.0, backend=target.backend).to(target.device)
    feats, labels = _batch(target)
    for identity in (torch.where(labels >= 0, 2, -1), torch.full_like(labels, -1)):
        count = max(1, int((identity >= 0).sum()))

        def formula(m: UNPGLoss, x: Tensor, labels: Tensor = identity, count: int = count):
            return m.head(x, labels).sum() / count

        _compare(module, module(feats, identity), formula, feats)
    empty = module(feats[:0], labels[:0])
    assert float(empty.detach()) == 0.0
    assert not bool(torch.autograd.grad(empty, feats)[0].any())


@each_target
def test_unpg_keeps_the_pairs_of_features_that_half_precision_cannot_tell_apart(
    target: Target,
) -> None:
    feats = torch.linspace(-1.0, 1.3, D).expand(12, D).to(target.device, torch.bfloat16)
    labels = torch.arange(12, device=target.device) % 4
    module = UNPGLoss(D, C, scale=16.0, backend=target.backend).to(target.device)
    every = copy.deepcopy(module)
    every.whisker = None
    assert float(module(feats, labels).detach()) == float(every(feats, labels).detach())


@each_target
def test_unpg_does_not_hide_what_is_not_a_number(target: Target) -> None:
    module = UNPGLoss(D, C, scale=16.0, backend=target.backend).to(target.device)
    feats, labels = _batch(target)
    broken = feats.detach().clone()
    broken[5, 2] = math.nan
    assert math.isnan(float(module(broken, labels).detach()))
    # Row 3 is ignored: the quartiles are those of the others.
    broken = feats.detach().clone()
    broken[3] = math.nan
    assert float(module(broken, labels).detach()) == float(module(feats, labels).detach())


# --- EPL ------------------------------------------------------------------------------------------


def _moved(prototypes: Tensor, feats: Tensor, labels: Tensor) -> Tensor:
    prototypes = prototypes.clone()
    for i, label in enumerate(labels.tolist()):
        if label < 0 or label in labels[i + 1 :].tolist():
            continue
        old, new = prototypes[label], _unit(feats.detach())[i]
        share = F.softsign(old @ new)
        prototypes[label] = F.normalize(share * old + (1 - share) * new, dim=0)
    return prototypes


@each_target
@pytest.mark.parametrize("base", ["cosface", "arcface", "arcface-exact", "uce"])
def test_epl_is_its_formula(target: Target, base: str) -> None:
    """The prototypes' target shrinks first and then has the margin, published without gradient."""
    torch.manual_seed(1)
    base, exact = base.removesuffix("-exact"), base.endswith("-exact")
    options = {"base": base, "scale": 16.0, "margin": 0.3, "k": 0.6, "start_epoch": 2}
    if exact:
        options["margin_gradient"] = "exact"
    module = EPLLoss(D, C, **options, backend=target.backend).to(target.device)
    feats, labels = _batch(target)
    counted = labels >= 0
    y = labels[counted]
    place = torch.arange(len(y)), y

    def formula(m: EPLLoss, x: Tensor) -> Tensor:
        want = m.head(x, labels)
        if m._epoch < 2:
            return want
        cosine = _unit(x)[counted] @ _moved(before, x, labels).T
        shifted = cosine.index_put(place, cosine[place] - 0.6 * cosine[place].detach())
        if base == "uce":
            b = m.head.threshold
            terms = F.softplus(16.0 * cosine - b)
            target_term = F.softplus(b - 16.0 * (shifted[place] - 0.3))
            block = terms.index_put(place, target_term).sum(dim=1)
        elif base == "cosface":
            block = _softmax_loss(shifted, y, 16.0, 0.0)
        else:
            angular = torch.cos(torch.acos(shifted[place]) + 0.3)
            if not exact:
                angular = shifted[place] + (angular - shifted[place]).detach()
            logits = 16.0 * cosine.index_put(place, angular)
            block = F.cross_entropy(logits, y, reduction="none")
        return (want + block.mean()) / 2

    for epoch in (0, 1, 2, 5):
        module.set_epoch(epoch)
        prototypes = _moved(module.prototypes, feats, labels)
        before = module.prototypes.double()
        got = module(feats, labels)
        torch.testing.assert_close(module.prototypes, prototypes)
        _compare(module, got, formula, feats)
    module.eval()
    before = module.prototypes.clone()
    module(feats, labels)
    assert torch.equal(module.prototypes, before)


def test_composed_losses_have_the_options_of_their_heads() -> None:
    """EPL's margin is published as 0.4 over every head, and as a constant; UNPG's and VPL's not."""
    for make, gradient in ((EPLLoss, "detached"), (UNPGLoss, "exact"), (VPLLoss, "exact")):
        assert make(D, C, base="arcface").head.margin_gradient == gradient
        head = make(D, C, margin_gradient="exact", init_std=3.0, skip_tolerance=1e-4).head
        assert (head.margin_gradient, head.skip_tolerance) == ("exact", 1e-4)
        assert 1.5 < float(head.weight.detach().std()) < 6.0
    heads = [EPLLoss(D, C, base=base).head for base in ("cosface", "arcface", "uce")]
    assert [heads[0].m3, heads[1].m2, heads[2].margin] == [0.4] * 3


def test_epl_goes_on_where_it_was_saved() -> None:
    module = EPLLoss(D, C, start_epoch=1)
    target = Target("reference", "cpu")
    module.set_epoch(1)
    module(*_batch(target))
    other = EPLLoss(D, C, start_epoch=1)
    other.load_state_dict(module.state_dict())
    for _ in range(2):
        assert torch.equal(other(*_batch(target, 4)), module(*_batch(target, 4)))
        other = copy.deepcopy(module)


# --- VPL ------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("base", ["cosface", "arcface"])
def test_vpl_is_its_formula(target: Target, base: str) -> None:
    torch.manual_seed(1)
    options = {"base": base, "scale": 16.0, "margin": 0.3, "mix": 0.4}
    options |= {"max_age": 2, "start_iteration": 2}
    module = VPLLoss(D, C, **options, backend=target.backend).to(target.device)
    plain = []
    newest: dict[int, tuple[int, Tensor]] = {}
    for step in range(1, 7):
        feats, labels = _batch(target, seed=step, rows=5)

        def formula(m: VPLLoss, x: Tensor, labels: Tensor = labels, step: int = step) -> Tensor:
            weight = _unit(m.head.weight)
            for label, (stamp, feature) in newest.items():
                if step > 2 and step - stamp <= 2:
                    mixed = 0.6 * weight[label] + 0.4 * _unit(feature)[0]
                    place = (torch.tensor(label, device=weight.device),)
                    weight = weight.index_put(place, mixed)
            cosine = _unit(x)[labels >= 0] @ _unit(weight).T
            margins = 16.0, 0.3, base == "arcface"
            return _softmax_loss(cosine, labels[labels >= 0], *margins).mean()

        want = _compare(module, module(feats, labels), formula, feats)
        plain.append(float((module.head(feats, labels) - want).detach().abs()))
        for i, label in enumerate(labels.tolist()):
            if label >= 0:
                newest[label] = step, feats.detach()[i : i + 1].double()
    assert max(plain[:2]) < 1e-4
    assert min(plain[2:]) > 1e-2
    module.eval()
    feats, labels = _batch(target)
    assert torch.equal(module(feats, labels), module.head(feats, labels))
    assert int(module.iteration) == 6


def test_vpl_goes_on_where_it_was_saved() -> None:
    module = VPLLoss(D, C, start_iteration=0, mix=0.5)
    target = Target("reference", "cpu")
    for seed in range(2):
        module(*_batch(target, seed))
    other = VPLLoss(D, C, start_iteration=0, mix=0.5)
    other.load_state_dict(module.state_dict())
    for step in range(2, 4):
        assert torch.equal(other(*_batch(target, step)), module(*_batch(target, step)))
        other = copy.deepcopy(module)


@pytest.mark.parametrize("momentum", [False, True])
def test_vpl_does_not_count_a_call_that_raises(momentum: bool) -> None:
    module = VPLLoss(D, C, start_iteration=0)
    feats, labels = _batch(Target("reference", "cpu"))
    module(feats, labels)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="momentum_feats" if momentum else "labels"):
        module(feats, labels if momentum else labels[1:], feats[1:] if momentum else None)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    module(feats, labels)
    assert int(module.iteration) == 2


@pytest.mark.parametrize(
    ("make", "error", "part"),
    [
        (
            lambda: EPLLoss(D, C, base="npt"),
            ValueError,
            "base must be one of cosface, arcface, uce",
        ),
        (lambda: EPLLoss(D, C, k=-1.0), ValueError, "k must be >= 0"),
        (lambda: EPLLoss(D, C, activation="relu"), ValueError, "activation must be one of"),
        (lambda: UNPGLoss(D, C, whisker=-0.1), ValueError, "whisker must be >= 0"),
        (lambda: UNPGLoss(D, C, reduction="max"), ValueError, "reduction must be one of"),
        (lambda: VPLLoss(D, C, mix=1.1), ValueError, "mix must be <= 1"),
        (lambda: VPLLoss(D, C, max_age="1"), TypeError, "max_age must be a float"),
    ],
)
def test_mistakes(make, error: type, part: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert part in str(raised.value)
