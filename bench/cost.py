"""Cost of a partial-FC step on one rank: bytes exchanged, FLOPs, peak memory (docs/scaling.md).

Formulas of a :class:`Step` on a :class:`Machine` whose rates are measured or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, INT = 4, 8
# Per row: the maximum, then the sum and the target's cosine.
STATISTICS = 3
HEADER = 3 * INT
COLLECTIVES = 6
# Width of a tile of classes on the CPU, for which sums of each row are kept.
TILE = 768
# GEMMs of a softmax over classes: with the cosines kept for the backward pass, and without.
GEMMS = {"separate": 3, "separate, N > D": 4, "fused": 4, "fused-step": 5}


@dataclass(frozen=True)
class Step:
    """A step of W ranks with n rows each.

    Attributes:
        classes: C, of all ranks.
        sample_rate: sampled part of a shard.
        mode: key of GEMMS: how the optimizer step is made.
        feature_bytes: per element of a feature in transit.
        states: tensors of the optimizer as large as the weights: SGD with momentum 1, AdamW 2.
    """

    ranks: int
    rows: int
    classes: int
    size: int = 512
    sample_rate: float = 1.0
    mode: str = "fused"
    feature_bytes: int = 2
    states: int = 1

    @property
    def all_rows(self) -> int:
        return self.ranks * self.rows

    @property
    def shard(self) -> int:
        return -(-self.classes // self.ranks)

    @property
    def taken(self) -> int:
        return int(self.sample_rate * self.shard)

    # -- exchanged, received by a rank ------------------------------------------------------

    def gathered(self) -> float:
        """Features, labels and the agreement header of every other rank."""
        return (self.ranks - 1) * (self.rows * (self.size * self.feature_bytes + INT) + HEADER)

    def merged(self) -> float:
        """Statistics of all rows, by all-reduce."""
        fraction = (self.ranks - 1) / self.ranks
        return 2.0 * fraction * STATISTICS * FLOAT * self.all_rows

    def returned(self) -> float:
        """Gradients of the own rows from every other rank, by reduce-scatter."""
        return (self.ranks - 1) * self.rows * self.size * FLOAT

    def exchanged(self) -> float:
        return self.gathered() + self.merged() + self.returned()

    # -- computed ---------------------------------------------------------------------------

    def flops(self) -> float:
        return GEMMS[self.mode] * 2.0 * self.all_rows * self.taken * self.size

    def traffic(self) -> float:
        """Bytes of memory that weights, optimizer state and gradient move."""
        row = FLOAT * self.size
        passes = 3 if self.mode == "fused-step" else 2
        update = 2 * (1 + self.states)
        gradient = 0 if self.mode.startswith("fused") else 2
        return row * self.taken * (passes + update + gradient)

    # -- held -------------------------------------------------------------------------------

    def weights(self) -> float:
        return FLOAT * self.size * self.shard

    def held(self) -> float:
        """Weights, optimizer state, gradient, rows, and sums per row and tile."""
        gradient = 0 if self.mode.startswith("fused") else FLOAT * self.size * self.taken
        # Gathered, normalized, and their gradient before and after the reduce-scatter.
        rows = self.all_rows * self.size * (self.feature_bytes + 3 * FLOAT)
        sums = 2 * FLOAT * self.all_rows * -(-self.taken // TILE)
        index = 2 * INT * self.taken if self.sample_rate < 1.0 else 0
        return (1 + self.states) * self.weights() + gradient + rows + sums + index


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        gemm: FLOP/s of GEMMs.
        memory: bytes per second.
        link: bytes per second that a rank receives.
        latency: seconds of a collective.
        capacity: bytes.
    """

    name: str
    gemm: float
    memory: float
    link: float = float("inf")
    latency: float = 0.0
    capacity: float = float("inf")

    def compute_seconds(self, step: Step) -> float:
        """GEMMs, then the traffic of the update, which does not overlap with them."""
        return step.flops() / self.gemm + step.traffic() / self.memory

    def exchange_seconds(self, step: Step) -> float:
        if step.ranks == 1:
            return 0.0
        return step.exchanged() / self.link + COLLECTIVES * self.latency

    def largest(self, step: Step, reserved: float) -> int:
        """Most classes that fit on ``step.ranks`` machines beside ``reserved`` bytes each."""
        per_class = FLOAT * step.size * (1 + step.states)
        if not step.mode.startswith("fused"):
            per_class += FLOAT * step.size * step.sample_rate
        rows = step.all_rows * step.size * (step.feature_bytes + 3 * FLOAT)
        room = 0.9 * self.capacity - reserved - rows
        # Sums per tile and an index per class, small beside the row.
        per_class += 2 * FLOAT * step.all_rows / TILE + 2 * INT
        return max(int(room / per_class) * step.ranks, 0)
