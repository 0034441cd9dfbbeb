"""Users' losses on the CPU, compiled: as accurate as built-in ones, and known by their names."""

from __future__ import annotations

import time

import pytest
import torch
from support.cases import ALL_VARIANTS, CASES, HALF, THRESHOLDS, Case
from support.compiled import failure, needs_compiler
from support.evaluation import check_against_reference
from support.grid import extended_if
from support.helpers import Target
from support.policies import POLICIES, Contrastive, Unified, custom_problem, specs

from unitsface_kernels import fused_uss_loss, policy
from unitsface_kernels.losses import CUSTOM, REGISTRY, LossSpec, custom, find

NATIVE = Target("native", "cpu")

pytestmark = needs_compiler


def _grid() -> list:
    found = []
    for name, spec in specs().items():
        for case in CASES:
            if not case.applies(spec):
                continue
            of_threshold = "per column" in name and case.name in THRESHOLDS
            often = case.name in ALL_VARIANTS or of_threshold
            for dtype in (torch.float32, torch.bfloat16):
                if dtype == torch.float32 or case.name in HALF:
                    marks = extended_if(not often and not (case.heavy and dtype == torch.float32))
                    values = (spec, case, dtype)
                    kind = str(dtype).split(".")[1]
                    label = f"{name}-{case.name}-{kind}".replace(" ", "-")
                    found.append(pytest.param(*values, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("spec", "case", "dtype"), _grid())
def test_parity(spec: LossSpec, case: Case, dtype: torch.dtype) -> None:
    assert failure(spec) is None
    problem = custom_problem(case, spec, {}, dtype)
    loss, gradients = check_against_reference(NATIVE, problem, dtype)
    if case.labels == "all ignored":
        assert not bool(loss.any())
        assert not any(bool(gradient.any()) for gradient in gradients.values())


def test_results_are_those_of_the_built_in_loss() -> None:
    """The same formula, compiled by the same compiler or not, in the same loops."""
    p = custom_problem(Case("ad hoc", rows=300, dim=64), custom.spec(Unified()))
    rows, other = (p.rows.clone().requires_grad_() for _ in range(2))
    mine = p.loss("native", rows=rows)
    built_in = fused_uss_loss(other, p.labels, p.b, scale=16.0, margin=0.1, backend="native")
    mine.backward()
    built_in.backward()
    torch.testing.assert_close(mine, built_in)
    torch.testing.assert_close(rows.grad, other.grad)


@pytest.mark.parametrize("name", list(specs()))
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    """Loops run on the extension's threads; nothing else is started."""
    p = custom_problem(Case("ad hoc", rows=201, columns=333, dim=32), specs()[name])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(p.evaluate("native"))
    finally:
        torch.set_num_threads(before)
    loss, gradients = results[0]
    for other, others in results[1:]:
        assert torch.equal(other, loss)
        assert all(torch.equal(others[n], g) for n, g in gradients.items())


def test_a_loss_is_an_operator_of_torch() -> None:
    """Under a dispatch mode, and by its name alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    p = custom_problem(Case("ad hoc", rows=40), custom.spec(Contrastive()))
    want, gradients = p.evaluate("native")
    with Watch():
        loss, found = p.evaluate("native")
    assert torch.equal(loss, want)
    assert torch.equal(found["rows"], gradients["rows"])


def test_losses_are_found_by_name() -> None:
    for instance in POLICIES:
        spec = custom.spec(instance)
        assert find(spec.name) is spec is custom.spec(type(instance)())
        assert spec.name in CUSTOM
        assert spec.name not in REGISTRY
    assert find("uss") is REGISTRY["uss"]
    with pytest.raises(LookupError, match="no loss 'other'"):
        find("other")


def test_a_name_says_what_the_formula_is() -> None:
    """Constants that agree in their first digits are different formulas."""

    def made(constant: float, default: float = 0.4):
        class Same(policy.Pair):
            margin: policy.Number = default

            def positive(self, c):
                return constant - c

            def negative(self, c):
                return policy.maximum(c - self.margin, 0)

        return custom.spec(Same()).name

    assert made(1.0) == made(1.0)
    assert len({made(1.0), made(1.0000001), made(1.0, 0.3)}) == 3


def test_the_digest_of_shared_terms_is_short_work() -> None:
    class Deep(policy.Pair):
        def positive(self, c):
            return 1 - c

        def negative(self, c):
            for _ in range(60):
                c = 0.5 * (c + policy.square(c))
            return c

    start = time.process_time()
    custom.digest(Deep.formula)
    assert time.process_time() - start < 5.0
