"""Factors of float16 gradient tiles."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from support.triton_tiles import DEVICE, make_call
from support.variables import Hardest, Shifts
from torch import Tensor

from unitsface_kernels.backends.streaming import Call, TileVariables
from unitsface_kernels.backends.triton import launch
from unitsface_kernels.backends.triton.scaling import set_scale
from unitsface_kernels.backends.triton.workspace import Workspace, shipped_config
from unitsface_kernels.losses import custom


def _space(of: type | None, dtype: torch.dtype = torch.float16) -> Workspace:
    rows = torch.zeros(4, 8, dtype=dtype, device=DEVICE)
    if of is None:
        call = make_call("uss", rows, scale=20.0)
    else:
        spec = custom.spec(of())
        static = (spec, (), "sum", "triton", dtype, None, 0.0, True, True, True)
        labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        call = Call(*static, rows=rows, row_labels=labels)
    return Workspace(call, shipped_config(call))


def _values(scalar: float, rows: list[float]) -> TileVariables:
    of_rows = torch.tensor([rows], device=DEVICE)
    return TileVariables(
        torch.tensor([scalar], device=DEVICE),
        of_rows,
        torch.empty(0, 3, device=DEVICE),
        of_rows[:, :3],
        torch.empty(0, len(rows), device=DEVICE),
    )


def _factor(limit: float) -> float:
    """Brings ``limit`` to at most 2^14."""
    return 2.0 ** math.floor(math.log2(2.0**14 / limit))


def _check(space: Workspace, limit: float) -> None:
    assert space.scale is not None
    assert space.inverse_scale is not None
    assert float(space.scale) == _factor(limit)
    assert float(space.scale * space.inverse_scale) == 1.0
    assert (space.scale.data_ptr() | space.inverse_scale.data_ptr()) % 16 == 0


@pytest.mark.parametrize(
    ("scalar", "rows", "slope"),
    [
        (0.5, [0.25, -0.75, 0.5, 0.1], 6 * 0.5 * 0.75),
        (3e-5, [2e-4, 1e-4, 1e-4], 6 * 3e-5 * 2e-4),
        # What is not a number is as if it were not there.
        (0.5, [0.25, math.nan, 0.5], 6 * 0.5 * 0.5),
        # Beyond what bounds of the host hold for.
        (1e6, [1e5, 1.0, 1.0], 6e11),
        (1e4, [1.0] * 2000 + [1e4], 6e8),
    ],
)
def test_factors_are_those_of_the_values(scalar: float, rows: list[float], slope: float) -> None:
    space, values = _space(Hardest), _values(scalar, rows)
    set_scale(space, 2, values)
    _check(space, 2 * slope)
    set_scale(space, 1, values)
    _check(space, slope)


def test_gradients_of_targets_count() -> None:
    space = _space(Shifts)
    values = TileVariables(
        torch.tensor([0.5], device=DEVICE),
        torch.tensor([[0.5, 0.25]], device=DEVICE),
        torch.zeros(1, 3, device=DEVICE),
    )
    for target, limit in ([0.1, -0.2], 2.0), ([0.1, -300.0], 300.0):
        set_scale(space, 1, values, target_gradient=torch.tensor(target, device=DEVICE))
        _check(space, limit)


def test_without_variables_the_bound_is_on_the_host() -> None:
    space = _space(None)
    set_scale(space, 2)
    _check(space, 40.0)
    set_scale(space, 1, target_gradient=torch.tensor([1e3, math.nan], device=DEVICE))
    _check(space, 1e3)


def test_a_scalar_that_is_not_a_number() -> None:
    """Gradients are not numbers, whatever they are multiplied by."""
    space = _space(Hardest)
    set_scale(space, 1, _values(math.nan, [1.0, 1.0, 1.0]))
    assert space.scale is not None
    assert bool((space.scale > 0.0) & space.scale.isfinite())


def test_a_factor_is_made_once() -> None:
    space, values = _space(Hardest), _values(0.5, [0.5, 0.25, 0.1])
    launches: list[Tensor] = []
    real = launch.run

    def run(*args, **options):
        launches.append(args[0])
        return real(*args, **options)

    with patch.object(launch, "run", run):
        for _ in range(2):
            set_scale(space, 1, values)
            set_scale(space, 2, values)
    assert len(launches) == 2


def test_other_dtypes_have_none() -> None:
    space = _space(Hardest, torch.float32)
    set_scale(space, 1, _values(0.5, [0.5, 0.5, 0.5]))
    assert space.scale is None
