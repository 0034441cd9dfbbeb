"""Gradients of single pairs: one column per row, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from .call import Call
from .engine import Engine
from .selection import SortedTargets
from .tiles import blocks


def add_pairs(
    call: Call,
    engine: Engine,
    unit: Tensor,
    place: Tensor,
    slope: Tensor,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    scale: Tensor | None = None,
) -> None:
    """Adds d loss / d cosine ``slope`` (N,) of every row with the column at ``place`` (N,).

    Args:
        unit: (N, D) unit rows.
        place: positions among the columns; below 0: none.
        slope: 0 takes a pair out, also where its cosine is NaN or its place is none.
        d_rows: (N, D) gradient of the unit rows, or None.
        d_columns: (M or K, D) gradient of the columns themselves (of their vectors), or None.
        scale: () factor of what is added to ``d_columns``.
    """
    assert call.columns is not None
    if call.num_columns == 0:
        # There is no column that could stand in for a place that is none.
        return
    place = place.to(torch.int64).clamp(0, call.num_columns - 1)
    place = attained(call, engine, unit, place)
    index = place if call.vector_index is None else call.vector_index[place]
    unit_columns, norms = engine.normalize_rows(call.columns, 0, unit.shape[0], index, reuse=True)
    slope, taken = slope[:, None], (slope != 0.0)[:, None]
    if d_rows is not None:
        d_rows += torch.where(taken, slope * unit_columns, 0.0)
    if d_columns is not None:
        d_unit = torch.where(taken, slope * unit, 0.0)
        # The Jacobian is linear: applied to each pair's share, it is applied to their sum.
        engine.normalize_rows_backward(d_unit, call.columns, 0, norms, d_unit, scale, index)
        add_rows(d_columns, place, d_unit)


def attained(call: Call, engine: Engine, unit: Tensor, place: Tensor) -> Tensor:
    """(N,) positions among the vectors of the columns: of every row that of the largest cosine, the
    first of equal ones, with the column at ``place`` (N,).
    """
    if call.centers == 1:
        return place
    cosines = torch.stack(list(_cosines(call, engine, unit, place)))
    return place * call.centers + cosines.argmax(dim=0)


def _attained_or_none(call: Call, engine: Engine, unit: Tensor, place: Tensor) -> Tensor:
    """Positions of the attaining vectors; places below 0 stay."""
    found = attained(call, engine, unit, place.to(torch.int64).clamp(min=0))
    return torch.where(place < 0, place, found)


def cosines_at(call: Call, engine: Engine, unit: Tensor, place: Tensor) -> Tensor:
    """(N,) float32 cosines of rows with the column at ``place`` (N,) of each."""
    return reduce(torch.maximum, _cosines(call, engine, unit, place))


def _cosines(call: Call, engine: Engine, unit: Tensor, place: Tensor) -> Iterator[Tensor]:
    """(N,) cosines with each vector of the columns in turn."""
    assert call.columns is not None
    for center in range(call.centers):
        index = place * call.centers + center
        index = index if call.vector_index is None else call.vector_index[index]
        vectors, _ = engine.normalize_rows(call.columns, 0, unit.shape[0], index, reuse=True)
        yield torch.linalg.vecdot(unit.to(torch.float32), vectors.to(torch.float32))


class Targets:
    """The columns' side of :func:`add_pairs`, added tile by tile in float32.

    A gradient in the dtype of the columns would be rounded once more for every row added to it.
    """

    def __init__(
        self, call: Call, engine: Engine, unit: Tensor, place: Tensor, slope: Tensor
    ) -> None:
        """Arguments as of :func:`add_pairs`. Waits for the device."""
        self._call, self._engine = call, engine
        taken = torch.nonzero(slope != 0.0).flatten()
        self._places, row = torch.unique(place[taken].to(torch.int64), return_inverse=True)
        self._d_unit = unit.new_zeros((len(self._places), unit.shape[1]), dtype=torch.float32)
        add_rows(self._d_unit, row, slope[taken, None] * unit[taken])

    def parts(self, tiles: list[slice]) -> list[slice]:
        """The targets that lie in each of the tiles, which follow one another."""
        stops = torch.tensor([tile.stop for tile in tiles], dtype=torch.int64).to(self._places)
        bounds = [0, *torch.searchsorted(self._places, stops).tolist()]
        return [slice(*pair) for pair in pairwise(bounds)]

    def add(self, part: slice, tile: slice, d_unit: Tensor, factors: Tensor | None) -> None:
        """Adds to the gradient (m, D) of a tile's unit columns, which is times ``factors`` (m,)."""
        place, own = self._places[part] - tile.start, self._d_unit[part]
        d_unit[place] += own if factors is None else factors[place, None] * own

    def write(self, part: slice, d_columns: Tensor, scale: Tensor | None) -> None:
        """Writes the gradient of the columns of a tile that has no other gradient."""
        if part.start == part.stop:
            return
        call, place, d_unit = self._call, self._places[part], self._d_unit[part]
        assert call.columns is not None
        index = place if call.column_index is None else call.column_index[place]
        _, norms = self._engine.normalize_rows(call.columns, 0, len(place), index, reuse=True)
        self._engine.normalize_rows_backward(d_unit, call.columns, 0, norms, d_unit, scale, index)
        d_columns[place] = d_unit.to(d_columns.dtype)


class DeviceTargets:
    """:class:`Targets` by kernels of the engine, whose launches do not depend on places."""

    def __init__(self, engine: Engine, unit: Tensor, place: Tensor, slope: Tensor) -> None:
        """Arguments as of :func:`add_pairs`."""
        self._engine, self._unit = engine, unit
        places, rows = torch.where(slope != 0.0, place, -1).sort(stable=True)
        self._targets = SortedTargets(places, rows, slope)

    def parts(self, tiles: list[slice]) -> list[slice]:
        """The tiles themselves: which targets they hold is known on the device only."""
        return tiles

    def add(self, part: slice, tile: slice, d_unit: Tensor, factors: Tensor | None) -> None:
        """See :meth:`Targets.add`."""
        products = self._engine.device_filter
        assert products is not None
        products.add_targets(d_unit, factors, tile.start, self._targets, self._unit)

    def write(self, part: slice, d_columns: Tensor, scale: Tensor | None) -> None:
        """Does nothing: a tile that is left out on the host has no rows."""


def stream_pairs(call: Call, engine: Engine, unit: Tensor, places: Tensor, slopes: Tensor) -> None:
    """The columns' side of :func:`add_pairs` for a call with a sink, tile by tile.

    A tile without pairs has a gradient of zero. Waits for the device.

    Args:
        places, slopes: (k, N) as of :func:`add_pairs`.
    """
    assert call.columns is not None
    assert call.sink is not None
    count, size = unit.shape
    block = engine.class_block[1] * call.centers
    if call.centers > 1 and call.num_columns:
        places = torch.stack([_attained_or_none(call, engine, unit, each) for each in places])
    ordered, order = places.to(torch.int64).flatten().sort(stable=True)
    slopes = slopes.flatten()[order]
    starts = torch.arange(0, call.num_vectors + block, block, device=unit.device)
    bounds = torch.searchsorted(ordered, starts).tolist()
    gradient = unit.new_empty((block, size), dtype=torch.float32)
    for number, tile in enumerate(blocks(0, call.num_vectors, block)):
        out = gradient[: tile.stop - tile.start].zero_()
        pairs = slice(bounds[number], bounds[number + 1])
        if pairs.start < pairs.stop:
            place, row = ordered[pairs], order[pairs] % count
            index = place if call.vector_index is None else call.vector_index[place]
            _, norms = engine.normalize_rows(call.columns, 0, len(place), index, reuse=True)
            slope = slopes[pairs, None]
            d_unit = torch.where(slope != 0.0, slope * unit[row], 0.0)
            engine.normalize_rows_backward(d_unit, call.columns, 0, norms, d_unit, None, index)
            add_rows(out, place - tile.start, d_unit)
        whole = slice(tile.start // call.centers, tile.stop // call.centers)
        call.sink(whole, call.as_columns(out))


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index] += rows`` in a fixed order: each of the two is deterministic on its device.

    On CUDA ``index_add_`` has float atomics, and ``index_put_`` sorts; on the CPU it is the
    latter that adds in parallel.
    """
    rows = rows.to(total.dtype)
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)
