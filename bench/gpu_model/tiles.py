"""Predicted cycles of one program of a kernel with a GEMM."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .chips import Chip
from .compile import Compiled, Gemm

#: Costs of kernels with different blocks are compared per block of this many pairs.
REFERENCE_PAIRS = 128 * 128


@dataclass(frozen=True)
class TileCost:
    """Cycles of an SM per program, by resource, and together.

    Attributes:
        issue: of the warp schedulers, at one instruction per cycle each.
        pipes: of the execution pipes; FMA has the integer multiplications too.
        l2_bytes: read and written.
        programs: that share an SM.
        cycles: predicted, of all resources together.
        per_reference: what is multiplied to get cycles per ``REFERENCE_PAIRS``.
    """

    tensor: float
    issue: float
    pipes: dict[str, float]
    l2_bytes: float
    l2: float
    programs: int
    cycles: float
    per_reference: float


def tile_cost(kernel: Compiled, chip: Chip, steps: float = 1.0) -> TileCost:
    """Cost of a tile by a kernel that has a GEMM.

    Args:
        steps: mean number of steps of a program, if the GEMM is open.
    """
    gemm, instructions = kernel.gemm, kernel.instructions
    assert gemm is not None
    if gemm.open:
        gemm = replace(gemm, depth=round(steps * gemm.step))
        for pipe, count in kernel.inside.items():
            instructions[pipe] += round((steps - 1.0) * count)
    lanes = {pipe: 32 * n * kernel.warps for pipe, n in instructions.items()}
    lanes["FMA"] = lanes.get("FMA", 0) + lanes.get("IMAD", 0)
    pipes = {pipe: lanes.get(pipe, 0) / rate for pipe, rate in chip.lanes.items()}
    l2_bytes = gemm.operand_bytes + kernel.stored
    programs = chip.programs_per_sm(kernel.registers, kernel.shared, kernel.warps)
    # Without tensor cores the multiplications are among the instructions.
    tensor = _tensor_cycles(gemm, chip) if kernel.tensor_cores else 0.0
    l2 = l2_bytes / chip.l2_rate
    issue = sum(instructions.values()) * kernel.warps / 4
    work = max(issue / chip.issue_efficiency, *pipes.values())
    if programs > 1:
        cycles = sum(part**chip.overlap for part in (tensor, work, l2)) ** (1 / chip.overlap)
    else:
        # Nothing runs beside the epilogue.
        cycles = max(tensor, l2) + work
    return TileCost(
        tensor, issue, pipes, l2_bytes, l2, programs, cycles, REFERENCE_PAIRS / (gemm.m * gemm.n)
    )


def _tensor_cycles(gemm: Gemm, chip: Chip) -> float:
    # TF32 elements are twice as large and have half the rate.
    return gemm.m * gemm.n * gemm.depth / chip.tensor_fma * gemm.element_bytes / 2
