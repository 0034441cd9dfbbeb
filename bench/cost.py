"""What a partial-FC step costs one rank: bytes exchanged, operations, bytes held (docs/scaling.md).

Formulas alone, of :class:`Step` and of a :class:`Machine` whose rates are measured or assumed.
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
# Products of a softmax over classes: with the cosines kept for the backward pass, and without.
PRODUCTS = {"separate": 3, "separate, N > D": 4, "fused": 4, "fused-step": 5}


@dataclass(frozen=True)
class Step:
    """A step of W ranks with n rows each.

    Attributes:
        classes: C, of all ranks.
        sample_rate: part of a shard that takes part.
        mode: how the classes are stepped, of PRODUCTS.
        feature_bytes: of a feature on its way.
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
    def everyone(self) -> int:
        return self.ranks * self.rows

    @property
    def shard(self) -> int:
        return -(-self.classes // self.ranks)

    @property
    def taken(self) -> int:
        return int(self.sample_rate * self.shard)

    # -- exchanged, received by a rank ------------------------------------------------------

    def gathered(self) -> float:
        """Features, labels and the agreement of every other rank."""
        return (self.ranks - 1) * (self.rows * (self.size * self.feature_bytes + INT) + HEADER)

    def merged(self) -> float:
        """Statistics of all rows, by all-reduce."""
        share = (self.ranks - 1) / self.ranks
        return 2.0 * share * STATISTICS * FLOAT * self.everyone

    def returned(self) -> float:
        """Gradients of the own rows from every other rank, by reduce-scatter."""
        return (self.ranks - 1) * self.rows * self.size * FLOAT

    def exchanged(self) -> float:
        return self.gathered() + self.merged() + self.returned()

    # -- computed ---------------------------------------------------------------------------

    def operations(self) -> float:
        return PRODUCTS[self.mode] * 2.0 * self.everyone * self.taken * self.size

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
        """Weights, optimizer state, gradient, rows, and what is kept per row and tile."""
        gradient = 0 if self.mode.startswith("fused") else FLOAT * self.size * self.taken
        # As they arrive, divided by their norms, and their gradient before and after its way.
        rows = self.everyone * self.size * (self.feature_bytes + 3 * FLOAT)
        sums = 2 * FLOAT * self.everyone * -(-self.taken // TILE)
        index = 2 * INT * self.taken if self.sample_rate < 1.0 else 0
        return (1 + self.states) * self.weights() + gradient + rows + sums + index


@dataclass(frozen=True)
class Machine:
    """Rates of one rank.

    Attributes:
        products: operations per second that matrix products reach.
        memory: bytes per second.
        link: bytes per second that a rank receives.
        latency: seconds of a collective.
        capacity: bytes.
    """

    name: str
    products: float
    memory: float
    link: float = float("inf")
    latency: float = 0.0
    capacity: float = float("inf")

    def compute_seconds(self, step: Step) -> float:
        """The update's traffic is not hidden behind products."""
        return step.operations() / self.products + step.traffic() / self.memory

    def exchange_seconds(self, step: Step) -> float:
        if step.ranks == 1:
            return 0.0
        return step.exchanged() / self.link + COLLECTIVES * self.latency

    def largest(self, step: Step, reserved: float) -> int:
        """Most classes that ``step.ranks`` of these hold beside ``reserved`` bytes each."""
        per_class = FLOAT * step.size * (1 + step.states)
        if not step.mode.startswith("fused"):
            per_class += FLOAT * step.size * step.sample_rate
        rows = step.everyone * step.size * (step.feature_bytes + 3 * FLOAT)
        room = 0.9 * self.capacity - reserved - rows
        # Sums of a tile and an index of a class weigh little beside its row.
        per_class += 2 * FLOAT * step.everyone / TILE + 2 * INT
        return max(int(room / per_class) * step.ranks, 0)
