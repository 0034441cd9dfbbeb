"""Formulas of numbers per row: a row's loss by two log-sum-exps, and a triplet by two cosines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases import Case
from support.evaluation import check_against_reference
from support.helpers import FUSED, TARGETS, Target
from support.policies import Apart, SoftTriplet, custom_problem
from support.tolerances import EXACT, SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor
from torch.nn import functional as F

import unitsface_kernels as uk
from unitsface_kernels import policy
from unitsface_kernels.functional.call import Options, Samples, pair_call, runner
from unitsface_kernels.losses import CUSTOM, EMPTY, REGISTRY, LossSpec, custom

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


class NegativesAlone(policy.Pair):
    combine = "logsumexps"
    scale: policy.Number = 6.0

    def negative(self, c):
        return self.scale * c

    def finish(self, positives, negatives):
        return policy.softplus(negatives + 0 * positives)


SPECS = {cls: custom.spec(cls()) for cls in (Apart, NegativesAlone, SoftTriplet)}


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [*SPECS.values(), REGISTRY["circle"], REGISTRY["npt"]], ids=lambda spec: spec.name
)
def test_slopes_are_those_of_autograd(spec: LossSpec) -> None:
    params = spec.pack(spec.defaults())
    formula = spec.finish or spec.triplet
    assert formula is not None
    generator = torch.Generator().manual_seed(3)
    a, b = (
        (2 * torch.rand(40, 3, generator=generator, dtype=torch.float64) - 1).requires_grad_()
        for _ in range(2)
    )
    value = formula.value(a, b, params)
    assert value.shape == a.shape
    want = torch.autograd.grad(value.sum(), (a, b), allow_unused=True)
    for slope, expected in zip(formula.slopes(a, b, params), want, strict=True):
        check_same("slope", slope, torch.zeros_like(a) if expected is None else expected, EXACT)


@pytest.mark.parametrize("name", ["circle", "multi_similarity"])
def test_nothing_has_no_loss_and_no_slope(name: str) -> None:
    spec = REGISTRY[name]
    finish, params = spec.finish, spec.pack(spec.defaults())
    assert finish is not None
    empty, some = torch.tensor([EMPTY]), torch.tensor([3.0])
    for sums in ((empty, empty), (empty, some), (some, empty)):
        value, slopes = finish.value(*sums, params), finish.slopes(*sums, params)
        assert bool(value.isfinite().all())
        for of_sum, slope in zip(sums, slopes, strict=True):
            assert bool(slope.isfinite().all())
            assert not bool(slope[of_sum == EMPTY].any())


def test_a_triplet_is_the_hinge_that_it_was() -> None:
    """At the kink the derivative is 0, and NaN reaches value and slopes."""
    triplet = REGISTRY["npt"].triplet
    assert triplet is not None
    params = REGISTRY["npt"].pack({"margin": 0.5, "k": 7, "hinges": "sum"})
    assert triplet.count(params) == 7
    assert triplet.adds(params)
    nearest = torch.tensor([[0.5, 0.25, -1.0, torch.nan]])
    target = torch.tensor([[0.5]])
    value = triplet.value(nearest, target, params)
    torch.testing.assert_close(value, torch.tensor([[0.5, 0.0, 0.0, torch.nan]]), equal_nan=True)
    of_nearest, of_target = triplet.slopes(nearest, target, params)
    want = torch.tensor([[2.0, 0.0, 0.0, 2.0]])
    assert torch.equal(of_nearest, want)
    assert torch.equal(of_target, -want)


def test_a_count_has_the_bounds_of_the_search() -> None:
    k = next(number for number in SoftTriplet.formula.numbers if number.name == "k")
    assert (k.minimum, k.maximum, k.integer) == (0, 64, True)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(policy.FormulaError, match="combines by 'logsumexps' and has no finish"):

        class NoFinish(policy.Pair):
            combine = "logsumexps"

            def negative(self, c):
                return c

    with pytest.raises(policy.FormulaError, match="combines by 'logsumexps' and has no positive"):

        class OfClasses(policy.Class):
            combine = "logsumexps"

            def negative(self, c):
                return c

            def finish(self, positives, negatives):
                return negatives

    with pytest.raises(policy.FormulaError, match="combines by 'topk' and has no triplet"):

        class NoTriplet(policy.Class):
            combine = "topk"

            def negative(self, c):
                return c


# --- losses ---------------------------------------------------------------------------------------

CASES = [
    Case("batch", rows=37),
    Case("memory", rows=9, columns=40, labels="ignored", reduction="none"),
    Case("no-positives", rows=5, columns=4, labels="distinct"),
    Case("one-identity", rows=5, labels="one", reduction="sum"),
]


@pytest.mark.parametrize("target", FUSED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("cls", SPECS, ids=lambda cls: cls.__name__)
def test_users_losses(target: Target, cls: type[policy.Policy], case: Case) -> None:
    spec = SPECS[cls]
    if spec.topology == "class" and case.labels == "distinct":
        case = replace(case, labels="random")
    if target.backend == "triton" and spec.reduction != "nearest":
        pytest.skip("generated at run time")
    assert spec.name in CUSTOM
    p = custom_problem(case, spec, None, torch.float32, target.device)
    check_against_reference(target, p, torch.float32)


@pytest.mark.parametrize("valid", ["with_positives", "with_negatives", "with_both"])
@each_target
def test_rows_that_count(target: Target, valid: str) -> None:
    """Rows that do not count change neither loss nor gradients."""
    spec = replace(REGISTRY["multi_similarity"], valid_rows=valid)
    feats = torch.randn(5, 8, device=target.device, requires_grad=True)
    memory = torch.randn(4, 8, device=target.device)
    # A positive alone, both, negatives alone, ignored, both.
    labels = torch.tensor([0, 0, 9, -1, 1], device=target.device)

    def value(memory_labels: list[int], backend: str) -> Tensor:
        held = torch.tensor(memory_labels, device=target.device)
        samples = Samples(feats, labels, None, memory, held, None)
        config, tensors = pair_call(spec, spec.defaults(), samples, Options("none", backend))
        return runner(config, tensors)(config, *tensors)

    for memory_labels in ([0, 0, 1, 1], [0, 0, 0, -1]):
        got, want = (value(memory_labels, backend) for backend in (target.backend, "reference"))
        positives = torch.tensor(
            [label in memory_labels and label >= 0 for label in labels.tolist()]
        )
        negatives = torch.tensor(
            [any(m not in (label, -1) for m in memory_labels) for label in labels.tolist()]
        )
        counted = {
            "with_positives": positives,
            "with_negatives": negatives & (labels.cpu() >= 0),
            "with_both": positives & negatives,
        }[valid]
        assert torch.equal(got.detach().cpu() != 0, counted)
        check_same("loss", got, want, SAME_LOSS)
        (gradient,) = torch.autograd.grad(got.sum(), feats)
        (wanted,) = torch.autograd.grad(want.sum(), feats)
        assert torch.equal(gradient.any(dim=1).cpu(), counted)
        check_same("rows", gradient, wanted, SAME_GRADIENT)


# --- published formulas ---------------------------------------------------------------------------


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels[None, :]
    return same & ~torch.eye(len(labels), dtype=torch.bool), ~same


def _circle(feats: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """As ``pairwise_circleloss`` of fastreid/modeling/losses/circle_loss.py (JDAI-CV/fast-reid)
    has it: weights are detached, and pairs that do not count have logits that vanish."""
    unit = F.normalize(feats, dim=1)
    cosine = unit @ unit.T
    positive, negative = _pairs(labels)
    # Optima 1 + m and -m; the published weights are functions of masked cosines.
    weight_p = (1 + margin - cosine.detach()).clamp_min(0)
    weight_n = (cosine.detach() + margin).clamp_min(0)
    logit_p = (-scale * weight_p * (cosine - 1 + margin)).masked_fill(~positive, -torch.inf)
    logit_n = (scale * weight_n * (cosine - margin)).masked_fill(~negative, -torch.inf)
    rows = positive.any(dim=1) & negative.any(dim=1)
    both = torch.logsumexp(logit_p[rows], dim=1) + torch.logsumexp(logit_n[rows], dim=1)
    # Rows without a kind have softplus(-1e8) = 0 there.
    return F.softplus(both).sum() / len(labels)


def _multi_similarity(
    feats: Tensor, labels: Tensor, alpha: float, beta: float, base: float
) -> Tensor:
    """The weighting step of ret_benchmark/losses/multi_similarity_loss.py
    (msight-tech/research-ms-loss), on all pairs: there a mining step takes some out before, and
    rows that it leaves without a positive or without a negative."""
    unit = F.normalize(feats, dim=1)
    total = feats.new_zeros(())
    for i, (positive, negative) in enumerate(zip(*_pairs(labels), strict=True)):
        cosine = unit[i] @ unit.T
        of_positives = torch.exp(-alpha * (cosine[positive] - base)).sum()
        of_negatives = torch.exp(beta * (cosine[negative] - base)).sum()
        total = total + torch.log1p(of_positives) / alpha + torch.log1p(of_negatives) / beta
    return total / len(labels)


PUBLISHED = [
    ("circle", _circle, {"scale": 256.0, "margin": 0.25}),
    ("circle", _circle, {"scale": 80.0, "margin": 0.4}),
    ("multi_similarity", _multi_similarity, {"alpha": 2.0, "beta": 40.0, "base": 0.5}),
    ("multi_similarity", _multi_similarity, {"alpha": 2.0, "beta": 50.0, "base": 1.0}),
]


@pytest.mark.parametrize(("name", "published", "values"), PUBLISHED, ids=lambda v: str(v)[:20])
def test_published_formulas(name: str, published, values: dict[str, float]) -> None:
    """Loss and gradients in float64; the fused ones agree with these by the parity tests."""

    generator = torch.Generator().manual_seed(11)
    feats = torch.randn(24, 7, generator=generator, dtype=torch.float64).requires_grad_()
    # Identities of six, of two and of one.
    labels = torch.tensor([0] * 6 + [1] * 6 + [2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 9])
    function = getattr(uk, REGISTRY[name].function)
    got = function(feats, labels, backend="reference", **values)
    want = published(feats, labels, **values)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    for one, other in zip(
        torch.autograd.grad(got, feats), torch.autograd.grad(want, feats), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
