"""What the fused kernels for Hopper may cost, counted from what nvcc compiles; needs no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.gpu_model import hopper, sass
from bench.gpu_model.fused_sm80 import write_losses

DEPTH = 512
#: Rows and columns of an in-batch tile that fills the chip for several waves.
BLOCK = 8192
ISSUE_CYCLES, ISSUE_CYCLES_CLASSES = 4500, 3800
#: Of a tile with a gradient and of one without.
L2_BYTES, L2_BYTES_UNSTORED = 104 << 10, 72 << 10
#: A batch and a wave of classes.
ROWS, CLASSES = 1024, 65536
#: The same of kernels with sums per row, and per column where the last part is ``Lb1E``: by source,
#: its losses and parts of the mangled names.
BUDGETS = {
    ("sum_sm90.cu", ("uss", "uce")): {
        "SumEpilogueINS_8baseline3USSELb0E": 5200,
        "SumEpilogueINS_8baseline3USSELb1E": 6600,
        "SumEpilogueINS_8baseline3UCEELb0E": 6300,
        "SumEpilogueINS_8baseline3UCEELb1E": 8600,
    },
    ("pairs_sm90.cu", ("pair_softmax", "multi_similarity")): {
        "PairGradientEpilogueINS_8baseline11PairSoftmaxELb0ELb0E": 3500,
        "PairGradientEpilogueINS_8baseline11PairSoftmaxELb0ELb1E": 4900,
        "PairGradientEpilogueINS_8baseline15MultiSimilarityELb1ELb0E": 3600,
        "PairGradientEpilogueINS_8baseline15MultiSimilarityELb1ELb1E": 4700,
        "PairNegativesEpilogueINS_8baseline11PairSoftmaxELb0ELb0E": 3800,
        "PairNegativesEpilogueINS_8baseline11PairSoftmaxELb0ELb1E": 4500,
        "PairNegativesEpilogueINS_8baseline15MultiSimilarityELb1ELb0E": 4900,
        "PairNegativesEpilogueINS_8baseline15MultiSimilarityELb1ELb1E": 7200,
        "PairPositivesEpilogueINS_8baseline11PairSoftmaxELb0E": 4600,
        "PairPositivesEpilogueINS_8baseline11PairSoftmaxELb1E": 6100,
    },
}


def compiled(source: str, folder: Path) -> list[hopper.Compiled]:
    nvcc, disassembler = shutil.which("nvcc"), sass.find_cuobjdump()
    if nvcc is None or disassembler is None:
        pytest.skip("needs nvcc and cuobjdump")
    return hopper.compile_kernels(nvcc, disassembler, source, folder)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[hopper.Compiled]:
    return compiled("total_sm90.cu", tmp_path_factory.mktemp("total"))


def uss(kernels: list[hopper.Compiled]) -> hopper.Compiled:
    return next(kernel for kernel in kernels if "3USSE" in kernel.name)


@pytest.mark.extended
def test_totals_have_no_stack_and_no_serialized_wgmma(kernels: list[hopper.Compiled]) -> None:
    assert len(kernels) == 2
    assert [(k.stack, k.spilled, k.warnings) for k in kernels] == [(0, 0, ())] * 2


@pytest.mark.extended
def test_totals_keep_to_their_budget(kernels: list[hopper.Compiled]) -> None:
    assert 0.8 * ISSUE_CYCLES < uss(kernels).issue_cycles(DEPTH) < ISSUE_CYCLES
    assert hopper.Launch(DEPTH, BLOCK, BLOCK).l2_bytes() <= L2_BYTES
    assert hopper.Launch(DEPTH, ROWS, CLASSES).l2_bytes() <= L2_BYTES
    assert hopper.Launch(DEPTH, ROWS, CLASSES, stored=False).l2_bytes() <= L2_BYTES_UNSTORED


@pytest.mark.extended
def test_predicted_share_of_the_roofline(kernels: list[hopper.Compiled]) -> None:
    step = hopper.pair_step(uss(kernels), 32768, DEPTH, BLOCK)
    assert 0.75 <= step.fraction < 1.0


@pytest.mark.extended
@pytest.mark.parametrize(("source", "losses"), BUDGETS)
def test_sums_of_rows_keep_to_their_budget(
    source: str, losses: tuple[str, ...], tmp_path: Path
) -> None:
    write_losses(tmp_path / "unitsface", losses)
    budgets = BUDGETS[source, losses]
    found = compiled(source, tmp_path)
    assert [(k.stack, k.spilled, k.warnings) for k in found] == [(0, 0, ())] * len(budgets)
    for name, cycles in budgets.items():
        (kernel,) = [k for k in found if name in k.name]
        assert 0.9 * cycles < kernel.issue_cycles(DEPTH) < cycles, kernel.name


@pytest.mark.extended
def test_kernels_of_classes_keep_to_their_budget(tmp_path: Path) -> None:
    found = compiled("logsumexp_sm90.cu", tmp_path)
    assert found
    assert [(k.stack, k.spilled, k.warnings) for k in found] == [(0, 0, ())] * len(found)
    passes = {
        stored: next(k for k in found if name in k.name and "13MarginSoftmax" in k.name)
        for name, stored in (("StatisticsEpilogue", False), ("GradientEpilogue", True))
    }
    cycles = [kernel.issue_cycles(DEPTH) for kernel in passes.values()]
    assert all(0.8 * ISSUE_CYCLES_CLASSES < c < ISSUE_CYCLES_CLASSES for c in cycles)

    def predicted(row_tiles: int, peers: int) -> float:
        """Cycles of both passes over the classes, idle blocks of clusters included."""
        rows = row_tiles * hopper.TILE
        busy = row_tiles / (-(-row_tiles // peers) * peers)
        tiles = (
            hopper.Launch(DEPTH, rows, CLASSES, stored, peers).tile_cycles(k)
            for stored, k in passes.items()
        )
        return sum(tiles) / busy

    # Clusters where they pay.
    for row_tiles in (1, 2, 3, 5, 7, 8, 9, 11, 16):
        best = min((1, 2), key=lambda peers: predicted(row_tiles, peers))
        assert hopper.peers_of(row_tiles * hopper.TILE) == best
    launch = (hopper.SOURCES / "cuda" / "fused" / "launch_sm90.cuh").read_text()
    assert f"kLeastOdd = {hopper.LEAST_ODD};" in launch
