"""CurricularFace, MV-Softmax, AdaCos and the filter of similar classes, against published code.

The formulas are written anew in float64 from the repositories that each test names.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import TARGETS
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor, nn

import unitsface_kernels as uk
from unitsface_kernels.losses import REGISTRY

N, C, D = 12, 30, 16
BACKENDS = sorted({t.backend for t in TARGETS if t.device == "cpu"} - {"triton"})
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _batch(seed: int = 0, spread: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Features near their classes, some of which are near each other: negatives of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(C, D, generator=generator, dtype=torch.float64)
    weight[C // 2 :] = weight[: C // 2] + 0.7 * weight[C // 2 :]
    labels = torch.randint(0, C, (N,), generator=generator)
    feats = weight[labels] + spread * torch.randn(N, D, generator=generator, dtype=torch.float64)
    feats[0] = -feats[0]  # beyond the angle at which margins change
    return feats, weight, labels


def _cosines(feats: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(feats) @ F.normalize(weight).T


def _check(found, want, feats: Tensor, weight: Tensor, backend: str) -> None:
    """Loss and gradients of ``found`` and of ``want``, functions of feats and weight."""
    dtype, bound = (torch.float64, 1e-10) if backend == "reference" else (torch.float32, 2e-4)
    results = []
    for function, kind in ((found, dtype), (want, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (feats, weight)]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= bound * expected.norm()


# --- CurricularFace: head/metrics.py of HuangYG123/CurricularFace ---------------------------------


def _published_curricularface(
    feats: Tensor, weight: Tensor, labels: Tensor, t: Tensor, s: float = 64.0, m: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Loss, and t after the batch, which the loss reads."""
    cosine = _cosines(feats, weight)
    target = cosine[torch.arange(len(labels)), labels][:, None]
    turned = target * math.cos(m) - (1 - target**2).sqrt() * math.sin(m)
    final = torch.where(target > math.cos(math.pi - m), turned, target - math.sin(math.pi - m) * m)
    t = 0.01 * target.mean().detach() + 0.99 * t
    hard = (cosine > turned).detach()
    logits = torch.where(hard, cosine * (t + cosine), cosine)
    logits = logits.scatter(1, labels[:, None], final)
    return F.cross_entropy(s * logits, labels), t


@each_backend
def test_curricularface_is_the_published_one(backend: str) -> None:
    feats, weight, labels = _batch()
    for t in (0.0, 0.4, -0.1):
        before = torch.tensor(t, dtype=torch.float64)
        _, after = _published_curricularface(feats, weight, labels, before)
        _check(
            lambda x, w: uk.fused_curricularface_loss(x, w, labels, t=after, backend=backend),  # noqa: B023
            lambda x, w: _published_curricularface(x, w, labels, before)[0],  # noqa: B023
            *(feats, weight, backend),
        )  # fmt: skip


def _module(name: str, backend: str, **options) -> nn.Module:
    _, weight, _ = _batch()
    module = uk.CLASS_LOSSES[name](D, C, backend=backend, **options)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def test_gradients_of_curricularface_in_float16_fill_the_format() -> None:
    """A bound for any t would scale them so low that most pairs have none."""
    spec = REGISTRY["curricularface"]
    params = spec.pack({"scale": 48.0, "margin": 0.5})
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    largest = 0.0
    for t in (-1.0, 0.0, 1.0):
        given = {"t": torch.tensor(t), "target_cosine": torch.tensor(-0.9)}
        values = tuple(given[variable.name].double() for variable in spec.variables)
        (slope,) = torch.autograd.grad(spec.negative(cosine, None, params, values).sum(), cosine)
        largest = max(largest, float(slope.abs().max()))
    assert largest <= spec.slope_bound(params) <= 2.0 * largest


@each_backend
def test_curricularface_follows_the_batches(backend: str) -> None:
    module = _module("curricularface", backend)
    t = torch.zeros((), dtype=torch.float64)
    for seed in range(3):
        feats, weight, labels = _batch(seed)
        weight = module.weight.detach().double()
        want, t = _published_curricularface(feats, weight, labels, t)
        ignored = torch.cat([labels, torch.tensor([-1])])
        loss = module(torch.cat([feats, feats[:1]]).float(), ignored)
        assert abs(loss.item() - want.item()) <= 1e-5 * want.item()
        assert abs(float(module.t) - float(t)) <= 1e-6
    assert set(module.state_dict()) == {"weight", "t"}


# --- MV-Softmax: fc_layers.py of xiaoboCASIA/SV-X-Softmax -----------------------------------------


def _published_mv_softmax(
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    kind: str,
    weighting: str,
    easy: bool,
    s: float = 32.0,
    m: float = 0.35,
    t: float = 0.2,
) -> Tensor:
    cosine = _cosines(feats, weight)
    target = cosine[torch.arange(len(labels)), labels][:, None]
    moved = target - m
    if kind == "arc":
        moved = target * math.cos(m) - (1 - target**2).sqrt() * math.sin(m)
    emphasized = cosine + t if weighting == "fixed" else (t + 1) * cosine + t
    logits = torch.where((cosine > moved).detach(), emphasized, cosine)
    final = torch.where(target > 0, moved, target) if easy else moved
    return F.cross_entropy(s * logits.scatter(1, labels[:, None], final), labels)


@each_backend
@pytest.mark.parametrize("weighting", ["adaptive", "fixed"])
@pytest.mark.parametrize("kind", ["am", "arc"])
def test_mv_softmax_is_the_published_one(kind: str, weighting: str, backend: str) -> None:
    feats, weight, labels = _batch()
    for margin_at in ("acute", "all"):
        options = {"margin_type": kind, "weighting": weighting, "margin_at": margin_at}
        _check(
            lambda x, w: uk.fused_mv_softmax_loss(x, w, labels, **options, backend=backend),  # noqa: B023
            lambda x, w: _published_mv_softmax(x, w, labels, kind, weighting, margin_at == "acute"),  # noqa: B023
            *(feats, weight, backend),
        )  # fmt: skip


def test_without_emphasis_mv_softmax_is_its_base() -> None:
    feats, weight, labels = (t.float() if t.is_floating_point() else t for t in _batch())
    got = uk.fused_mv_softmax_loss(feats, weight, labels, t=0.0, margin_at="all")
    want = uk.fused_margin_softmax_loss(feats, weight, labels, scale=32.0, m3=0.35)
    check_same("loss", got, want, SAME_LOSS)


# --- the filter: losses.py of recognition/arcface_torch in deepinsight/insightface ----------------


@each_backend
@pytest.mark.parametrize("limit", [0.0, 0.2, 0.5])
def test_the_filter_is_the_published_one(limit: float, backend: str) -> None:
    feats, weight, labels = _batch()

    def published(x: Tensor, w: Tensor) -> Tensor:
        cosine = _cosines(x, w)
        dirty = (cosine > limit) & (limit > 0)
        dirty = dirty.scatter(1, labels[:, None], False).detach()
        logits = (1.0 - dirty.to(cosine)) * cosine
        margin = 0.4 * F.one_hot(labels, C).to(cosine)
        return F.cross_entropy(64.0 * (logits - margin), labels)

    def fused(x: Tensor, w: Tensor) -> Tensor:
        options = {"interclass_filtering_threshold": limit, "backend": backend}
        return uk.fused_margin_softmax_loss(x, w, labels, **options)

    _check(fused, published, feats, weight, backend)


def test_what_is_not_filtered_runs_the_kernels_of_margin_softmax() -> None:
    module = uk.CosFaceLoss(D, C)
    (plain,) = module.comparisons()
    assert plain.spec is REGISTRY["margin_softmax"]
    assert "filter" not in repr(module)
    module.interclass_filtering_threshold = 0.3
    (filtered,) = module.comparisons()
    assert filtered.spec is REGISTRY["filtered_margin_softmax"]
    assert "interclass_filtering_threshold=0.3" in repr(module)
    feats, _, labels = _batch()
    head = uk.PartialFC("cosface", D, C, interclass_filtering_threshold=0.3)
    with torch.no_grad():
        module.weight.copy_(head.weight)
    check_same("loss", head(feats.float(), labels), module(feats.float(), labels), SAME_LOSS)


# --- AdaCos: metrics.py of 4uiiurz1/pytorch-adacos ------------------------------------------------


def _published_adacos(
    feats: Tensor, weight: Tensor, labels: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss, and the scale after the batch, which the loss reads."""
    cosine = _cosines(feats, weight)
    own = F.one_hot(labels, C).bool()
    with torch.no_grad():
        mean = torch.where(own, 0.0, torch.exp(s * cosine)).sum() / len(labels)
        median = torch.median(torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))[own])
        s = torch.log(mean) / torch.cos(median.clamp(max=math.pi / 4))
    return F.cross_entropy(s * cosine, labels), s


@each_backend
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_adacos_is_the_published_one(spread: float, backend: str) -> None:
    """Where the median angle counts, and where it is larger than pi / 4."""
    module = _module("adacos", backend)
    scale = torch.tensor(math.sqrt(2) * math.log(C - 1), dtype=torch.float64)
    assert abs(float(module.scale) - float(scale)) < 1e-5
    for seed in range(3):
        feats, _, labels = _batch(seed, spread)
        weight = module.weight.detach().double()
        leaves = [t.requires_grad_() for t in (feats, weight)]
        want, scale = _published_adacos(*leaves, labels, scale)
        wanted = torch.autograd.grad(want, leaves)
        rows = feats.detach().float().requires_grad_()
        loss = module(torch.cat([rows, rows[:1]]), torch.cat([labels, torch.tensor([-1])]))
        found = torch.autograd.grad(loss, [rows, module.weight])
        assert abs(float(loss.detach()) - float(want.detach())) <= 1e-5
        assert abs(float(module.scale) - float(scale)) <= 1e-4
        for got, expected in zip(found, wanted, strict=True):
            assert (got - expected).norm() <= 2e-4 * expected.norm()


def test_a_fixed_scale_stays() -> None:
    module = _module("adacos", "native", dynamic=False)
    feats, _, labels = _batch()
    want = math.sqrt(2) * math.log(C - 1)
    got = module(feats.float(), labels)
    assert abs(float(module.scale) - want) < 1e-5
    plain = uk.fused_margin_softmax_loss(feats.float(), module.weight, labels, scale=want, m3=0.0)
    check_same("loss", got, plain, SAME_LOSS)


# --- what outlives a step -------------------------------------------------------------------------

STATES = {"curricularface": "t", "adacos": "scale"}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_a_failed_step_moves_nothing(name: str, sharded: bool) -> None:
    """Nor does evaluation, nor a call without gradients, nor a batch that is not finite, nor one
    without labels.
    """
    module = uk.PartialFC(name, D, C) if sharded else uk.CLASS_LOSSES[name](D, C)
    state = getattr(module.loss if sharded else module, STATES[name])
    feats, _, labels = _batch()
    feats = feats.float()
    before = state.clone()
    module.eval()
    module(feats, labels)
    assert torch.equal(state, before)
    module.train()
    with torch.no_grad():
        module(feats, labels)
    assert torch.equal(state, before)
    for wrong in (
        {"labels": labels + C},
        {"labels": labels[1:]},
        {"feats": feats[:, 1:]},
        {"feats": feats.double()},
    ):
        with pytest.raises((ValueError, TypeError)):
            module(**{"feats": feats, "labels": labels} | wrong)
        assert torch.equal(state, before)
    for row in (torch.nan, torch.inf):
        broken = feats.clone()
        broken[3] = row
        assert not bool(module(broken, labels).isfinite())
        assert torch.equal(state, before)
        some = labels.clone()
        some[3] = -1
        assert bool(module(broken, some).isfinite())
        assert not torch.equal(state, before)
        state.copy_(before)
    assert module(feats, torch.full_like(labels, -1)).item() == 0.0
    assert torch.equal(state, before)
    module(feats, labels)
    assert not torch.equal(state, before)


@pytest.mark.parametrize("name", STATES)
def test_the_state_is_saved(name: str) -> None:
    module = uk.CLASS_LOSSES[name](D, C)
    feats, _, labels = _batch()
    module(feats.float(), labels)
    other = uk.CLASS_LOSSES[name](D, C)
    other.load_state_dict(module.state_dict())
    assert torch.equal(getattr(other, STATES[name]), getattr(module, STATES[name]))
    losses = [each(feats.float(), labels) for each in (copy.deepcopy(module), other, module)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    module.reset_parameters()
    fresh = uk.CLASS_LOSSES[name](D, C)
    assert torch.equal(getattr(module, STATES[name]), getattr(fresh, STATES[name]))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: uk.CurricularFaceLoss(D, C, alpha=1.5), ValueError, r"alpha must be <= 1"),
        (lambda: uk.CurricularFaceLoss(D, C, alpha="1"), TypeError, r"alpha must be a float"),
        (lambda: uk.AdaCosLoss(D, 2), ValueError, r"num_classes must be >= 3 .*, got 2"),
        (lambda: uk.AdaCosLoss(D, C, dynamic="yes"), TypeError, r"dynamic must be a bool, got"),
    ],
)  # fmt: skip
def test_wrong_options(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        ("curricularface", {"t": torch.zeros(2)}, ValueError, r"t must have one element"),
        ("curricularface", {"t": "0"}, TypeError, r"t must be a float or a torch.Tensor, got str"),
        ("curricularface", {"t": math.nan}, ValueError, r"t must be finite, got nan"),
        ("curricularface", {"t": 0.0, "margin": 4.0}, ValueError, r"margin must be <= 3.14159"),
        ("mv_softmax", {"t": -0.1}, ValueError, r"t must be >= 0, got -0.1"),
        ("mv_softmax", {"weighting": "none"}, ValueError, r"must be one of adaptive, fixed"),
        ("mv_softmax", {"margin_at": "on"}, ValueError, r"margin_at must be one of acute, all"),
        ("adacos", {"scale": 0.0}, ValueError, r"scale must be > 0, got 0.0"),
        ("adacos", {"scale": None}, TypeError, r"scale must be a float or a torch.Tensor"),
        ("margin_softmax", {"interclass_filtering_threshold": -0.1}, ValueError, r"must be >= 0"),
        ("margin_softmax", {"interclass_filtering_threshold": 1.1}, ValueError, r"must be <= 1"),
        ("margin_softmax", {"interclass_filtering_threshold": True}, TypeError, r"got bool"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    function: str, options: dict, error: type[Exception], message: str
) -> None:
    feats, weight, labels = _batch()
    with pytest.raises(error, match=message) as raised:
        getattr(uk, f"fused_{function}_loss")(feats.float(), weight.float(), labels, **options)
    assert "\n" not in str(raised.value)
