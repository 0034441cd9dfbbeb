"""PairLoss and ClassLoss: users' policies as functions and modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.grid import extended_if
from support.helpers import TARGETS, Target
from support.own_policies import Contrastive, Cosine, Threshold, Tuplet, Unified, contrastive
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

import unitsface_kernels as uk
from train.examples.policies import Circle, ClassMargin
from unitsface_kernels import ClassLoss, PairLoss, policy

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)

N, M, C, D = 37, 29, 11, 8


def batch(target: Target, count: int = N) -> tuple[Tensor, Tensor]:
    """Features that need a gradient, and labels: some are ignored, and one has no other."""
    feats = torch.randn(count, D, device=target.device, requires_grad=True)
    labels = torch.randint(-1, 5, (count,), device=target.device)
    labels[0] = 5
    return feats, labels


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(0.5, 2.0, loss.numel(), device=loss.device)
    return list(torch.autograd.grad((loss.reshape(-1) * weights).sum(), leaves, retain_graph=True))


def compare(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    check_same("loss", got, want, SAME_LOSS)
    pairs = zip(gradients(got, leaves), gradients(want, leaves), strict=True)
    for place, (a, b) in enumerate(pairs):
        check_same(f"gradient {place}", a, b, SAME_GRADIENT)


# -- what the pairs of a row come to ------------------------------------------------------------


@each_target
def test_by_default_a_row_s_pairs_are_added_and_rows_averaged(target: Target) -> None:
    feats, labels = batch(target)
    unit = F.normalize(feats, dim=1)
    valid = (labels >= 0)[:, None] & (labels >= 0)[None]
    valid = valid & ~torch.eye(N, dtype=torch.bool, device=target.device)
    same = labels[:, None] == labels[None]
    rows = contrastive(unit @ unit.T, valid & same, valid & ~same, 0.3)
    wanted = {
        "mean": rows.sum() / (labels >= 0).sum(),
        "sum": rows.sum(),
        "none": rows,
    }
    for reduction, want in wanted.items():
        loss = PairLoss(Contrastive(margin=0.3), reduction=reduction, backend=target.backend)
        compare(loss(feats, labels), want * (1.0 if want.dim() == 0 else labels >= 0), [feats])


@each_target
@pytest.mark.parametrize("offset", [None, 3])
def test_a_memory_takes_the_place_of_the_batch(target: Target, offset: int | None) -> None:
    feats, labels = batch(target)
    memory, memory_labels = batch(target, N + 5)
    unit, other = F.normalize(feats, dim=1), F.normalize(memory, dim=1)
    valid = (labels >= 0)[:, None] & (memory_labels >= 0)[None]
    if offset is not None:
        places = torch.arange(N, device=target.device)
        valid[places, places + offset] = False
    same = labels[:, None] == memory_labels[None]
    want = contrastive(unit @ other.T, valid & same, valid & ~same, 0.4).sum()
    loss = PairLoss(Contrastive(), reduction="sum", backend=target.backend)
    got = loss(feats, labels, memory, memory_labels, batch_offset=offset)
    compare(got, want, [feats, memory])


# -- policies that are losses of the package ----------------------------------------------------

PAIRS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "uss": (Threshold(scale=16.0), {"init_threshold": 4.0}, uk.USSLoss(16.0, init_threshold=4.0)),
    "pair_bce": (
        Threshold(scale=16.0),
        {"init_threshold": 4.0, "thresholds": "per_identity", "num_identities": 6},
        uk.PairBCELoss(6, 16.0, init_threshold=4.0),
    ),
    "pair_softmax": (Tuplet(scale=16.0), {}, uk.PairSoftmaxLoss(16.0)),
}
CLASSES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "cosface": (Cosine(scale=16.0), {}, uk.CosFaceLoss(D, C, scale=16.0)),
    "uce": (
        Unified(scale=16.0, share=0.5),
        {"init_threshold": 4.7},
        uk.UCELoss(D, C, scale=16.0, negative_weight=0.5),
    ),
    "class_bce": (
        Unified(scale=16.0),
        {"init_threshold": 4.7, "thresholds": "per_class"},
        uk.ClassBCELoss(D, C, scale=16.0),
    ),
}


def alike(ours: torch.nn.Module, theirs: torch.nn.Module, backend: str) -> list[list[Tensor]]:
    """Parameters of two modules, with equal values."""
    theirs = copy.deepcopy(theirs)
    assert [*ours.state_dict()] == [n for n in theirs.state_dict() if n != "initialized"]
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(dict(theirs.named_parameters())[name])
    return [ours, theirs]


@each_target
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_policy_is_the_loss_of_its_formula(target: Target, name: str) -> None:
    formula, options, theirs = PAIRS[name]
    ours = PairLoss(formula, backend=target.backend, **options).to(target.device)
    if options:
        assert ours.threshold.flatten().tolist() == [4.0] * ours.threshold.numel()
    theirs = copy.deepcopy(theirs).to(target.device)
    theirs.backend = target.backend
    feats, labels = batch(target)
    memory, memory_labels = batch(target, M)
    for columns in ((), (memory, memory_labels)):
        found = []
        for module in (ours, theirs):
            loss = module(feats, labels, *columns)
            leaves = [feats, *columns[:1], *module.parameters()]
            found.append([loss, *torch.autograd.grad(loss, leaves)])
        for place, (got, want) in enumerate(zip(*found, strict=True)):
            check_same(f"{place}", got, want, SAME_GRADIENT)


@each_target
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_policy_is_the_loss_of_its_formula(target: Target, name: str) -> None:
    formula, options, theirs = CLASSES[name]
    ours = ClassLoss(formula, D, C, backend=target.backend, **options).to(target.device)
    theirs = copy.deepcopy(theirs).to(target.device)
    theirs.backend = target.backend
    ours.load_state_dict(theirs.state_dict())
    feats = torch.randn(N, D, device=target.device, requires_grad=True)
    labels = torch.randint(-1, C, (N,), device=target.device)
    index = torch.tensor([3, 1, 10, 7], device=target.device)
    for call in ((labels,), (labels.clamp(max=3), index)):
        found = []
        for module in (ours, theirs):
            loss = module(feats, *call)
            found.append([loss, *torch.autograd.grad(loss, [feats, *module.parameters()])])
        for place, (got, want) in enumerate(zip(*found, strict=True)):
            check_same(f"{place}", got, want, SAME_GRADIENT)


@each_target
def test_functions_take_what_modules_take(target: Target) -> None:
    feats, labels = batch(target)
    settings = {"backend": target.backend, "reduction": "none"}
    b = torch.full((1,), 3.0, device=target.device, requires_grad=True)
    got = uk.fused_pair_loss(Threshold(scale=8.0), feats, labels, b=b, **settings)
    want = uk.fused_uss_loss(feats, labels, b, scale=8.0, **settings)
    compare(got, want, [feats, b])
    got = uk.fused_pair_loss(Threshold(scale=8.0), feats, labels, b=3.0, **settings)
    check_same("a number", got, want, SAME_LOSS)
    weight = torch.randn(C, D, device=target.device, requires_grad=True)
    got = uk.fused_class_loss(Cosine(scale=8.0), feats, weight, labels, **settings)
    want = uk.fused_margin_softmax_loss(feats, weight, labels, scale=8.0, m3=0.4, **settings)
    compare(got, want, [feats, weight])


# -- what a module keeps ------------------------------------------------------------------------


def test_numbers_are_those_of_the_policy_at_the_call() -> None:
    feats, labels = torch.randn(9, D), torch.arange(9) % 3
    loss = PairLoss(Contrastive(margin=0.3), backend="reference")
    before = loss(feats, labels)
    loss.policy.margin = -0.5
    other = PairLoss(Contrastive(margin=-0.5), backend="reference")
    assert torch.equal(loss(feats, labels), other(feats, labels))
    assert not torch.equal(loss(feats, labels), before)


def test_texts() -> None:
    assert repr(PairLoss(Contrastive(margin=0.3))) == (
        "PairLoss(Contrastive(margin=0.3), reduction='mean', backend='auto')"
    )
    text = repr(ClassLoss(Unified(), 8, 11, thresholds="per_class"))
    assert text == (
        "ClassLoss(Unified(scale=64.0, margin=0.4, share=1.0), embedding_size=8, num_classes=11, "
        "thresholds='per_class', reduction='mean', backend='auto')"
    )
    text = repr(PairLoss(Threshold(), thresholds="per_identity", num_identities=3))
    assert "num_identities=3, thresholds='per_identity'" in text


MODULES = {
    "pair": lambda: PairLoss(
        Threshold(scale=8.0), thresholds="per_identity", num_identities=5, backend="reference"
    ),
    "class": lambda: ClassLoss(Unified(scale=8.0), D, 5, backend="reference"),
}
COMPILED = {
    **MODULES,
    "two sums": lambda: PairLoss(Circle(scale=8.0), backend="reference"),
    "class margin": lambda: ClassLoss(ClassMargin(scale=8.0), D, 5, backend="reference"),
}


@pytest.mark.parametrize("name", MODULES)
def test_copies_pickles_and_state_dicts_are_equal(name: str) -> None:
    module = MODULES[name]()
    with torch.no_grad():
        module.threshold.add_(1.5)
    feats, labels = torch.randn(9, D), torch.arange(9) % 5
    other = MODULES[name]()
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
        other,
    ]
    for copied in copies:
        assert copied.spec is module.spec
        assert repr(copied) == repr(module)
        assert torch.equal(copied(feats, labels), module(feats, labels))
        copied.policy.margin = 0.9
    assert module.policy.margin != 0.9


# The operator is one for all backends.
@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(t, n, marks=extended_if(t.interpreted or n not in ("pair", "class")))
        for t in TARGETS
        for n in COMPILED
    ],
    ids=str,
)
def test_compiled_in_one_graph(target: Target, name: str) -> None:
    module = COMPILED[name]().to(target.device)
    module.backend = target.backend
    feats = torch.randn(9, D, device=target.device, requires_grad=True)
    labels = torch.arange(9, device=target.device) % 5
    leaves = [feats, *module.parameters()]
    want = torch.autograd.grad(module(feats, labels), leaves)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(feats, labels), leaves)
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        check_same(f"gradient {place}", a, b, SAME_GRADIENT)


def test_a_sum_of_both_is_unitsface() -> None:
    feats, labels = torch.randn(9, D), torch.arange(9) % 5
    ours = uk.UniTSFaceLoss(
        ClassLoss(Cosine(), D, 5, backend="reference"),
        PairLoss(Threshold(), init_threshold=20.0, backend="reference"),
    )
    theirs = uk.UniTSFaceLoss(
        uk.CosFaceLoss(D, 5, backend="reference"),
        uk.USSLoss(init_threshold=20.0, backend="reference"),
    )
    theirs.load_state_dict({**ours.state_dict(), "pair_loss.initialized": torch.tensor(True)})
    check_same("loss", ours(feats, labels), theirs(feats, labels), SAME_LOSS)


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairLoss(Contrastive), r"an instance, Contrastive\(\), got the class Contrastive"),
        (lambda: PairLoss("uss"), "an instance of a policy.Pair, got str"),
        (lambda: PairLoss(Cosine()), "policy.Pair for PairLoss .*, got Cosine, which ClassLoss"),
        (lambda: ClassLoss(Contrastive(), 8, 3), "policy.Class .* got Contrastive, which PairLoss"),
        (lambda: Contrastive(scale=3.0), "Contrastive takes margin, got scale"),
        (lambda: PairLoss(Contrastive(), margin=0.3), r"keeps \(none\), got margin"),
        (
            lambda: PairLoss(Threshold(), thresholds="per_class"),
            "one, per_identity, got 'per_class'",
        ),
        (lambda: PairLoss(Threshold(), thresholds="per_identity"), "num_identities must be given"),
        (
            lambda: ClassLoss(Cosine(), 8, 3, thresholds="per_class"),
            "Cosine has no threshold, got thresholds='per_class'",
        ),
        (
            lambda: PairLoss(Threshold(), init_threshold=float("nan")),
            "init_threshold must be finite",
        ),
        (lambda: ClassLoss(Cosine(), 0, 3), "embedding_size must be >= 1, got 0"),
    ],
)
def test_mistakes_at_construction(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, y: PairLoss(Threshold(scale=-1.0))(f, y), "scale must be > 0, got -1"),
        (lambda f, y: PairLoss(Contrastive(margin="a"))(f, y), "margin must be a float, got str"),
        (lambda f, y: PairLoss(Contrastive(), reduction="all")(f, y), "reduction must be one of"),
        (lambda f, y: PairLoss(Contrastive(), backend="cublas")(f, y), "backend must be one of"),
        (lambda f, y: PairLoss(Contrastive())(f, y[:3]), r"labels must have shape \(9,\)"),
        (lambda f, y: uk.fused_pair_loss(Contrastive(), f, y, b=1.0), "has no threshold, got one"),
        (lambda f, y: uk.fused_pair_loss(Threshold(), f, y), "has a threshold, got none as b"),
        (lambda f, y: uk.fused_pair_loss(Contrastive(), f, y, a=f), "no variables, got one for a"),
        (lambda f, y: ClassLoss(Cosine(), D, 5)(f, y + 3), r"labels must be in \[-1, 5\)"),
    ],
)
def test_mistakes_at_the_call(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(9, D), torch.arange(9) % 5)


def test_names_are_exported() -> None:
    for name in ("PairLoss", "ClassLoss", "fused_pair_loss", "fused_class_loss", "policy"):
        assert name in uk.__all__
        assert getattr(uk, name).__doc__
    assert uk.policy is policy
