"""Every fused backend against the float64 reference; see cases.py for the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import HALF, Case, build, parity_cases
from helpers import FUSED, Target, eager_precision
from tolerances import check_gradient, check_loss

from unitsface_kernels.losses import LossSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _grid() -> list:
    return [
        pytest.param(
            target, spec, values, case, dtype, id=f"{target}-{name}-{str(dtype).split('.')[1]}"
        )
        for target in FUSED
        for name, spec, values, case in parity_cases()
        for dtype in DTYPES
        if target.runs(dtype)
        and (dtype == torch.float32 or (case.name in HALF and not values))
        and not (case.heavy and target.interpreted)
    ]


@pytest.mark.parametrize(("target", "spec", "values", "case", "dtype"), _grid())
def test_parity(
    target: Target, spec: LossSpec, values: dict, case: Case, dtype: torch.dtype
) -> None:
    problem = build(case, spec, values, dtype, target.device)
    want_loss, want = problem.converted(torch.float64).evaluate("reference")
    with eager_precision(target, dtype):
        eager_loss, eager = problem.evaluate("reference")
    loss, gradients = problem.evaluate(target.backend)

    assert loss.dtype == torch.float32
    check_loss(loss, want_loss, eager_loss, dtype)
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == getattr(problem, name).dtype
        size = problem.gross()[name] if case.cancels else 0.0
        check_gradient(name, gradient, want[name], eager[name], dtype, size)
    if case.labels == "all ignored":
        assert not bool(loss.any())
        assert not any(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("target", FUSED, ids=str)
@pytest.mark.parametrize("name", ["columns", "none"])
def test_mixed_dtypes(target: Target, name: str) -> None:
    """bfloat16 features against float32 columns, as in training with a float32 classifier."""
    for _, spec, values, case in parity_cases():
        if case.name != name or values:
            continue
        problem = build(case, spec, values, torch.float32, target.device)
        mixed = replace(problem, rows=problem.rows.bfloat16())
        want_loss, want = mixed.converted(torch.float64).evaluate("reference")
        with eager_precision(target, torch.bfloat16):
            eager_loss, eager = mixed.evaluate("reference")
        loss, gradients = mixed.evaluate(target.backend)
        check_loss(loss, want_loss, eager_loss, torch.bfloat16)
        for key, gradient in gradients.items():
            assert gradient.dtype == getattr(mixed, key).dtype
            check_gradient(key, gradient, want[key], eager[key], torch.bfloat16)
