"""What the fused kernels for Hopper may cost, counted from what nvcc compiles; needs no GPU."""

from __future__ import annotations

import shutil

import pytest

from bench.gpu_model import hopper, sass

DEPTH = 512
#: Rows and columns of an in-batch tile that fills the chip for several waves.
BLOCK = 8192
ISSUE_CYCLES = 4500
L2_BYTES = 176 << 10


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[hopper.Compiled]:
    nvcc, disassembler = shutil.which("nvcc"), sass.find_cuobjdump()
    if nvcc is None or disassembler is None:
        pytest.skip("needs nvcc and cuobjdump")
    folder = tmp_path_factory.mktemp("total")
    return hopper.compile_kernels(nvcc, disassembler, "total_sm90.cu", folder)


def uss(kernels: list[hopper.Compiled]) -> hopper.Compiled:
    return next(kernel for kernel in kernels if "3USSE" in kernel.name)


@pytest.mark.extended
def test_totals_have_no_stack_and_no_serialized_wgmma(kernels: list[hopper.Compiled]) -> None:
    assert len(kernels) == 2
    assert [(k.stack, k.spilled, k.warnings) for k in kernels] == [(0, 0, ())] * 2


@pytest.mark.extended
def test_totals_keep_to_their_budget(kernels: list[hopper.Compiled]) -> None:
    assert 0.8 * ISSUE_CYCLES < uss(kernels).issue_cycles(DEPTH) < ISSUE_CYCLES
    assert hopper.l2_bytes(DEPTH, BLOCK, BLOCK) <= L2_BYTES


@pytest.mark.extended
def test_predicted_share_of_the_roofline(kernels: list[hopper.Compiled]) -> None:
    step = hopper.pair_step(uss(kernels), 32768, DEPTH, BLOCK)
    assert 0.75 <= step.fraction < 1.0
