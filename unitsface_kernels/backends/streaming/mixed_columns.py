"""Comparison with mixed columns: each tile of them is mixed when it is read, see ``mixing.py``."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .call import Call
from .engine import Engine
from .engine_parts import UnitColumns


def with_mixing(engine: Engine, call: Call) -> Engine:
    """The engine of a pass, which mixes the columns of the call if that has anything to mix."""
    return engine if call.mixing is None else cast(Engine, _MixedColumns(engine, call))


class _Mixed(NamedTuple):
    """Mixed columns (m, D), their shares (m,), and the inverse norms (m,) of the raw ones."""

    columns: Tensor
    share: Tensor
    inverse_norms: Tensor
    start: int
    taken: Tensor | None

    def of(self, start: int, stop: int, index: Tensor | None) -> bool:
        """Whether these are columns ``start:stop``, of ``index``."""
        same = self.start == start and len(self.columns) == stop - start
        return same and self.taken is index


class _MixedColumns(UnitColumns):
    """Another engine's tiles on mixed columns.

    Norms are those of the mixed columns; the gradient of these reaches the raw ones through both
    normalizations.
    """

    def __init__(self, engine: Engine, call: Call) -> None:
        assert call.columns is not None
        assert call.mixing is not None
        assert call.centers == 1
        self._engine = engine
        self._source, self._mixing = call.columns, call.mixing
        self._last: _Mixed | None = None

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
        if source is not self._source:
            return self._engine.normalize_rows(source, start, stop, index, reuse)
        self._last = None
        mixed = self._last = self._mixed(start, stop, index)
        return self._engine.normalize_rows(mixed.columns, 0, stop - start, None, reuse)

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
        backward = self._engine.normalize_rows_backward
        if source is not self._source:
            backward(d_unit, source, start, inverse_norms, out, scale, index, raw)
            return
        assert not raw
        # A tile of gradients mostly follows its columns.
        mixed, self._last = self._last, None
        if mixed is None or not mixed.of(start, start + len(d_unit), index):
            mixed = self._mixed(start, start + len(d_unit), index)
        backward(d_unit, mixed.columns, 0, inverse_norms, d_unit, scale)
        d_raw, share = torch.empty_like(d_unit), mixed.share[:, None]
        backward(d_unit, source, start, mixed.inverse_norms, d_raw, None, index)
        out.copy_(torch.where(share > 0.0, d_raw.mul_(1.0 - share), d_unit))

    def _mixed(self, start: int, stop: int, index: Tensor | None) -> _Mixed:
        place = slice(start, stop) if index is None else index[start:stop]
        # In memory of its own: the norms of a tile in use lie in the one that is used again.
        _, inverse_norms = self._engine.normalize_rows(self._source, start, stop, index)
        rows, share = (t.to(torch.float32) for t in self._mixing.part(start, stop, index))
        own = torch.where(share > 0.0, (1.0 - share) * inverse_norms, 1.0)
        columns = self._source[place].to(torch.float32) * own[:, None]
        columns.addcmul_(rows, share[:, None])
        return _Mixed(columns, share, inverse_norms, start, index)
