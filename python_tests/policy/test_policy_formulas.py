"""Random formulas: derivatives, kernel form, host and eager meaning, NaN."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.formulas import PARAMS, Rounding, bindings, close, cosines, policy_of, tree

from unitsface_kernels import policy
from unitsface_kernels.policy.cpp import cpp_struct
from unitsface_kernels.policy.derive import derivative
from unitsface_kernels.policy.eager import evaluate
from unitsface_kernels.policy.expression import Expression, build, node, topological, value_of
from unitsface_kernels.policy.form import POSITIVE, KernelForm, kernel_form, term_of
from unitsface_kernels.policy.formula import COSINE, THRESHOLD, Formula
from unitsface_kernels.policy.operations import OPERATIONS
from unitsface_kernels.policy.triton_source import triton_module


@st.composite
def trees(draw: st.DrawFn, depth: int = 4) -> tuple:
    return tree(lambda count: draw(st.integers(0, count - 1)), depth)


for_formulas = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@for_formulas
@given(trees())
def test_the_symbolic_derivative_is_that_of_autograd(drawn: tuple) -> None:
    formula = policy_of(drawn, None).formula
    assert formula.positive is not None
    for params in PARAMS:
        leaves = bindings(formula, params, cosines().requires_grad_(), 0.6)
        leaves[THRESHOLD] = leaves[THRESHOLD].expand(61).clone().requires_grad_()
        value = evaluate(formula.positive, leaves).expand(61).sum()
        if not value.requires_grad:
            value = value + 0.0 * leaves[COSINE].sum()
        wanted = torch.autograd.grad(
            value, (leaves[COSINE], leaves[THRESHOLD]), allow_unused=True, materialize_grads=True
        )
        for by, want in zip((COSINE, THRESHOLD), wanted, strict=True):
            slope = derivative(formula.positive, by)
            # Kinks, where the sides differ: rounding in float64 may decide differently.
            rounding = Rounding(
                [formula.positive, slope], {k: v.detach() for k, v in leaves.items()}
            )
            got = evaluate(slope, leaves).detach().expand(61)
            error = (got - want).abs() / (1.0 + want.abs())
            assert bool(((error < 1e-9) | ~rounding.stable).all())


def _host(e: Expression, leaves: dict[Expression, float]) -> float:
    values: dict[Expression, float] = {}
    for inner in topological(e):
        if inner.op == "leaf":
            values[inner] = leaves[inner]
        elif inner.op == "const":
            values[inner] = inner.payload if inner.mask else value_of(inner)
        else:
            values[inner] = OPERATIONS[inner.op].host(*(values[arg] for arg in inner.args))
    return values[e]


@for_formulas
@given(trees())
def test_the_host_computes_what_torch_does(drawn: tuple) -> None:
    e = policy_of(drawn, None).formula.positive
    formula = policy_of(drawn, None).formula
    assert e is not None
    for params in PARAMS:
        leaves = bindings(formula, params, cosines(9), 0.6)
        want = evaluate(e, leaves).expand(9)
        for place, cosine in enumerate(cosines(9).tolist()):
            numbers = {key: float(value) for key, value in leaves.items() if key is not COSINE}
            got = _host(e, {**numbers, COSINE: cosine})
            stable = Rounding([e], leaves).stable.expand(9)[place]
            assert abs(got - float(want[place])) <= 1e-9 * (1.0 + abs(got)) or not stable


def _kernel_values(
    form: KernelForm, e: Expression, params: tuple[float, ...], cosine: torch.Tensor, positive: bool
) -> torch.Tensor:
    """An output of the form, in float64 from the constants that kernels receive."""
    constants = zip(form.uniforms, form.constants(params), strict=True)
    leaves: dict[Expression, torch.Tensor | float] = {
        k: torch.tensor(bool(v)) if k.mask else torch.tensor(v, dtype=torch.float64)
        for k, v in constants
    }
    leaves |= {COSINE: cosine, THRESHOLD: torch.tensor(0.6).double()}
    return evaluate(e, leaves | {POSITIVE: torch.tensor(positive)}).expand_as(cosine)


def _terms(formula: Formula, positive: bool) -> tuple[Expression, Expression, Expression]:
    value = term_of(formula, positive)
    return value, derivative(value, COSINE), derivative(value, THRESHOLD)


@for_formulas
@given(trees(3), trees(3), st.sampled_from(["sum", "softplus"]), st.booleans())
def test_the_kernel_form_is_the_formula(yes: tuple, no: tuple, combine: str, linear: bool) -> None:
    if linear:
        yes, no = (("sub", drawn, ("leaf", "threshold")) for drawn in (yes, no))
    formula = policy_of(yes, no, combine).formula
    form = kernel_form(formula)
    assert form.term is not None
    for params in PARAMS:
        for positive in (True, False):
            wanted = _terms(formula, positive)
            rounding = Rounding(list(wanted), bindings(formula, params, cosines(), 0.6))
            outputs = form.term.value, form.term.dcosine, form.term.dthreshold
            for e, want in zip(outputs, wanted, strict=True):
                got = _kernel_values(form, e, params, cosines(), positive)
                # In float64: a thousandth of what is allowed in float32.
                assert bool(close(got, rounding, want, factor=0.004).all())


@for_formulas
@given(trees())
def test_a_cosine_that_is_not_a_number_gives_none(drawn: tuple) -> None:
    """Wherever the value depends on the cosine at all: after simplification, and in kernels."""
    formula = policy_of(drawn, drawn).formula
    form = kernel_form(formula)
    assert formula.positive is not None
    assert form.term is not None
    nan = torch.tensor([torch.nan], dtype=torch.float64)
    for params in PARAMS:
        got = evaluate(formula.positive, bindings(formula, params, nan, 0.6))
        if "cosine" in formula.positive.reads:
            assert bool(got.isnan())
            if "cosine" in form.term.value.reads:
                assert bool(_kernel_values(form, form.term.value, params, nan, True).isnan())


@for_formulas
@given(trees(3), trees(3), st.sampled_from(sorted(OPERATIONS)))
def test_simplification_changes_no_value(x: tuple, y: tuple, op: str) -> None:
    formula = policy_of(x, y).formula
    operation = OPERATIONS[op]
    mask = formula.positive < formula.negative  # type: ignore[operator]
    numbers = iter([formula.positive, formula.negative, formula.positive])
    args = [mask if wanted else next(numbers) for wanted in operation.masks(operation.arity)]
    leaves = bindings(formula, PARAMS[0], cosines(), 0.6)
    plain = evaluate(node(op, tuple(args), mask=operation.gives_mask), leaves)
    simple = evaluate(build(op, *args), leaves)
    if operation.gives_mask:
        assert torch.equal(plain.expand(61), simple.expand(61))
    else:
        torch.testing.assert_close(
            plain.expand(61), simple.expand(61), rtol=1e-12, atol=1e-12, equal_nan=True
        )


@pytest.mark.parametrize("x", [0.0, 1e-39, 1.2e-38, 0.5])
def test_the_slope_of_a_logarithm_next_to_zero(x: float) -> None:
    value = policy.log(COSINE)
    leaves = {COSINE: torch.tensor(x, dtype=torch.float64, requires_grad=True)}
    (got,) = torch.autograd.grad(evaluate(value, leaves), leaves[COSINE])
    torch.testing.assert_close(got, evaluate(derivative(value, COSINE), leaves))


def test_shared_terms_of_numbers_are_written_once() -> None:
    class Iterated(policy.Pair):
        start: policy.Number = 2.0

        def negative(self, c):
            x = self.start
            for _ in range(40):
                x = 0.5 * (x + 2 / x)
            return x * c + policy.exp(x)

    formula = Iterated.formula
    for text in (cpp_struct(formula, "Iterated"), triton_module(formula)):
        assert len(text) < 5000
    slope, offset = kernel_form(formula).constants((2.0,))
    assert slope == pytest.approx(2.0**0.5)
    assert offset == pytest.approx(math.exp(slope))


@pytest.mark.parametrize("exponent", range(17))
def test_whole_powers_of_negative_numbers(exponent: int) -> None:
    power = evaluate(policy.pow(COSINE, exponent), {COSINE: cosines()}).expand(61)
    torch.testing.assert_close(power, cosines() ** exponent)


def test_threads_share_nodes() -> None:
    """A node that two of them make at once is one object, by whose identity kernels find it."""
    barrier = threading.Barrier(4)

    def made(_: int) -> list[Expression]:
        barrier.wait()
        return [node("const", payload=1000.0 + i) for i in range(10000)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            of_threads = list(pool.map(made, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert all(len(set(map(id, same))) == 1 for same in zip(*of_threads, strict=True))


def test_copies_of_expressions_are_the_expressions() -> None:
    """Facts about a formula are looked up by the identity of its nodes."""
    formula = policy_of(("exp", ("leaf", "cosine")), None).formula
    assert copy.deepcopy(formula).positive is formula.positive
    restored = pickle.loads(pickle.dumps(formula))
    assert restored.positive is formula.positive
    assert restored.numbers == formula.numbers
