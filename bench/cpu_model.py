"""``python -m bench.cpu_model``: predicted scaling of a step over CPU cores, by formulas.

Counts what a step over classes does for each panel of columns: GEMMs, loops of kernels (each with a
start and an end that threads wait for), chunks that threads can take and bytes; what is counted is
tested. The interpreter's time is measured, on the machine that runs this; the other rates are
assumptions, to be replaced by those of a machine.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from unittest import mock

import torch

from unitsface_kernels import fused_margin_softmax_loss
from unitsface_kernels.backends.native import cpu_engine

CORES = (2, 4, 8, 16, 32, 64)
CLASS_BLOCK = cpu_engine.CLASS_BLOCK
# Chunks of csrc/cpu: elements of row kernels, and rows and columns of a GEMM's block.
CHUNK_ELEMENTS, BLOCK_ROWS, BLOCK_COLUMNS = 16384, 128, 48
LEAST_WORK = 1 << 19


@dataclass(frozen=True)
class Rates:
    """Assumptions, of an AMD EPYC of 2022 (Zen 4), but for the first.

    Attributes:
        python_s: interpreter's time of a panel, during which other threads wait; of this machine,
            by :func:`python_seconds`.
        gemm: FLOP/s of a core in a block of a GEMM.
        elements: elements/s of a core in the kernels of rows, exponentials included.
        start_s, per_thread_s: of a loop's start and end, and of each thread that joins it.
        memory: bytes/s of all cores.
    """

    python_s: float
    gemm: float = 95e9
    elements: float = 0.8e9
    start_s: float = 1e-6
    per_thread_s: float = 0.2e-6
    memory: float = 20e9


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel: its chunks and the seconds that a core takes for each."""

    chunks: int
    seconds: float

    def time(self, cores: int, rates: Rates) -> float:
        used = min(cores, self.chunks)
        rounds = math.ceil(self.chunks / used)
        return rounds * self.seconds + rates.start_s + used * rates.per_thread_s


def _rows(n: int, width: int, rates: Rates) -> Loop:
    rows = max(CHUNK_ELEMENTS // width, 1)
    return Loop(math.ceil(n / rows), rows * width / rates.elements)


def _together(loops: list[Loop]) -> Loop:
    """One loop over the chunks of all, which take their mean time."""
    chunks = sum(loop.chunks for loop in loops)
    return Loop(chunks, sum(loop.chunks * loop.seconds for loop in loops) / chunks)


def _gemms(shapes: list[tuple[int, int, int]], cores: int, rates: Rates) -> list[Loop]:
    """Packing and blocks of GEMMs at once, as in csrc/cpu/gemm.h.

    Args:
        shapes: rows, columns and depth of each. Of two the second has a transposed left operand,
            which is packed; others are read as they are.
        cores, rates: of the prediction.
    """
    packed, blocks = [], []
    for number, (n, m, depth) in enumerate(shapes):
        rows, panels = BLOCK_ROWS, math.ceil(m / BLOCK_COLUMNS)
        while (
            rows > 16
            and rows * BLOCK_COLUMNS * depth > 2 * LEAST_WORK
            and math.ceil(n / rows) * panels * len(shapes) < 4 * cores
        ):
            rows //= 2
        pairs = math.ceil(m / 32) + (math.ceil(n / 32) if number else 0)
        packed.append(Loop(pairs, 32 * depth / (4 * rates.elements)))
        seconds = 2 * rows * BLOCK_COLUMNS * depth / rates.gemm
        blocks.append(Loop(math.ceil(n / rows) * panels, seconds))
    return [_together(packed), _together(blocks)]


def panel(n: int, size: int, cores: int, rates: Rates) -> list[Loop]:
    """Loops of both passes over a panel, with kept cosines, for at most one block of rows."""
    m = CLASS_BLOCK[1]
    forward = [_rows(m, size, rates), *_gemms([(n, m, size)], cores, rates), _rows(n, m, rates)]
    backward = [
        *(_rows(m, size, rates), _rows(n, m, rates)),
        *_gemms([(n, size, m), (m, size, n)], cores, rates),
        _rows(m, size, rates),
    ]
    return forward + backward


def panel_bytes(n: int, size: int) -> int:
    """Bytes from and to memory: weights twice, cosines written and read, gradient written."""
    m = CLASS_BLOCK[1]
    return 4 * (2 * m * size + 2 * n * m + m * size)


def prediction(n: int, size: int, cores: int, rates: Rates) -> dict[str, float]:
    """Seconds of a panel and their parts, and the fraction of the GEMMs' rate."""
    loops = panel(n, size, cores, rates)
    waits = sum(rates.start_s + min(cores, x.chunks) * rates.per_thread_s for x in loops)
    compute = max(
        sum(loop.time(cores, rates) for loop in loops) - waits, panel_bytes(n, size) / rates.memory
    )
    ideal = 6.0 * n * CLASS_BLOCK[1] * size / rates.gemm / cores
    total = compute + waits + rates.python_s
    return {
        "loops": len(loops),
        "ideal_s": ideal,
        "compute_s": compute,
        "waits_s": waits,
        "python_s": rates.python_s,
        "total_s": total,
        "fraction": ideal / total,
    }


def python_seconds(panels: int = 64, repeats: int = 40) -> float:
    """Interpreter's time of a panel, forward and backward, on this machine.

    Of panels of 8 classes of 8 elements and 4 rows, whose kernels compute next to nothing, on one
    thread: what ``panels`` of them add to a step, of the least times of ``repeats``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, labels = torch.randn(4, 8, requires_grad=True), torch.arange(4)

    def step(count: int) -> float:
        weight = torch.randn(8 * count, 8, requires_grad=True)
        start = time.perf_counter()
        fused_margin_softmax_loss(rows, weight, labels, backend="native").backward()
        return time.perf_counter() - start

    with mock.patch.object(cpu_engine, "CLASS_BLOCK", (4, 8)):
        steps = [(step(panels), step(2 * panels)) for _ in range(repeats)]
    torch.set_num_threads(threads)
    fewer, more = map(min, zip(*steps, strict=True))
    return (more - fewer) / panels


def table(n: int, size: int, rates: Rates) -> str:
    lines = [
        f"Predicted, {n} rows, D = {size}, panels of {CLASS_BLOCK[1]} classes; {rates}",
        "",
        "| cores | loops | compute | starts and ends | Python | panel | of the GEMM rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for cores in CORES:
        p = prediction(n, size, cores, rates)
        times = (p["compute_s"], p["waits_s"], p["python_s"], p["total_s"])
        cells = " | ".join(f"{1e3 * t:.2f} ms" for t in times)
        lines.append(f"| {cores} | {p['loops']:.0f} | {cells} | {p['fraction']:.0%} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_model", description=__doc__)
    parser.add_argument("--rows", type=int, default=CLASS_BLOCK[0], help="at most a block")
    parser.add_argument("--size", type=int, default=512)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.rows <= min(CLASS_BLOCK[0], arguments.size):
        parser.error(f"--rows must be in [1, {min(CLASS_BLOCK[0], arguments.size)}]")
    print(table(arguments.rows, arguments.size, Rates(python_seconds())))


if __name__ == "__main__":
    main()
