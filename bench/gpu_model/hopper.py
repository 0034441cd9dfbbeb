"""The persistent CUDA C++ kernels for sm_90a: counted per tile, and their predicted time.

Predicted times are those of the model's assumptions (``chips.py``); no device has run the kernels.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import sass
from .chips import H200, Chip
from .predict import gemm_rate

#: Rows and columns of a tile, depth of a chunk.
TILE, CHUNK = 128, 64
#: Blocks are clusters of two from this odd number of row tiles on (launch_sm90.cuh).
LEAST_ODD = 9
CONSUMER_WARPS = 4
SOURCES = Path(__file__).resolve().parents[2] / "csrc"


@dataclass(frozen=True)
class Compiled:
    """One kernel as nvcc compiles it.

    Attributes:
        stack, spilled: bytes.
        warnings: numbers of ptxas performance warnings.
        tile: instructions of a consumer's warp outside its loop over the depth, for each tile.
        chunk: the same for each chunk of the depth.
        producer_tile, producer_chunk: of the warp that copies.
    """

    name: str
    stack: int
    spilled: int
    warnings: tuple[str, ...]
    tile: int
    chunk: int
    producer_tile: int
    producer_chunk: int

    def issue_cycles(self, depth: int) -> float:
        """Issue cycles of a tile: an SM issues from four warps per cycle."""
        chunks = -(-depth // CHUNK)
        consumer = self.tile + chunks * self.chunk
        return (CONSUMER_WARPS * consumer + self.producer_tile + chunks * self.producer_chunk) / 4


def compile_kernels(nvcc: str, disassembler: str, source: str, folder: Path) -> list[Compiled]:
    """The kernels of a source in csrc/cuda/fused, compiled and disassembled: of all losses, or of
    those in ``folder/unitsface/loss_list.def``."""
    cubin = folder / "kernels.cubin"
    command = [
        *(nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas=-v"),
        *(f"-I{folder}", f"-I{SOURCES}", f"-I{SOURCES / 'include'}", "-cubin", "-o", f"{cubin}"),
        f"{SOURCES / 'cuda' / 'fused' / source}",
    ]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    dump = [disassembler, "-sass", f"{cubin}"]
    text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    warnings = tuple(sorted(set(re.findall(r"\bC75\d\d\b", log))))
    found = []
    for part in text.split("Function : ")[1:]:
        name = part.split()[0]
        usage = log.split(f"Function properties for {name}\n")[1].split("\n")[0]
        stack, stores, loads = (int(n) for n in re.findall(r"(\d+) bytes", usage))
        found.append(Compiled(name, stack, stores + loads, warnings, *_counts(sass.parse(part))))
    return found


def _counts(code: list[sass.Instruction]) -> tuple[int, int, int, int]:
    """``tile`` to ``producer_chunk`` of :class:`Compiled`.

    Loops are found by what is in them. Branches that are seldom taken are counted as taken, copies
    to one block and to both of a cluster as if both were made, and of the loops over the depth, one
    for each dtype, one.
    """

    def names(loop: tuple[int, int]) -> Counter[str]:
        return Counter(i.name for i in code[loop[0] : loop[1] + 1])

    def size(loop: tuple[int, int]) -> int:
        return loop[1] - loop[0] + 1

    def smallest(name: str, count: int) -> list[tuple[int, int]]:
        """The smallest loop around each set of ``count`` of an instruction; first those that wait
        most: of rows that stay in shared memory, not of deeper ones."""
        found: dict[tuple[int, ...], tuple[int, int]] = {}
        for loop in sorted(loops, key=size):
            places = tuple(k for k in range(loop[0], loop[1] + 1) if code[k].name == name)
            if len(places) == count:
                found.setdefault(places, loop)
        return sorted(found.values(), key=lambda loop: -names(loop)["SYNCS"])

    loops = sass.loops(code)
    # Waits in out-of-line code look like loops too: that of the tiles starts before all of the
    # depth, and the copies' are without products.
    depth = smallest("HGMMA", 2 * CHUNK // 16)
    all_products = len(depth) * 2 * CHUNK // 16
    tile = min((loop for loop in loops if names(loop)["HGMMA"] == all_products), key=size)
    inner = smallest("UTMALDG", 3)[0]
    outer = max(
        (
            loop
            for loop in loops
            if names(loop)["UTMALDG"] == 3 and loop[0] <= inner[0] and loop[1] >= inner[1]
        ),
        key=size,
    )
    return (
        size(tile) - sum(map(size, depth)),
        size(depth[0]),
        size(outer) - size(inner),
        size(inner),
    )


def peers_of(rows: int) -> int:
    """Blocks of a cluster, which share the columns that they read."""
    row_tiles = -(-rows // TILE)
    return 2 if row_tiles % 2 == 0 or row_tiles >= LEAST_ODD else 1


@dataclass(frozen=True)
class Launch:
    """Tiles of a (rows, columns) matrix of products; ``stored``: with a gradient of 16 bits, in
    clusters of ``peers`` blocks, None: as ``launch_sm90.cuh`` has them."""

    depth: int
    rows: int
    columns: int
    stored: bool = True
    peers: int | None = None

    def l2_bytes(self, chip: Chip = H200) -> float:
        """Bytes of a tile that L2 delivers or takes: columns, once for the blocks of a cluster, the
        gradient if it is stored, and the tile's share of the resident rows."""
        tiles = -(-self.rows // TILE) * -(-self.columns // TILE)
        per_block = tiles / min(tiles, chip.sms)
        # A range of tiles starts within a row tile: on average one more than those it has.
        row_tiles = per_block * TILE / self.columns + 1
        of_columns = TILE * self.depth / (self.peers or peers_of(self.rows))
        of_rows = TILE * self.depth * min(row_tiles / per_block, 1.0)
        return 2.0 * (of_columns + of_rows + self.stored * TILE * TILE)

    def tile_cycles(self, kernel: Compiled, chip: Chip = H200) -> float:
        """Predicted, in the middle of a range: one warpgroup multiplies, the other does the
        rest."""
        tensor = TILE * TILE * self.depth / chip.tensor_fma
        issue = kernel.issue_cycles(self.depth) / chip.issue_efficiency
        parts = (tensor, issue, self.l2_bytes(chip) / chip.l2_rate)
        return sum(part**chip.overlap for part in parts) ** (1 / chip.overlap)


@dataclass(frozen=True)
class PairStep:
    """Predicted seconds of a training step of in-batch pairs; ``roofline``: of its products alone,
    half of the matrix forward and all of it backward, at the rate of a large GEMM."""

    tiles: float
    products: float
    roofline: float

    @property
    def fraction(self) -> float:
        return self.roofline / (self.tiles + self.products)


def pair_step(kernel: Compiled, count: int, depth: int, block: int, chip: Chip = H200) -> PairStep:
    """Every block of the upper triangle of a (count, count) matrix is one launch and one or two
    GEMMs; ``block``: its rows and columns."""
    blocks = count // block
    launches = blocks * (blocks + 1) / 2
    cycles = Launch(depth, block, block).tile_cycles(kernel, chip)
    tiles = (block // TILE) ** 2
    # The longest range, and before and after it a tile of which nothing overlaps.
    longest = -(-tiles // min(tiles, chip.sms)) + 1
    of_tiles = launches * (longest * cycles / chip.clock + chip.kernel_seconds)
    flops = 2.0 * count * count * depth
    of_products = flops / gemm_rate(block, depth, block, chip)
    return PairStep(of_tiles, of_products, 1.5 * flops / chip.gemm_rate)
