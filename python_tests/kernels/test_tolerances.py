"""The rule of tolerances.py from both sides: other roundings stay below it, faults do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.cases import CASES, Problem, build, problem
from support.evaluation import expected
from support.grid import FIRST, extended_if, parity_cases
from support.helpers import FUSED, Target
from support.rounding import Rounded, Spread, spreads
from support.tolerances import check, check_all
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels.backends import reference
from unitsface_kernels.losses import REGISTRY

EAGER = Target("reference", "cpu")
# Large scales, slopes of margins, terms that cancel, long sums.
NAMES = {
    "base",
    "columns",
    "scale-256",
    "dim-one",
    "identical",
    "odd-dim",
    "axes",
    "threshold-1000",
}
CALLS = [
    pytest.param(spec, values, case, id=name, marks=extended_if(bool(values) or spec not in FIRST))
    for name, spec, values, case in parity_cases()
    if case.name in NAMES
]


def _evaluated(p: Problem, backend: str) -> dict[str, Tensor]:
    loss, gradients = p.evaluate(backend)
    return {"loss": loss, **gradients}


@pytest.mark.parametrize(("spec", "values", "case"), CALLS)
def test_any_order_of_adding_is_well_below_the_limit(spec, values, case) -> None:
    """Permuted dimensions change the last bits as another processor would."""
    p = build(case, spec, values)
    want = expected(EAGER, p, torch.float32)
    backends = {"reference", *(target.backend for target in FUSED if not target.interpreted)}
    for seed in range(4):
        order = torch.randperm(case.dim, generator=torch.Generator().manual_seed(seed))
        columns = None if p.columns is None else p.columns[:, order]
        moved = replace(p, rows=p.rows[:, order], columns=columns)
        for backend in sorted(backends):
            found = _evaluated(moved, backend)
            for name in ("rows", "columns"):
                if name in found:
                    found[name] = found[name][:, torch.argsort(order)]
            check_all(found, want, computations=0.6)


def _operands_in_bfloat16(p: Problem) -> dict[str, Tensor]:
    def cosines(rows: Tensor, columns: Tensor) -> Tensor:
        unit = [F.normalize(t, dim=1, eps=reference.NORM_EPS) for t in (rows, columns)]
        return unit[0].bfloat16().float() @ unit[1].bfloat16().float().T

    with mock.patch.object(reference, "cosines", cosines):
        return _evaluated(p, "reference")


def _without_a_column(p: Problem) -> dict[str, Tensor]:
    """The last negative of the first row that has a loss is not compared."""
    of = reference.pair_masks

    def masks(*arguments) -> tuple[Tensor, Tensor]:
        positive, negative = of(*arguments)
        row = int(negative.any(dim=1).nonzero()[0])
        negative[row, int(negative[row].nonzero()[-1])] = False
        return positive, negative

    with mock.patch.object(reference, "pair_masks", masks):
        return _evaluated(p, "reference")


def _with_a_wrong_term(p: Problem) -> dict[str, Tensor]:
    """One cosine of the first row that has negatives is that of its neighbor."""
    of = reference.cosines

    def cosines(rows: Tensor, columns: Tensor) -> Tensor:
        found = of(rows, columns)
        at = int((p.labels != -1).nonzero()[0])
        return found.index_put((torch.tensor(at),), found[at].roll(1))

    with mock.patch.object(reference, "cosines", cosines):
        return _evaluated(p, "reference")


def _gradient(change: Callable[[Tensor], Tensor]) -> Callable[[Problem], dict[str, Tensor]]:
    def evaluate(p: Problem) -> dict[str, Tensor]:
        found = _evaluated(p, "reference")
        return found | {name: change(found[name]) for name in ("rows", "columns")}

    return evaluate


FAULTS = {
    "operands in bfloat16": _operands_in_bfloat16,
    "a missing column": _without_a_column,
    "a wrong term": _with_a_wrong_term,
    "gradients in bfloat16": _gradient(lambda g: g.bfloat16().float()),
    "gradients off by a thousandth": _gradient(lambda g: g * 1.001),
    "no projection": _gradient(lambda g: g + 1e-3 * g.norm() / g.numel() ** 0.5),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_faults_are_caught(spec, fault: str) -> None:
    # Cosines and a scale at which every pair has an effect; nearest: more pairs than columns.
    values = {"scale": 8.0, "k": 64, "margin": 0.5}
    values = {name: value for name, value in values.items() if name in spec.defaults()}
    p = problem(spec, rows=12, columns=9, dim=32, values=values, threshold=2.0)
    want = expected(EAGER, p, torch.float32)
    check_all(_evaluated(p, "reference"), want, computations=0.5)
    with pytest.raises(AssertionError, match="allowed"):
        check_all(FAULTS[fault](p), want)


def test_half_precision_is_caught_above_its_own_rounding() -> None:
    p = problem(REGISTRY["margin_softmax"], rows=12, columns=9, dim=32, values={"scale": 8.0})
    half = p.converted(torch.bfloat16)
    want = expected(Target("triton", "cuda"), half, torch.bfloat16)
    check_all(_operands_in_bfloat16(half), want)
    with pytest.raises(AssertionError, match="allowed"):
        check_all(_gradient(lambda g: g * 1.05)(half), want)


def test_exact_results_have_no_rounding() -> None:
    powers = torch.tensor([1.0, 0.5, -2.0, 0.0], dtype=torch.float64)
    found = spreads(lambda: {"x": (powers * 4.0 + 1.0).sum(), "y": powers / 3.0})
    assert found["x"].norm == 0.0
    assert 0 < found["y"].norm < 1e-7
    check("x", torch.tensor(2.0), found["x"])


def test_not_a_number_is_not_below_a_limit() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check("x", one * torch.nan, Spread(one, 1.0, 1.0))


def test_rounding_is_the_same_every_time() -> None:
    """On every processor: float64 and stored signs."""
    case = next(case for case in CASES if case.name == "columns")
    p = build(case, REGISTRY["sphereface2"])
    first, again = (expected(EAGER, p, torch.float32) for _ in range(2))
    for name, spread in first.items():
        assert spread.norm == pytest.approx(again[name].norm, rel=1e-6)


def test_a_long_sum_errs_with_the_root_of_its_length() -> None:
    terms = torch.full((3000,), 1.1, dtype=torch.float64)
    with Rounded(0, None):
        error = float(terms.sum() - 3300.0)
    assert abs(error) == pytest.approx(3300 * 2**-24 * (2 * 2999 / 3) ** 0.5, rel=0.1)
