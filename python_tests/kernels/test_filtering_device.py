"""Gradient filtering decided on the device: its choices, and that nothing waits for them."""

from __future__ import annotations

import math

import pytest
import torch
from support.given_variables import streams
from support.grid import extended_if
from support.helpers import FUSED, Target, patched_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from unitsface_kernels import passes
from unitsface_kernels.backends.streaming import (
    Call,
    CallConfig,
    CallTensors,
    ForwardCache,
    RowSelection,
    filtering,
    logsumexp,
    make_call,
)
from unitsface_kernels.backends.streaming import sum as sums
from unitsface_kernels.losses import REGISTRY, LossSpec

# Matmuls of selected rows read whole blocks of a workspace.
pytestmark = pytest.mark.usefixtures("poisoned_memory")

TOLERANCE = 1e-3
SKIPPING = [
    spec
    for spec in REGISTRY.values()
    if spec.reduction == "sum" or (spec.reduction, spec.topology) == ("logsumexp", "class")
    if not streams(spec)
]
ROWS, DIM = 40, 256


def _separated() -> tuple[Tensor, Tensor, Tensor]:
    """Features (ROWS, DIM) at their class weights (130, DIM), and labels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(130, DIM, generator=generator)
    labels = torch.randint(0, 26, (ROWS,), generator=generator)
    return 3.0 * weight[labels], weight, labels


@pytest.mark.parametrize("seed", range(60))
def test_needed_rows(seed: int) -> None:
    """The device decides for each row what the host decides for a tile of that row alone."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    # From 0 to 1, over several orders of magnitude.
    table = draw(1 + seed % 8, 3) ** (8.0 * draw(1, 1)) * (draw(1 + seed % 8, 3) > 0.2)
    tolerance = float(10.0 ** (-6.0 * draw(1)))
    needed = filtering.needed_rows(table, tolerance)
    for row in range(3):
        own = table[:, row : row + 1]
        skipped = torch.tensor(filtering.negligible(own, tolerance))
        assert torch.equal(own[skipped].sort(dim=0).values, own[~needed[:, row]].sort(dim=0).values)
        heavy = len(filtering.heavy_rows(own, tolerance)) > 0
        total = own.double().sum()
        if abs(total - tolerance) > 1e-12 * tolerance:
            assert bool(needed[:, row].any()) == heavy


def test_needed_rows_with_nan() -> None:
    table = torch.tensor([[0.0, math.nan, 0.5], [0.0, 0.0, 0.4], [0.0, 0.2, 0.3]])
    assert filtering.needed_rows(table, 0.75).tolist() == [
        [False, True, True],
        [False, False, False],
        [False, False, False],
    ]


def test_selections_are_in_order() -> None:
    needed = torch.tensor([[False, True, True, False, True], [False] * 5, [True] * 5])
    for wanted, found in zip(needed, filtering.selections(needed), strict=True):
        assert found.places is not None
        number = int(found.number[0])
        assert found.places[:number].tolist() == wanted.nonzero().flatten().tolist()


def test_rows_that_a_sum_loss_leaves_out() -> None:
    """The device's choice, row by row, is the host's for that row."""
    masses = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))

    class Engine:
        def absolute_sums(self, tile: Tensor, dim: int) -> Tensor:
            return tile.abs().sum(dim)

    spec = REGISTRY["uss"]
    call = Call(spec, spec.pack(spec.defaults()), "sum", "native", torch.float32,
                skip_tolerance=0.05, rows=masses, row_labels=torch.arange(6))  # fmt: skip
    by_host, by_device = (filtering.RowFilter(call, Engine(), None) for _ in range(2))
    decisions = []
    for tile in masses.split(3, dim=1):
        fits = by_device.fits(tile, slice(0, 6))
        for row in range(6):
            kept = by_host.rows_to_keep(tile[row : row + 1], slice(row, row + 1))
            assert bool(fits[row]) == (kept is not None)
        decisions.extend(fits.tolist())
    assert len(set(decisions)) == 2


class Waits(TorchDispatchMode):
    """Raises for operators that wait for a device: their result, or its size, is the host's."""

    OPERATORS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "is_nonzero",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(one in name for one in self.OPERATORS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def _device_problems():
    for target in FUSED:
        if target.backend == "triton":
            for spec in SKIPPING:
                if not target.interpreted or spec.name in ("uss", "uce", "margin_softmax"):
                    for memory in (False, True) if spec.topology == "pair" else (False,):
                        name = f"{target}-{spec.name}" + ("-memory" if memory else "")
                        marks = extended_if(target.interpreted and spec.name == "uce")
                        yield pytest.param(target, spec, memory, id=name, marks=marks)


@pytest.mark.parametrize(("target", "spec", "memory"), list(_device_problems()))
def test_nothing_waits_for_the_device(
    target: Target, spec: LossSpec, memory: bool, monkeypatch
) -> None:
    """What is launched does not depend on what is left out."""
    from unitsface_kernels.backends.triton import launch

    patched_blocks(monkeypatch, (24, 64))
    near, weight, labels = (t.to(target.device) for t in _separated())
    # At the class of another row.
    far = near.roll(1, 0)
    columns = weight if memory or spec.topology == "class" else None
    config = CallConfig(
        spec=spec,
        params=spec.pack(spec.defaults()),
        reduction="mean",
        backend="triton",
        compute_dtype=torch.float32,
        self_offset=0 if columns is None else None,
        skip_tolerance=TOLERANCE,
        need_rows=True,
        need_columns=columns is not None,
        need_threshold=spec.threshold != "none",
    )
    many = torch.arange(130, device=target.device) if memory else None
    b = None if spec.threshold == "none" else torch.tensor(40.0, device=target.device)
    launches: list[tuple[str, int]] = []
    tables: list[Tensor] = []
    run, select = launch.run, filtering.selections

    def spied_run(kernel, programs, *arguments, **options):
        launches.append((kernel.fn.__name__, programs))
        # In the interpreter, launches copy tensors.
        with _disable_current_modes():
            return run(kernel, programs, *arguments, **options)

    def spied_selections(needed: Tensor) -> list[RowSelection]:
        tables.append(needed)
        return select(needed)

    def no_list(tensor: Tensor) -> list:
        raise AssertionError("a list waits for the device")

    # Computed on the CPU, once per loss and parameters.
    spec.slope_bound(config.params)
    monkeypatch.setattr(launch, "run", spied_run)
    for module in (filtering, logsumexp, sums):
        monkeypatch.setattr(module, "selections", spied_selections)
    found = []
    for rows in (near, far):
        tensors = CallTensors(rows, labels, columns, many, threshold=b)
        call = make_call(config, tensors, ForwardCache())
        # For tensors on the CPU the host reads the labels.
        vars(call)["may_have_ignored"] = True
        upstream = torch.full((ROWS,), 1 / ROWS, device=target.device)
        with Waits(), monkeypatch.context() as patch:
            # No operator makes a list of the CPU's tensors.
            patch.setattr(Tensor, "tolist", no_list)
            result = passes.forward(call, gradients=config.gradients_known(call.columns))
            if result.gradients[0] is None:
                passes.backward(call, result.state, upstream)
        kept = sum(int(table.sum()) for table in tables)
        found.append((launches[:], kept))
        launches.clear()
        tables.clear()
    (first, few), (second, more) = found
    assert few < more
    assert first == second
    assert any(name == "row_products_kernel" for name, _ in first)
