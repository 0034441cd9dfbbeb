"""Scaling of float16 gradient tiles: a power of two that stays on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streaming import TileVariables
from . import launch
from .configs import RANGE
from .kernels.scale import scale_kernel
from .losses import bound_function
from .variables import Given, counts
from .workspace import Workspace

#: Of the columns and of the rows of a tile.
Thresholds = tuple[Tensor | None, Tensor | None]


def set_scale(
    space: Workspace,
    directions: int,
    variables: TileVariables | None = None,
    thresholds: Thresholds = (None, None),
    target_gradient: Tensor | None = None,
) -> None:
    """Picks the power of two that brings a tile's gradients to the top of float16's range; without
    a factor the many tiny gradients of a softmax would be flushed to zero. Other dtypes have none.

    The bound holds for pairs whose weights are at most 1, as they are in float16 calls.

    Args:
        space: of the call, which gets the factor.
        directions: in which a pair counts, 1 or 2.
        variables, thresholds: of the tile, of which the bound is made; thresholds of a formula that
            reads them.
        target_gradient: (n,) of targets, which may be larger, with the slope of a margin in them.
    """
    if space.call.compute_dtype != torch.float16:
        return
    if variables is None:
        # The host's bound has any of them.
        thresholds = None, None
    # One per block of rows: the same block comes with every wave of columns.
    tensors = [
        t for t in (target_gradient, *Given.of(variables), *thresholds) if isinstance(t, Tensor)
    ]
    key = (directions, *((t.data_ptr(), t.shape) for t in tensors))
    if key not in space.scales:
        out = space.empty(8)
        _launch(out, space, directions, variables, thresholds, target_gradient)
        # With the tensors, so that no other one gets their addresses.
        space.scales[key] = out, tensors
    found, _ = space.scales[key]
    # Aligned to 16 bytes, both of them.
    space.scale, space.inverse_scale = found[:1], found[4:5]


def _launch(
    out: Tensor,
    space: Workspace,
    directions: int,
    variables: TileVariables | None,
    thresholds: Thresholds,
    target_gradient: Tensor | None,
) -> None:
    call, known = space.call, space.call.spec.slope_bound(space.call.params)
    sizes, bound = (0, 0), None
    constants: tuple[float, ...] = ()
    if variables is not None:
        assert call.spec.formula is not None
        generated = bound_function(call.spec.formula)
        bound, constants = generated.function, generated.constants(call.params)
        sizes = variables.a_rows.shape[1], variables.b_columns.shape[1]
    launch.run(
        scale_kernel,
        1,
        out,
        target_gradient,
        0 if target_gradient is None else len(target_gradient),
        *sizes,
        *Given.of(variables),
        *(x for t in thresholds[::-1] for x in (t, 0 if t is None else len(t))),
        float(directions),
        known,
        constants,
        BOUND=bound,
        **counts(variables),
        BLOCK=RANGE.block,
        num_warps=RANGE.num_warps,
    )
