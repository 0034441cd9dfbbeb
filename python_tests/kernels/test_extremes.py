"""The ends of what a user can pass, together: cosines of +-1, scales, thresholds, margins, norms.

cases.py has each of them with everything else at its default.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.cases import Case, build
from support.evaluation import check_against_reference
from support.grid import calls, extended_if
from support.helpers import FUSED, Target

from unitsface_kernels.losses import LossSpec

FEATURES = ("random", "axes", "identical", "zeros", "short")
# No negatives; no positives (of classes: a target each); one column. By number of columns.
LABELS = {"one": 5, "distinct": 9, "single": 1}
LARGE = {"scale": 256.0}
MARGINS = {"margin": 3.0, "m2": 3.0, "m3": 3.0}


def _cases(features: str) -> list[Case]:
    """Saturated and exact at once, and thresholds among the logits or far from all of them."""
    case = Case(features, columns=9, features=features)
    # At an angle of 0 the slope of an angular margin is 1e4, and so is rounding where terms cancel.
    margins = MARGINS | ({"m2": 0.0} if features == "identical" else {})
    large = replace(case, name=f"{features}-large", values=LARGE, threshold=200.0)
    return [
        large,
        replace(case, name=f"{features}-small", values={"scale": 1.0}, threshold=0.0),
        replace(case, name=f"{features}-margins", values=LARGE | margins, threshold=-200.0),
        *(
            replace(large, name=f"{features}-b{b:+g}", threshold=b, thresholds_only=True)
            for b in (-1000.0, 1000.0)
        ),
        *(
            replace(
                large,
                name=f"{features}-{labels}",
                labels="random" if labels == "single" else labels,
                columns=columns,
            )
            for labels, columns in LABELS.items()
        ),
    ]


CASES = [case for features in FEATURES for case in _cases(features)]
# For an interpreter: every end once.
INTERPRETED = {"axes-large", "axes-margins", "short-small", "zeros-b-1000", "random-b+1000"}
INTERPRETED |= {"identical-one", "zeros-single", "axes-distinct"}


def _grid() -> list:
    return [
        pytest.param(*call.values, case, id=f"{call.id}-{case.name}", marks=call.marks)
        for call in calls(FUSED)
        for case in CASES
        if case.applies(call.values[1])
        and (not call.values[0].interpreted or case.name in INTERPRETED)
    ]


@pytest.mark.parametrize(("target", "spec", "case"), _grid())
def test_ends_of_every_range(target: Target, spec: LossSpec, case: Case) -> None:
    loss, gradients = check_against_reference(
        target, build(case, spec, device=target.device), torch.float32
    )
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def _lengths() -> list:
    # The gradient of a feature of norm 1e-4 is beyond float16.
    kinds = [(1e-4, torch.bfloat16), (1e4, torch.bfloat16), (1e3, torch.float16)]
    kinds += [(1e-4, torch.float32), (1e15, torch.float32)]
    # Squares overflow.
    kinds += [(1e20, torch.float32), (1e36, torch.float32), (1e30, torch.bfloat16)]
    return [
        pytest.param(
            *call.values,
            *kind,
            columns,
            id=f"{call.id}-{kind[0]:g}-{kind[1]}-{columns}",
            marks=[*call.marks, *extended_if(columns is not None)],
        )
        for call in calls(FUSED)
        for kind in kinds
        for columns in (None, 9)
        if call.values[0].runs(kind[1])
    ]


@pytest.mark.parametrize(("target", "spec", "norm", "dtype", "columns"), _lengths())
def test_lengths_of_features(
    target: Target, spec: LossSpec, norm: float, dtype: torch.dtype, columns: int | None
) -> None:
    case = Case("", columns=columns, norm=norm, values={"scale": 16.0})
    loss, gradients = check_against_reference(
        target, build(case, spec, None, dtype, target.device), dtype
    )
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
