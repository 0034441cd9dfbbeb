"""``python -m bench.cpu_model``: predicted scaling of a step over CPU cores, by formulas.

Counts what a step over classes does for each panel of columns: GEMMs, loops of kernels (each with a
start and an end that threads wait for), chunks that threads can take, calls from Python and bytes.
The rates are assumptions, to be replaced by those of a machine; what is counted is tested.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

CORES = (2, 4, 8, 16, 32, 64)
# Rows and columns of a tile.
CLASS_BLOCK = (512, 768)
# Chunks of csrc/cpu: elements of row kernels, and rows and columns of a GEMM's block.
CHUNK_ELEMENTS, BLOCK_ROWS, BLOCK_COLUMNS = 16384, 128, 48
LEAST_WORK = 1 << 19


@dataclass(frozen=True)
class Rates:
    """Assumptions, of an AMD EPYC of 2022 (Zen 4).

    Attributes:
        gemm: FLOP/s of a core in a block of a GEMM.
        elements: elements/s of a core in the kernels of rows, exponentials included.
        python_s: interpreter's time of a panel, during which other threads wait.
        start_s, per_thread_s: of a loop's start and end, and of each thread that joins it.
        memory: bytes/s of all cores.
    """

    gemm: float = 95e9
    elements: float = 0.8e9
    python_s: float = 180e-6
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


def _gemm(n: int, m: int, depth: int, cores: int, rates: Rates) -> list[Loop]:
    """Packing and blocks, as csrc/cpu/gemm.h chooses them."""
    rows, panels = BLOCK_ROWS, math.ceil(m / BLOCK_COLUMNS)
    while (
        rows > 16
        and rows * BLOCK_COLUMNS * depth > 2 * LEAST_WORK
        and math.ceil(n / rows) * panels < 4 * cores
    ):
        rows //= 2
    packed = Loop(math.ceil(n / 32) + math.ceil(m / 32), 32 * depth / (4 * rates.elements))
    block = Loop(math.ceil(n / rows) * panels, 2 * rows * BLOCK_COLUMNS * depth / rates.gemm)
    return [packed, block]


def panel(n: int, size: int, cores: int, rates: Rates) -> list[Loop]:
    """Loops of both passes over a panel, with kept cosines, for at most one block of rows."""
    m = CLASS_BLOCK[1]
    forward = [_rows(m, size, rates), *_gemm(n, m, size, cores, rates), _rows(n, m, rates)]
    backward = [
        *(_rows(m, size, rates), _rows(n, m, rates)),
        *_gemm(n, size, m, cores, rates),
        *_gemm(m, size, n, cores, rates),
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
    print(table(arguments.rows, arguments.size, Rates()))


if __name__ == "__main__":
    main()
