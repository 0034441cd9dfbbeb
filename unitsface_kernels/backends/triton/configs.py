"""Launch configurations, per architecture and dtype, each with its reason.

The reasons are counts, of registers, shared memory and bytes, that the compiler's report
confirms without a GPU; they are where a measurement on one should start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..memory import DeviceMemory


@dataclass(frozen=True)
class TileConfig:
    """Launch of a tile kernel.

    Attributes:
        block_m, block_n, block_k: block of cosines of one program and its step along D.
        num_warps, num_stages: warps of a program and depth of its load pipeline.
        max_registers: cap per thread, or None; it decides how many programs share an SM.
        epilogue_subtiles: subtiles of the block that the policy works through one after the other.
        group_m: row blocks that are visited together, see ``grouped_block``.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    epilogue_subtiles: int = 1
    group_m: int = 16


@dataclass(frozen=True)
class WaveConfig:
    """Amount of work of a launch. What it bounds is together at most four ``gradient_bytes``.

    Attributes:
        gradient_bytes: size of the gradient tile that is reused; also bounds the partial
            statistics of a launch without gradients.
        gradient_rows: its rows at most.
        unit_bytes: size of the unit columns of one wave.
        columns: columns of a wave at most.
        rows: rows of a launch without gradients at most.
        split_programs: programs that share the columns of a filtered tile, at least: one per SM of
            an H100 or H200, whose registers hold one.
    """

    gradient_bytes: int
    gradient_rows: int
    unit_bytes: int
    columns: int
    rows: int
    split_programs: int = 132


@dataclass(frozen=True)
class RowConfig:
    """Launch of a kernel over rows: ``rows`` of them, ``block`` elements at a time."""

    rows: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class VectorConfig:
    """Launch of a kernel over a vector."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    """Launches of one architecture and dtype.

    Attributes:
        sum: ``sum_kernel``; sum_heavy: with row weights, a threshold per column,
            or a policy that is marked heavy.
        statistics, gradient: the kernels of ``logsumexp`` losses.
        wave: tile sizes.
    """

    sum: TileConfig
    sum_heavy: TileConfig
    statistics: TileConfig
    gradient: TileConfig
    wave: WaveConfig

    @property
    def nearest(self) -> TileConfig:
        """Launch of ``nearest_kernel``: the whole block at once, and its keys in registers."""
        return replace(self.gradient, epilogue_subtiles=1, max_registers=None)

    @property
    def centers(self) -> TileConfig:
        """Launch of ``largest_kernel``, which has a block of products, of the largest and of their
        centers in registers, and of ``nearest_kernel`` on the cosines, which it then loads.

        Without a cap ptxas squeezes the former into 128 registers and a stack on Blackwell.
        """
        narrow = min(self.gradient.block_n, 64)
        return replace(self.gradient, block_n=narrow, epilogue_subtiles=1, max_registers=255)

    @property
    def pair_sums(self) -> TileConfig:
        """Launch of ``pair_negatives_kernel`` with the positives, whose results fit no cap.

        On Ampere quarters of the block take 255 registers and, with Triton 3.6, a stack.
        """
        eighths = 8 if self.sum == _NARROW else self.sum.epilogue_subtiles
        return replace(self.sum, max_registers=_most(self.sum), epilogue_subtiles=eighths)

    @property
    def filtered(self) -> TileConfig:
        """Launch of the GEMMs over selected rows.

        Their sums are long and their epilogue is a store: nothing has to run beside it, and with
        16-bit elements a block twice as wide loads a quarter less from L2.
        """
        block_n = 256 if self.gradient.block_k >= 64 else self.gradient.block_n
        return replace(
            self.nearest,
            block_n=block_n,
            epilogue_subtiles=block_n // 32,
            max_registers=_most(self.nearest),
        )

    def class_statistics(self, given: bool) -> TileConfig:
        """Launch of ``statistics_kernel``; ``given``: on cosines, which it loads."""
        cap = self.statistics.max_registers or (255 if given else None)
        return replace(self.statistics, max_registers=cap)


def _most(tile: TileConfig) -> int | None:
    """All registers, which four warps may take: else ptxas saves some, with a stack, for one more
    program. With more warps it decides.
    """
    return 255 if tile.num_warps == 4 else None


def fewer_pairs(tile: TileConfig) -> TileConfig:
    """Eighths of the block, for kernels with more state than ``Config.sum_heavy`` holds.

    In quarters float32 gradients of pairs with variables have a stack, with Triton 3.6.
    """
    subtiles = min(8, tile.block_n // 8)
    most = _most(tile) or tile.max_registers
    return replace(tile, epilogue_subtiles=subtiles, max_registers=most)


# Small enough for every path over blocks, subtiles, tiles and waves to run on a few hundred rows.
INTERPRETED = Config(
    sum=TileConfig(32, 32, 32, 4, 2, epilogue_subtiles=2),
    sum_heavy=TileConfig(32, 32, 64, 4, 2, epilogue_subtiles=4),
    statistics=TileConfig(32, 64, 32, 4, 2, epilogue_subtiles=2, group_m=2),
    gradient=TileConfig(64, 32, 32, 4, 2, group_m=2),
    wave=WaveConfig(1 << 17, 256, 1 << 18, 512, 512, split_programs=6),
)

# Hopper. 64 accumulators per thread; at 128 registers and 96 KB two
# programs share an SM, so that the policy of one runs beside the GEMMs of the other. Taking
# the policy in four subtiles is what keeps it within 128 (the triangle with gradients uses all of
# them, without spills). A wider block loads less from L2 (12 bytes per cosine instead of 16 at
# D = 512 in bfloat16), but needs every register, and nothing runs beside its policy.
_WIDE = TileConfig(128, 128, 64, num_warps=8, num_stages=3, max_registers=128, epilogue_subtiles=4)
# More state than 128 registers hold.
_WIDE_HEAVY = replace(_WIDE, max_registers=None)
# Its policy is a handful of operations; in subtiles it would only have more of them.
_WIDE_GRADIENT = replace(_WIDE, epilogue_subtiles=1)
# TF32 elements are twice as large: half the step for the same pipeline. The shared memory of a
# transposed float32 gradient rules out a second program anyway.
_WIDE_TF32 = replace(_WIDE, block_k=32, max_registers=None)
_WIDE_TF32_LIGHT = replace(_WIDE, block_k=32)

# Blackwell's accumulators lie in tensor memory, which takes the pressure off; what is left varies
# with the compiler's version, and a cap would make some of them spill.
_BLACKWELL = replace(_WIDE, max_registers=None)
# Without any, ptxas squeezes kernels of slightly more than 128 registers into these and a stack.
_BLACKWELL_HEAVY = replace(_BLACKWELL, epilogue_subtiles=8, max_registers=255)
_BLACKWELL_GRADIENT = replace(_BLACKWELL, epilogue_subtiles=1)
_BLACKWELL_TF32 = replace(_BLACKWELL, block_k=32)

# Ampere, Ada and consumer Blackwell: mma.sync keeps its operands in registers too, so a program
# has the SM for itself; the blocks of two smaller ones would load half as much again from L2.
# The pipeline fits the 99 KB of the consumer chips.
_NARROW = TileConfig(128, 128, 32, num_warps=8, num_stages=4, epilogue_subtiles=4)
# With row weights or a threshold per column four subtiles take 255 registers and, with Triton 3.6,
# a stack; eight take at most 254 and none.
_NARROW_EIGHTHS = replace(_NARROW, epilogue_subtiles=8)
# Both at once take more than all registers in either: a quarter of the block per program has none.
_NARROW_HEAVY = TileConfig(64, 64, 32, num_warps=4, num_stages=4, epilogue_subtiles=8)
# On consumer Blackwell ptxas squeezes kernels that take slightly more than 128 registers into these
# and a stack: the light one takes more than that in eight subtiles, the heavy one if it may.
_NARROW_HEAVY_BLACKWELL = replace(_NARROW_EIGHTHS, max_registers=255)
_NARROW_GRADIENT = replace(_NARROW, epilogue_subtiles=1)
_NARROW_TF32 = replace(_NARROW, num_stages=3)

# Exact float32 GEMMs run outside the tensor cores: 32 accumulators per thread, or the
# operands that each multiplication takes from shared memory no longer fit beside them.
_EXACT = TileConfig(64, 64, 32, num_warps=4, num_stages=2)
# A whole block of pairs with two thresholds takes 255 registers and, with Triton 3.9, a stack.
_EXACT_HEAVY = replace(_EXACT, epilogue_subtiles=2)

# Tile sizes. A gradient tile is written once and read by two GEMMs of 1024 FLOPs per element at
# D = 512: at 790 TFLOP/s they read 1.5 TB/s of bfloat16, a third of the memory rate of an H200 and,
# with their own rates, of an A100 and a B200. So a tile need not stay in L2, and larger ones pay:
# - A GEMM of r x 512 x r has r / 64 blocks of 128 x 256. With r = 4096 that is 64, half of the 132
#   SMs of an H100; with 8192 it is 128 of 132, 128 of the 148 of a B200, and on the 108 of an A100,
#   in 256 blocks of 128 x 128, 79 % of three rounds instead of 59 % of two.
# - A batch of 32768 has 10 tiles instead of 36, 1M classes and 1024 rows 16 waves instead of 62:
#   the host launches a third to a quarter as often.
# One wave of 1024 rows and bfloat16 is then 65536 classes, of unit columns 64 MB. Without gradients
# partial results, two per 32 columns and row, leave room for 23170 rows with themselves.
_LARGE = WaveConfig(1 << 27, 8192, 1 << 27, 131072, 32768)
# Twice the rate of GEMMs takes twice the classes in a wave for the same share of the host. Pairs
# stay at 8192 rows, which fill its SMs.
_LARGEST = replace(_LARGE, gradient_bytes=1 << 28, unit_bytes=1 << 28, columns=262144)
# Chips with less L2 have at most a quarter of the rate: 4096 x 4096 pairs keep them busy for a
# millisecond, longer than the host needs, and half of their SMs are few.
_SMALL = WaveConfig(1 << 25, 4096, 1 << 25, 32768, 8192)
#: L2 from which a chip takes them. A B200 has 126 MB, an H200 60, an H100 50, an A100 40, large Ada
#: and consumer Blackwell have 72 to 96, small Ada at most 32, consumer Ampere 6.
_WAVES = ((100 << 20, _LARGEST), (36 << 20, _LARGE), (0, _SMALL))
#: A gradient tile is at most this part of the device's memory; with unit columns, their gradient
#: and partial results the workspace then takes at most a 60th.
_PARTS_OF_MEMORY = 240


def wave(memory: DeviceMemory) -> WaveConfig:
    """Tile sizes for a device: by its L2, which distinguishes large chips, within its memory."""
    found = next(wave for l2_bytes, wave in _WAVES if memory.l2_bytes >= l2_bytes)
    size = min(found.gradient_bytes, memory.total_bytes // _PARTS_OF_MEMORY)
    if size == found.gradient_bytes:
        return found
    share = size / found.gradient_bytes
    return replace(
        found,
        gradient_bytes=size,
        unit_bytes=int(found.unit_bytes * share),
        columns=max(int(found.columns * share) // 64, 1) * 64,
    )


def select(
    capability: int, dtype: torch.dtype, tf32: bool, memory: DeviceMemory | None = None
) -> Config:
    """The configuration for a compute capability such as 90; 0 is the interpreter.

    ``memory``: of the device; None: that of a common one of the capability.
    """
    if capability == 0:
        return INTERPRETED
    exact = dtype == torch.float32 and not tf32
    if exact:
        kernels = (_EXACT, _EXACT_HEAVY, _EXACT, _EXACT)
    elif 100 <= capability < 120:
        if tf32:
            kernels = (_BLACKWELL_TF32, _BLACKWELL_TF32, _BLACKWELL_TF32, _BLACKWELL_TF32)
        else:
            kernels = (_BLACKWELL, _BLACKWELL_HEAVY, _BLACKWELL, _BLACKWELL_GRADIENT)
    elif 90 <= capability < 100:
        if tf32:
            kernels = (_WIDE_TF32, _WIDE_TF32, _WIDE_TF32_LIGHT, _WIDE_TF32_LIGHT)
        else:
            kernels = (_WIDE, _WIDE_HEAVY, _WIDE, _WIDE_GRADIENT)
    elif tf32:
        kernels = (_NARROW_TF32, _NARROW_TF32, _NARROW_TF32, _NARROW_TF32)
    elif capability >= 120:
        kernels = (_NARROW_EIGHTHS, _NARROW_HEAVY_BLACKWELL, _NARROW, _NARROW_GRADIENT)
    else:
        kernels = (_NARROW, _NARROW_HEAVY, _NARROW, _NARROW_GRADIENT)
    return Config(*kernels, wave(memory or DeviceMemory.common(capability)))


# One element per thread.
VECTOR = VectorConfig(block=128, num_warps=4)
# One program reads all of it: as many loads at a time as a thread takes.
RANGE = VectorConfig(block=1024, num_warps=8)
#: Rows of a program that adds up what the programs of a filtered tile found.
SPLIT_ROWS = 4
# Few rows: a sector of memory for each block of columns, and as many programs as a GPU has SMs for
# 1024 rows, each of which reads the results of 256 blocks, of 32768 columns, at once.
MERGE = RowConfig(rows=8, block=256, num_warps=4)


def merge_nearest(slots: int) -> RowConfig:
    """Rows with ``slots`` found columns each: 4 of 64 bits per thread; sorting 8 takes a stack."""
    return RowConfig(rows=min(512 // slots, 32), block=32, num_warps=4)


@lru_cache(maxsize=256)
def rows(width: int) -> RowConfig:
    """Rows of ``width`` elements: 2048 at a time, 16 per thread; a wide row in several steps."""
    block = min(max(1 << (width - 1).bit_length(), 64), 1024)
    return RowConfig(2048 // block, block, 4)
