"""Comparison by inner products: rows and columns stay as they are, see ``LossSpec.normalize``."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from .call import Call
from .engine import Engine
from .engine_parts import UnitRows


def for_call(engine: Engine, call: Call) -> Engine:
    """The engine of a pass, whose "unit" rows are at unit length only if the loss normalizes."""
    return engine if call.spec.normalize else cast(Engine, _AsTheyAre(engine))


class _AsTheyAre(UnitRows):
    """Another engine's tiles on rows that are not normalized; their norms are the true ones.

    So a tile's cosines are inner products, and a gradient of the "unit" rows that of the rows.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        # Norms show which rows are not finite, and formulas read them. The other engine chooses
        # the dtype and the strides of its tiles' rows.
        rows, inverse_norms = self._engine.normalize_rows(source, start, stop, index, reuse)
        rows.copy_(_rows(source, start, stop, index))
        # All of a row is NaN where some is infinite, as at unit length: terms could be finite.
        return rows.add_((inverse_norms * 0.0)[:, None]), inverse_norms

    def normalize_rows_backward(
        self,
        d_unit: Tensor,
        source: Tensor,
        start: int,
        inverse_norms: Tensor,
        out: Tensor,
        scale: Tensor | None = None,
        index: Tensor | None = None,
        raw: bool = False,
    ) -> None:
        assert not raw
        if scale is not None:
            d_unit.mul_(scale)
        if out is not d_unit:
            out.copy_(d_unit)


def _rows(source: Tensor, start: int, stop: int, index: Tensor | None) -> Tensor:
    return source[start:stop] if index is None else source[index[start:stop]]
