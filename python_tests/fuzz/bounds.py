"""Bounds of a result's distance from the float64 reference.

``tolerances.py`` moves every operation of the reference, which takes ten times as long. Here only
its operands are moved, by several units in the last place, and it is taken again: that measures
what depends on the case (scale, cancellation, ties, filters that a cosine lies next to). A floor
stands for the rounding of long sums and of the result. Results beyond it are checked by the rule
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from support.rounding import Precision, spreads
from support.tolerances import TINY, check
from torch import Tensor

#: Their losses jump where a negative's cosine passes a limit: rounding decides on either side.
JUMPS = {"curricularface", "mv_softmax", "filtered_margin_softmax"}
#: Relative moves of operands: some roundings of the GEMMs' dtype.
MOVES = {torch.float32: 2.0**-21, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
#: Of the largest change that two moves have found: another move may find a larger one.
LARGER = 6.0
#: Relative to the terms of a sum. In half precision: the root mean square of one rounding.
FLOORS = {torch.float32: 2e-6, torch.float16: 2.0**-11 / 3**0.5, torch.bfloat16: 2.0**-8 / 3**0.5}


def sharp(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> bool:
    """Whether some cosine is next to -1 or 1, where an angle has a vertical slope."""
    if not len(rows) or not len(columns):
        return False
    unit = [torch.nn.functional.normalize(t.detach().double(), dim=1) for t in (rows, columns)]
    near = {torch.float32: 1e-4, torch.float64: 1e-4}.get(dtype, 3e-2)
    return not float((unit[0] @ unit[1].T).abs().max()) < 1.0 - near


def off(
    name: str,
    got: Tensor,
    want: Tensor,
    eager: Tensor,
    moved: Sequence[Tensor],
    dtype: torch.dtype,
    size: float,
) -> str | None:
    """The error in ``got``, if any.

    Args:
        eager, moved: other computations of it; where one of them is not finite, either is right.
        size: of the terms that it is a sum of.
    """
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want, eager = got.double(), want.double(), eager.double()
    if not got.numel():
        return None
    finite = want.isfinite()
    for other in (*moved, eager):
        finite &= other.isfinite()
        if bool(((other.isnan() != want.isnan()) | (other.isinf() != want.isinf())).any()):
            return None
    same = torch.where(finite, got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    if not bool(same.all()):
        place = int(torch.nonzero(~same.flatten())[0])
        return f"{name}: {got.flatten()[place]:g} instead of {want.flatten()[place]:g}"
    got, want = (t.where(finite, 0.0) for t in (got, want))
    error = float((got - want).norm())
    limit = LARGER * max(float((m.double().where(finite, 0.0) - want).norm()) for m in moved)
    limit += FLOORS[dtype] * (float(want.norm()) + size) + TINY
    if error <= limit:
        return None
    return f"{name}: error {error:.3e}, allowed {limit:.3e}, of {float(want.norm()):.3e}"


def beyond(
    got: Mapping[str, Tensor],
    exact: Callable[[], dict[str, Tensor]],
    gemm_dtype: torch.dtype,
    backend: str,
) -> str | None:
    """The error by the rule of ``tolerances.py``, if any.

    Args:
        exact: evaluates the same in float64; what is not finite there is not compared.
        gemm_dtype: of the GEMMs' operands.
    """
    precision = Precision(gemm_dtype, truncated=backend == "triton")
    found = spreads(exact, precision, {name: t.dtype for name, t in got.items()})
    try:
        for name, spread in found.items():
            # Nor is what rounding makes infinite or NaN.
            if bool(spread.want.isfinite().all()) and math.isfinite(spread.norm):
                check(name, got[name], spread)
    except AssertionError as error:
        return str(error)
    return None
