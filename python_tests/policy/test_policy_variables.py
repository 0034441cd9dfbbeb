"""Tensors that a formula reads: scalars, per row, per column, per identity, and computed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import Case
from support.evaluation import check_against_reference
from support.fake_device import KINDS, allowed_bytes, record
from support.grid import extended_if
from support.helpers import Target
from support.variables import (
    POLICIES,
    ROWWISE,
    Curricular,
    Everything,
    Scales,
    Tempered,
    Triplets,
    make,
)
from torch import Tensor

from unitsface_kernels import dispatch, policy
from unitsface_kernels.functional.call import Options, Samples, pair_call
from unitsface_kernels.functional.custom import fused_class_loss, fused_pair_loss
from unitsface_kernels.losses import custom

NATIVE = Target("native", "cpu")

needs_native = pytest.mark.skipif(
    dispatch.unavailable("native", "cpu", torch.float32) is not None,
    reason="needs the native backend",
)
#: A variable of every kind, and one over classes: they have what the others have one at a time.
FIRST = (Everything, Curricular)
each_policy = pytest.mark.parametrize(
    "of",
    [
        pytest.param(of, marks=extended_if(of not in (*FIRST, Scales)))
        for of in (*POLICIES, *ROWWISE)
    ],
    ids=lambda of: of.__name__,
)


CASES = (
    Case("base"),
    Case("memory", rows=9, columns=10, labels="ignored", topology="pair"),
    Case("ignored", rows=9, labels="ignored"),
    Case("none", rows=9, labels="ignored", reduction="none"),
    Case("sum", rows=33, columns=40, reduction="sum"),
    Case("subset", rows=7, columns=21, subset=True, topology="class"),
    Case("no-column-gradient", rows=9, columns=12, column_gradient=False),
    Case("none-no-column-gradient", rows=9, columns=12, column_gradient=False, reduction="none"),
    Case("one-row", rows=1, columns=5),
    Case("no-rows", rows=0, columns=5),
    Case("all-ignored", labels="all ignored"),
    Case("lone-row", rows=1, topology="pair"),
    Case("tiles", rows=1100, dim=33, labels="ignored", topology="pair", heavy=True),
    Case("tiles-columns", rows=40, columns=1700, dim=33, labels="ignored", heavy=True),
    Case("tiles-none", rows=1030, dim=33, reduction="none", topology="pair", heavy=True),
)
#: Of log-sum-exps over pairs; ``FIRST`` take all cases but those of several tiles, of which the
#: first one takes one.
OFTEN = {"memory", "none", "subset"}


def _grid() -> list:
    found = []
    for of in (*POLICIES, *ROWWISE):
        # Kernels of log-sum-exps over pairs differ by whether both directions have one logit.
        compiled = of in (*POLICIES, Tempered, Scales)
        for case in CASES:
            if case.applies(custom.spec(of())):
                rare = of not in FIRST and (of in POLICIES or case.name not in OFTEN)
                rare |= case.heavy and (of is not Everything or case.name != "tiles")
                marks = extended_if(not compiled or rare)
                name = f"{of.__name__}-{case.name}"
                found.append(pytest.param(of, case, torch.float32, id=name, marks=marks))
        name, marks = f"{of.__name__}-bfloat16", extended_if(of not in FIRST)
        found.append(pytest.param(of, CASES[2], torch.bfloat16, id=name, marks=marks))
    return found


@needs_native
@pytest.mark.parametrize(("of", "case", "dtype"), _grid())
def test_parity(of: type[policy.Policy], case: Case, dtype: torch.dtype) -> None:
    check_against_reference(NATIVE, make(of, case, dtype), dtype)


class _Shifted(policy.Class):
    """A negative's logit that depends on its class."""

    combine = "logsumexp"
    shift: policy.PerIdentity

    def positive(self, c):
        return c

    def negative(self, c):
        return c + self.shift


@needs_native
def test_a_target_does_not_raise_the_maximum() -> None:
    """As a negative it would, by so much that nothing was left of the others."""
    feats, weight, labels = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, -1])
    shift = torch.tensor([200.0, 0.0, 0.0, 0.0, 0.0], requires_grad=True)
    losses, gradients = [], []
    for backend in ("native", "reference"):
        given = {"shift": shift, "reduction": "none", "backend": backend}
        losses.append(fused_class_loss(_Shifted(), feats, weight, labels, **given))
        gradients += torch.autograd.grad(losses[-1].sum(), shift)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_policy
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=lambda case: case.name)
def test_parity_without_a_compiler(
    of: type[policy.Policy], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tiles in operations of Torch."""
    if not case.applies(custom.spec(of())):
        pytest.skip("a case of another topology")
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    check_against_reference(NATIVE, make(of, case), torch.float32)


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:.*Triton:RuntimeWarning")
@pytest.mark.parametrize(
    ("of", "kind"),
    [
        (Tempered, "in-batch"),
        (Tempered, "memory with gradient"),
        (Scales, "in-batch"),
        (Everything, "in-batch"),
        (Curricular, "classes"),
        (Triplets, "classes"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_on_a_device_memory_is_bounded_and_nothing_waits(
    of: type[policy.Policy], kind: str
) -> None:
    """In operations of Torch, tile by tile."""
    spec, case = custom.spec(of()), KINDS[kind]
    found = record(
        *(spec, case, torch.bfloat16, "native"),
        make=lambda case, spec, values, dtype, device: make(of, case, dtype, device),
    )
    assert found.tape.waits() == []
    assert found.tape.extra_bytes <= allowed_bytes(found.problem)


@each_policy
def test_gradients_of_the_reference(of: type[policy.Policy]) -> None:
    """Against central differences, in float64."""
    p = make(
        of,
        Case(
            "ad hoc", rows=6, dim=5, columns=7 if of.topology == "class" else None, labels="ignored"
        ),
    ).converted(torch.float64)
    leaves = p.leaves()

    def loss(*values: Tensor) -> Tensor:
        return p.loss("reference", **dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))


@needs_native
@each_policy
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_values_without_a_gradient(of: type[policy.Policy], backend: str) -> None:
    """The other gradients are the same whether variables have one or not."""
    p = make(of, Case("ad hoc", rows=9, columns=10, labels="ignored"))
    _, all_of_them = p.evaluate(backend)
    rows = p.rows.clone().requires_grad_()
    p.loss(backend, rows=rows).backward(p.upstream)
    torch.testing.assert_close(rows.grad, all_of_them["rows"])
    for name in p.variables:
        alone = p.variables[name].clone().requires_grad_()
        p.loss(backend, **{name: alone}).backward(p.upstream)
        torch.testing.assert_close(alone.grad, all_of_them[name])


@needs_native
@each_policy
def test_filtering_leaves_out_nothing(of: type[policy.Policy]) -> None:
    """Variables of any size have no bound to which a tolerance could be relative."""
    p = make(of, Case("ad hoc", rows=90, columns=100))
    _, want = p.evaluate("native")
    p.values = {**p.values, "skip_tolerance": 1e-3}
    _, found = p.evaluate("native")
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)


@needs_native
@each_policy
def test_a_retained_graph_and_numbers(of: type[policy.Policy]) -> None:
    p = make(of, Case("ad hoc", rows=9, columns=10))
    leaves = p.leaves()
    loss = p.loss("native", **leaves)
    loss.backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[name])
    numbers = dict.fromkeys(p.variables, 0.5)
    halves = {name: torch.full_like(value, 0.5) for name, value in p.variables.items()}
    torch.testing.assert_close(p.loss("native", **numbers), p.loss("native", **halves))


@needs_native
@pytest.mark.parametrize("of", FIRST, ids=lambda of: of.__name__)
def test_compiled(of: type[policy.Policy]) -> None:
    p = make(of, Case("ad hoc", rows=9, columns=10))
    _, eager = p.evaluate("native")
    leaves = p.leaves()
    compiled = torch.compile(lambda given: p.loss("native", **given), backend="aot_eager")
    compiled(leaves).backward(p.upstream)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager[name])


@needs_native
@pytest.mark.parametrize("backend", ["reference", "native"])
@each_policy
def test_what_is_not_finite(of: type[policy.Policy], backend: str) -> None:
    """A scalar or column makes all losses NaN, a row its own; of ignored samples nothing counts."""
    p = make(of, Case("ad hoc", rows=9, columns=10, labels="ignored", reduction="none"))
    plain, live = p.loss(backend), p.labels != -1
    for variable in p.spec.variables:
        if not variable.given:
            continue
        value = p.variables[variable.name].clone()
        if variable.kind == "row":
            value[0] = torch.nan  # ignored
            torch.testing.assert_close(p.loss(backend, **{variable.name: value}), plain)
            leaf = value.requires_grad_()
            p.loss(backend, **{variable.name: leaf}).sum().backward()
            assert bool(leaf.grad.isfinite().all())
            value = value.detach().clone()
            value[1] = torch.inf
            bad = torch.arange(9) == 1
        else:
            value[0] = torch.inf
            bad = live
        loss = p.loss(backend, **{variable.name: value})
        assert bool(loss[bad].isnan().all()), variable
        if variable.kind == "row" and p.columns is not None:
            torch.testing.assert_close(loss[~bad], plain[~bad])


def test_errors() -> None:
    rows, labels = torch.randn(5, 4), torch.tensor([0, 1, 0, 2, -1])
    given = {
        "of_row": torch.rand(5),
        "of_column": torch.rand(5),
        "of_identity": torch.rand(3),
        "factor": torch.ones(()),
    }

    def run(**changes: Any) -> None:
        fused_pair_loss(
            Everything(), rows, labels, b=0.0, backend="reference", **{**given, **changes}
        )

    run()
    for name, value, text in (
        ("of_row", torch.rand(4), r"of_row must have shape \(5,\), one per row"),
        ("of_column", torch.rand(5, 1), r"of_column must have shape \(5,\), one per column"),
        ("of_identity", torch.rand(2), r"labels must be in \[-1, 2\)"),
        ("of_identity", torch.rand(3, 1), r"of_identity must have shape \(K,\), one per identity"),
        ("factor", torch.ones(2), "factor must have one element"),
        ("factor", torch.ones((), device="meta"), "factor must be on the device of feats"),
    ):
        with pytest.raises(ValueError, match=text):
            run(**{name: value})
    with pytest.raises(TypeError, match="floating dtype"):
        run(of_row=torch.ones(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="got one for other"):
        run(other=torch.rand(5))
    misspelled: dict[str, Any] = {
        "of_rows" if name == "of_row" else name: given[name] for name in given
    }
    with pytest.raises(TypeError, match="got no value for of_row, and of_rows"):
        fused_pair_loss(Everything(), rows, labels, b=0.0, backend="reference", **misspelled)
    spec = custom.spec(Everything())
    samples = Samples(rows, labels, 0.0, None, None, None)
    with pytest.raises(TypeError, match=r"takes factor, of_row, .*, got no value for factor"):
        pair_call(spec, spec.defaults(), samples, Options("mean", "reference"))


def test_names_that_every_policy_has() -> None:
    with pytest.raises(policy.FormulaError, match="target_cosine is that of a row's class"):

        class OfPairs(policy.Pair):
            def negative(self, c):
                return c - self.target_cosine

    with pytest.raises(policy.FormulaError, match="row_norm is a name that every policy has"):

        class Own(policy.Class):
            row_norm: policy.PerRow

            def negative(self, c):
                return c * self.row_norm


def test_what_a_formula_of_the_row_reads() -> None:
    """One number per column is none of the row."""
    with pytest.raises(policy.FormulaError, match=r"finish may read .* alone, not of_column"):

        class OfColumn(policy.Pair):
            combine = "logsumexps"
            of_column: policy.PerColumn

            def negative(self, c):
                return c

            def finish(self, positives, negatives):
                return negatives * self.of_column
