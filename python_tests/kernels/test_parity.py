"""Every fused backend against the float64 reference; see cases.py for the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases import HALF, Case, build, problem
from support.evaluation import check_against_reference
from support.grid import (
    FIRST,
    compiled_first,
    extended_if,
    interpreted,
    interpreted_first,
    parity_cases,
    small,
)
from support.helpers import FUSED, Target
from support.tolerances import SAME_LOSS, check_same, conversion

from unitsface_kernels.losses import REGISTRY, LossSpec

# Half precision is a matter of GEMMs and conversions, a driver's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _grid() -> list:
    return [
        pytest.param(
            *(target, spec, values, small(case) if target.interpreted else case, dtype),
            id=f"{target}-{name}-{str(dtype).split('.')[1]}",
            marks=extended_if(
                not interpreted_first(spec, values, case, dtype)
                if target.interpreted
                else not compiled_first(spec, values, case, dtype)
            ),
        )
        for target in FUSED
        for name, spec, values, case in parity_cases()
        for dtype in DTYPES
        if target.runs(dtype)
        and (dtype == torch.float32 or (case.name in HALF and not values and spec in FIRST))
        and (not target.interpreted or interpreted(spec, values, case, dtype))
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("target", "spec", "values", "case", "dtype"), _grid())
def test_parity(
    target: Target, spec: LossSpec, values: dict, case: Case, dtype: torch.dtype
) -> None:
    problem = build(case, spec, values, dtype, target.device)
    loss, gradients = check_against_reference(target, problem, dtype)
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
        sized = small(case) if target.interpreted else case
        problem = build(sized, spec, values, torch.float32, target.device)
        check_against_reference(
            target, replace(problem, rows=problem.rows.bfloat16()), torch.bfloat16
        )


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in FUSED if not t.interpreted], ids=str)
def test_offsets_beyond_32_bits(target: Target) -> None:
    """Columns of more than 2^31 elements, of which all but the last few take no part."""
    size, few = 64, 3
    count = 2**31 // size + few
    # Pages of zeros that are only read take no memory.
    columns = torch.zeros(count, size, dtype=torch.bfloat16, device=target.device)
    columns[-few:] = torch.randn(few, size)
    last = columns[-few:].clone()
    for spec in REGISTRY.values():
        small = problem(spec, target.device, rows=4, columns=few, dim=size)
        small.rows, small.columns = small.rows.bfloat16(), last
        small.column_gradient = False
        large = replace(small, columns=columns)
        if spec.topology == "pair":
            labels = torch.full((count,), -1, device=target.device)
            labels[-few:] = small.column_labels
            large.column_labels = labels
        else:
            large.index = torch.arange(count - few, count, device=target.device)
        loss, gradients = large.evaluate(target.backend)
        want_loss, want = small.evaluate(target.backend)
        check_same("loss", loss, want_loss, SAME_LOSS)
        check_same("rows", gradients["rows"], want["rows"], conversion(torch.bfloat16))
