"""GEMMs over rows that the device selected: against library GEMMs over the same rows."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FUSED, Target
from support.tolerances import SAME_GRADIENT, check_same
from torch import Tensor

from unitsface_kernels.backends.streaming import Call, RowSelection, SortedTargets
from unitsface_kernels.losses import REGISTRY

ON_TRITON = [target for target in FUSED if target.backend == "triton"]
pytestmark = pytest.mark.skipif(not ON_TRITON, reason="needs Triton")
each_target = pytest.mark.parametrize("target", ON_TRITON, ids=str)
# Blocks in part, several of them, and a width that is no multiple of a block.
SHAPES = [(150, 100, 70, torch.float32), (37, 130, 96, torch.bfloat16)]


def _engine(target: Target, rows: Tensor):
    from unitsface_kernels.backends.triton.engine import TritonEngine

    spec = REGISTRY["margin_softmax"]
    labels = torch.zeros(len(rows), dtype=torch.int64, device=target.device)
    call = Call(spec, spec.pack(spec.defaults()), "mean", "triton", rows.dtype,
                rows=rows, row_labels=labels, columns=rows)  # fmt: skip
    return TritonEngine(call)


def _selections(count: int, device: str):
    """All of the rows, some, and none: in any order, and the first ones."""
    generator = torch.Generator().manual_seed(1)
    for number in (0, 1, 5, count):
        order = torch.randperm(count, generator=generator).to(device)
        # What lies behind the selected rows is not read.
        places = torch.where(torch.arange(count, device=device) < number, order, 2**30)
        counts = torch.full((4,), number, dtype=torch.int32, device=device)
        yield order[:number], RowSelection(places.to(torch.int32), counts)
        yield torch.arange(number, device=device), RowSelection(None, counts)


@each_target
@pytest.mark.parametrize(("count", "columns", "width", "dtype"), SHAPES)
def test_products_of_selected_rows(
    target: Target, count: int, columns: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(target.device, dtype)

    engine = _engine(target, normal(count, width))
    products = engine.device_filter
    tile, unit_columns, unit_rows = normal(count, 192), normal(columns, 128), normal(count, 128)
    tile, unit_columns, unit_rows = tile[:, :columns], unit_columns[:, :width], unit_rows[:, :width]
    for rows, selection in _selections(count, target.device):
        # A row that is not selected has no effect.
        some = torch.full_like(tile, torch.nan)
        some[rows] = tile[rows]
        # The padding is read, as gradient kernels write it.
        some = torch.nn.functional.pad(some, (0, 192 - columns))[:, :columns]
        total = torch.ones(count, width, device=target.device)
        products.add_rows(total, some, unit_columns, selection)
        want = torch.ones_like(total)
        want[rows] += tile[rows].float() @ unit_columns.float()
        check_same("rows", total, want, SAME_GRADIENT)
        want = tile[rows].float().T @ unit_rows[rows].float()
        found = products.columns(some, unit_rows, selection)
        check_same("columns", found, want, SAME_GRADIENT)
        found = products.columns(some, unit_rows, selection, torch.ones_like(want))
        check_same("added columns", found, want + 1.0, SAME_GRADIENT)


@each_target
@pytest.mark.parametrize("scaled", [False, True])
def test_targets_of_a_tile(target: Target, scaled: bool) -> None:
    """Several rows of one target, targets of other tiles, and rows without any."""
    generator = torch.Generator().manual_seed(0)
    count, width = 60, 70
    rows = torch.randn(count, width, generator=generator).to(target.device)
    labels = torch.randint(-2, 40, (count,), generator=generator).to(target.device)
    slopes = torch.randn(count, generator=generator).to(target.device)
    places, order = labels.sort(stable=True)
    found = torch.ones(20, width, device=target.device)
    factors = torch.rand(20, generator=generator).to(target.device) if scaled else None
    targets = SortedTargets(places, order, slopes)
    _engine(target, rows).device_filter.add_targets(found, factors, 10, targets, rows)
    want = torch.zeros_like(found)
    inside = (labels >= 10) & (labels < 30)
    want.index_add_(0, labels[inside] - 10, slopes[inside, None] * rows[inside])
    want = want if factors is None else want * factors[:, None]
    check_same("targets", found, want + 1.0, SAME_GRADIENT)
