"""Numbers of losses that are given as tensors: values, gradients, and what a number costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import CASES, Case, build, variants
from support.evaluation import check_against_reference
from support.grid import extended_if, representatives
from support.helpers import Target
from support.policies import CustomProblem
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor, nn
from torch.autograd import forward_ad

import unitsface_kernels as uk
from unitsface_kernels import dispatch, policy
from unitsface_kernels.backends.eager.engine import EagerEngine
from unitsface_kernels.backends.streaming import ClassTile, ClassWeights
from unitsface_kernels.functional.numbers import apart
from unitsface_kernels.losses import CUSTOM, REGISTRY, LossSpec, custom, find
from unitsface_kernels.policy.form import kernel_form

KNOWN = {case.name: case for case in CASES}

needs_native = pytest.mark.skipif(
    dispatch.unavailable("native", "cpu", torch.float32) is not None,
    reason="needs the native backend",
)


def numbers(spec: LossSpec) -> list[str]:
    return [p.name for p in spec.parameters if not p.choices and not p.integer]


# AdaCos has none: its scale is a variable of its own.
LOSSES = [spec for spec in REGISTRY.values() if numbers(spec)]


def make(spec: LossSpec, case: Case, values: dict[str, Any] | None = None) -> CustomProblem:
    """A problem of a loss with all numbers in tensors."""
    names = numbers(spec)
    p = build(case, spec, values)
    known = {**spec.defaults(), **p.values}
    of = custom.with_scalars(spec, names)
    rest = {name: value for name, value in p.values.items() if name not in names}
    tensors = {name: torch.tensor(float(known[name])) for name in names}
    own = {"spec": of, "values": rest, "variables": p.variables | tensors}
    return CustomProblem(**{**vars(p), **own})


#: Kernels of the CPU, tiles in operations of Torch, kernels of GPUs.
HOW = {
    "compiled": Target("native", "cpu"),
    "eager": Target("native", "cpu"),
    "triton": Target("triton", "cpu"),
}


def _grid() -> list:
    first = representatives(LOSSES)
    found = []
    for spec in LOSSES:
        for name, values in variants(spec).items():
            for case in ("base", "ignored-memory", "none", "subset", "no-rows", "tiles-columns"):
                if not KNOWN[case].applies(spec) or (name != "default" and case != "none"):
                    continue
                if spec not in first and case not in ("none", "subset"):
                    continue
                others = spec not in first or KNOWN[case].heavy or name != "default"
                for how in HOW:
                    # Compiling takes seconds, and the interpreter of Triton as well.
                    slow = how == "compiled" and spec.name != "margin_softmax"
                    if how == "triton":
                        slow = case != "none"
                        # Triton's interpreter combines no mask of pairs with one of a number.
                        if KNOWN[case].heavy or spec.name == "filtered_margin_softmax":
                            continue
                    where = f"{spec.name}-{name}-{case}-{how}"
                    marks = extended_if(others or slow)
                    found.append(
                        pytest.param(spec, values, KNOWN[case], how, id=where, marks=marks)
                    )
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("spec", "values", "case", "how"), _grid())
def test_parity(
    spec: LossSpec, values: dict[str, Any], case: Case, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = HOW[how]
    if not target.runs(torch.float32):
        pytest.skip(f"needs {target}")
    if how == "eager":
        monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    check_against_reference(target, make(spec, case, values), torch.float32)


@needs_native
def test_the_gradient_of_a_scale_follows_from_that_of_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It equals the gradient that tiles add up where the rows have none."""
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    p = make(REGISTRY["margin_softmax"], Case("ad hoc", rows=40, columns=50, labels="ignored"))
    assert kernel_form(p.spec.formula).factor == 0
    added = []
    tile = EagerEngine.logsumexp_gradient_tile

    def noting(self: EagerEngine, t: ClassTile, rows: ClassWeights) -> Tensor:
        added.append(t.d_variables is not None)
        return tile(self, t, rows)

    monkeypatch.setattr(EagerEngine, "logsumexp_gradient_tile", noting)
    _, found = p.evaluate("native")
    assert added == [False]
    scale = p.variables["scale"].clone().requires_grad_()
    p.loss("native", scale=scale).backward(p.upstream)
    assert added == [False, True]
    torch.testing.assert_close(scale.grad, found["scale"], rtol=1e-5, atol=0.0)


def _checked_numbers() -> list:
    """Losses with parameters of which the gradient is the derivative."""
    found = []
    first = representatives(LOSSES)
    for spec in LOSSES:
        # What is detached from the cosine is detached from its margin, too.
        values = {"margin_gradient": "exact"} if spec.name == "sphereface2" else {}
        names = ["scale"] if spec.name == "circle" else numbers(spec)
        marks = extended_if(spec not in first)
        found.append(pytest.param(spec, values, names, id=spec.name, marks=marks))
    return found


@pytest.mark.parametrize(("spec", "values", "names"), _checked_numbers())
def test_derivatives_of_the_public_function(
    spec: LossSpec, values: dict[str, Any], names: list[str]
) -> None:
    """Against central differences, of the reference in float64."""
    case = Case("ad hoc", rows=6, dim=5, columns=7 if spec.topology == "class" else None)
    p = build(case, spec, values).converted(torch.float64)
    known = {**spec.defaults(), **p.values}
    # Within bounds, and small scales, so that losses are no sums of hinges.
    at = [min(float(known[name]), 6.0) or 0.1 for name in names]
    given = [torch.tensor(value, dtype=torch.float64) for value in at]

    def loss(*tensors: Tensor) -> Tensor:
        return p.loss("reference", values={**p.values, **dict(zip(names, tensors, strict=True))})

    leaves = [value.requires_grad_() for value in given]
    assert torch.autograd.gradcheck(loss, leaves)
    floats = {**p.values, **{n: float(v.detach()) for n, v in zip(names, given, strict=True)}}
    torch.testing.assert_close(loss(*leaves), p.loss("reference", values=floats))


BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def _cosface(feats: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, m: Tensor) -> Tensor:
    cosine = F.normalize(feats, dim=1) @ F.normalize(weight, dim=1).T
    return F.cross_entropy(scale * (cosine - m * F.one_hot(labels, len(weight))), labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_cosface(backend: str) -> None:
    loss = uk.CosFaceLoss(
        8,
        6,
        scale=nn.Parameter(torch.tensor(12.0)),
        margin=torch.tensor(0.3, requires_grad=True),
        backend=backend,
    )
    assert {n: tuple(p.shape) for n, p in loss.named_parameters()} == {
        "scale": (),
        "m3": (),
        "weight": (6, 8),
    }
    assert "scale=Parameter(12)" in repr(loss)
    feats, labels = torch.randn(9, 8, requires_grad=True), torch.arange(9) % 6
    leaves = [feats, loss.weight, loss.scale, loss.m3]
    got, want = loss(feats, labels), _cosface(feats, loss.weight, labels, loss.scale, loss.m3)
    check_same("loss", got, want, SAME_LOSS)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for place, (a, b) in enumerate(pairs):
        check_same(f"gradient {place}", a, b, SAME_GRADIENT)


def test_every_number_of_a_margin_softmax_may_be_a_parameter() -> None:
    names = ("scale", "m1", "m2", "m3", "adaptive_margin", "interclass_filtering_threshold")
    given = {name: nn.Parameter(torch.tensor(0.5)) for name in names}
    loss = uk.MarginSoftmaxLoss(8, 6, **given)
    loss(torch.randn(9, 8), torch.arange(9) % 6).backward()
    for name, parameter in given.items():
        assert getattr(loss, name) is parameter
        assert parameter.grad is not None
    assert "interclass_filtering_threshold=Parameter(0.5)" in repr(loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_learned_scale_of_pairs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    feats, labels = torch.randn(9, 8, requires_grad=True), torch.arange(9) % 3
    scale, b = torch.tensor([7.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    got = uk.fused_uss_loss(feats, labels, b, scale=scale, margin=0.2, backend=backend)
    unit = F.normalize(feats, dim=1)
    same = labels[:, None] == labels[None]
    z = scale * (unit @ unit.T - 0.2 * same) - b
    terms = F.softplus(torch.where(same, -z, z)) * ~torch.eye(9, dtype=torch.bool)
    want = terms.sum(dim=1).mean()
    check_same("loss", got, want, SAME_LOSS)
    leaves = [feats, scale, b]
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for place, (a, c) in enumerate(pairs):
        check_same(f"gradient {place}", a, c, SAME_GRADIENT)


@needs_native
def test_a_tensor_without_gradient_is_a_number() -> None:
    """With its kernels: the same bits."""
    feats, weight, labels = torch.randn(9, 8), torch.randn(6, 8), torch.arange(9) % 6
    want = uk.fused_margin_softmax_loss(feats, weight, labels, scale=30.0)
    values = {**REGISTRY["margin_softmax"].defaults(), "scale": torch.tensor(30.0)}
    spec, numbers_of_it, variables = apart(REGISTRY["margin_softmax"], values, None, feats)
    assert spec is REGISTRY["margin_softmax"]
    assert (numbers_of_it["scale"], variables) == (30.0, None)
    leaf = torch.tensor(30.0, requires_grad=True)
    assert torch.equal(
        uk.fused_margin_softmax_loss(feats, weight, labels, scale=leaf.detach()), want
    )
    with torch.no_grad():
        assert torch.equal(uk.fused_margin_softmax_loss(feats, weight, labels, scale=leaf), want)


def test_losses_are_found_by_name() -> None:
    of = custom.with_scalars(REGISTRY["uce"], ["margin", "scale"])
    assert of.name == "uce+scale+margin"
    assert [p.name for p in of.parameters] == ["negative_weight", "adaptive_margin"]
    assert [v.name for v in of.variables] == ["scale", "margin"]
    CUSTOM.pop(of.name)
    assert find(of.name).name == of.name
    with pytest.raises(LookupError, match="no loss 'other'"):
        find("other+scale")


def test_errors() -> None:
    feats, weight, labels = torch.randn(9, 8), torch.randn(6, 8), torch.arange(9) % 6

    def run(**changed: Any) -> None:
        uk.fused_margin_softmax_loss(feats, weight, labels, backend="reference", **changed)

    for name, value, text in (
        ("scale", torch.tensor(0.0), "scale must be > 0, got 0.0"),
        ("scale", torch.tensor(-3.0, requires_grad=True), "scale must be > 0, got -3.0"),
        ("scale", torch.tensor(torch.nan), "scale must be finite, got nan"),
        ("scale", torch.ones(2), r"scale must have one element, got shape \(2,\)"),
        ("adaptive_margin", torch.tensor(-1.0), "adaptive_margin must be >= 0, got -1.0"),
        ("scale", torch.ones((), device="meta"), "scale must be on the device of feats"),
    ):
        with pytest.raises(ValueError, match=text):
            run(**{name: value})
    for name, value, text in (
        ("scale", torch.tensor(3), "scale must have a floating dtype, got torch.int64"),
        ("margin_gradient", torch.tensor(3.0), "margin_gradient must be one of exact, detached"),
    ):
        with pytest.raises(TypeError, match=text):
            run(**{name: value})
    with pytest.raises(TypeError, match="k must be an int, got Tensor"):
        uk.fused_npt_loss(feats, weight, labels, k=torch.tensor(3.0), backend="reference")
    with pytest.raises(ValueError, match="scale must have one element"):
        uk.PartialFC("cosface", 8, 6, scale=nn.Parameter(torch.ones(3)))


@needs_native
@pytest.mark.parametrize("learned", [True, False])
def test_compiled(learned: bool) -> None:
    loss = uk.CosFaceLoss(
        8, 6, scale=nn.Parameter(torch.tensor(12.0), requires_grad=learned), backend="native"
    )
    feats, labels = torch.randn(9, 8), torch.arange(9) % 6
    want = loss(feats, labels)
    gradients = torch.autograd.grad(want, [p for p in loss.parameters() if p.requires_grad])
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(feats, labels)
    check_same("loss", got, want, SAME_LOSS)
    others = torch.autograd.grad(got, [p for p in loss.parameters() if p.requires_grad])
    for a, b in zip(others, gradients, strict=True):
        check_same("gradient", a, b, SAME_GRADIENT)


def test_transforms_of_the_reference() -> None:
    feats, weight, labels = torch.randn(9, 8), torch.randn(6, 8), torch.arange(9) % 6

    def loss(scale: Tensor, backend: str = "reference") -> Tensor:
        return uk.fused_margin_softmax_loss(feats, weight, labels, scale=scale, backend=backend)

    scale = torch.tensor(12.0, requires_grad=True)
    (want,) = torch.autograd.grad(loss(scale), [scale])
    value = scale.detach()
    torch.testing.assert_close(torch.func.grad(loss)(value), want)
    torch.testing.assert_close(torch.func.jvp(loss, (value,), (torch.ones(()),))[1], want)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(value[None]), want[None])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones(()))
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, want)
        if dispatch.unavailable("native", "cpu", torch.float32) is None:
            with pytest.raises(RuntimeError, match="forward-mode"):
                loss(dual, "native")


class Hinges(policy.Pair):
    margin: policy.Number = policy.number(0.4, at_least=0.0)
    slope: policy.Number = 2.0

    def positive(self, c):
        return 1 - c

    def negative(self, c):
        return self.slope * policy.maximum(c - self.margin, 0)


def test_numbers_of_own_policies() -> None:
    loss = uk.PairLoss(Hinges(margin=nn.Parameter(torch.tensor(0.1))), backend="reference")
    assert list(loss.state_dict()) == ["margin"]
    feats, labels = torch.randn(9, 8), torch.arange(9) % 3
    loss(feats, labels).backward()
    assert loss.margin.grad.abs() > 0
    plain = uk.PairLoss(Hinges(margin=0.1), backend="reference")
    torch.testing.assert_close(loss(feats, labels), plain(feats, labels))
    other = copy.deepcopy(loss)
    with torch.no_grad():
        other.margin.fill_(0.3)
    assert other(feats, labels) != loss(feats, labels)
    other.reset_parameters()
    assert torch.equal(other(feats, labels), loss(feats, labels))
    loss.margin.data.fill_(-1.0)
    with pytest.raises(ValueError, match="margin must be >= 0"):
        loss(feats, labels)


def test_buffers_and_first_values() -> None:
    scale = torch.tensor(20.0)
    loss = uk.SphereFace2Loss(8, 6, scale=scale, margin=nn.Parameter(torch.tensor(0.2)))
    assert dict(loss.named_buffers()).keys() == {"scale"}
    assert set(loss.state_dict()) == {"scale", "margin", "weight", "bias"}
    plain = uk.SphereFace2Loss(8, 6, scale=20.0, margin=0.2)
    torch.testing.assert_close(loss.bias, plain.bias)
    with torch.no_grad():
        loss.margin.fill_(0.9)
    loss.reset_parameters()
    assert loss.margin.item() == pytest.approx(0.2)
    plain.load_state_dict(loss.state_dict(), strict=False)
    with pytest.raises(ValueError, match="scale must be > 0"):
        uk.SphereFace2Loss(8, 6, scale=torch.tensor(-1.0))


@pytest.mark.parametrize("name", ["epl", "vpl", "unpg"])
def test_compositions(name: str) -> None:
    """A learned scale is that of the head."""
    torch.manual_seed(0)
    feats, labels = torch.randn(9, 8), torch.arange(9) % 6
    options = {"backend": "reference"} | ({"start_epoch": 0} if name == "epl" else {})
    results, scale = [], nn.Parameter(torch.tensor(16.0))
    for given in (scale, 16.0, 16.0 + 1e-2):
        torch.manual_seed(1)
        loss = uk.CLASS_LOSSES[name](8, 6, scale=given, **options).double()
        results.append(loss(feats.double(), labels))
    torch.testing.assert_close(results[0], results[1])
    (gradient,) = torch.autograd.grad(results[0], [scale])
    difference = (results[2] - results[1]) / 1e-2
    torch.testing.assert_close(gradient, difference, rtol=1e-2, atol=1e-5)
