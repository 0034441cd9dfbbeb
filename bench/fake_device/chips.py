"""Chips that a fake device can be: the properties that the package queries, from vendor tables."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(frozen=True)
class Chip:
    """What ``torch.cuda.get_device_properties`` would answer.

    Attributes:
        name: as the driver has it.
        capability: compute capability.
        multiprocessors: SMs.
        l2_bytes, memory_bytes: sizes of the L2 cache and of the memory.
        shared_bytes: largest shared memory of a block.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    shared_bytes: int

    @property
    def arch(self) -> int:
        """Compute capability as a number such as 90."""
        return 10 * self.capability[0] + self.capability[1]

    def properties(self) -> SimpleNamespace:
        """Stands in for the properties of a device."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            L2_cache_size=self.l2_bytes,
            total_memory=self.memory_bytes,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=self.shared_bytes,
            shared_memory_per_multiprocessor=self.shared_bytes + (1 << 10),
            regs_per_multiprocessor=65_536,
            max_threads_per_multi_processor=1536 if self.capability in ((8, 6), (8, 9)) else 2048,
            warp_size=32,
            is_integrated=False,
        )


MB, GB = 1 << 20, 1 << 30
A100 = Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 * MB, 80 * GB, 163 << 10)
RTX4090 = Chip("NVIDIA GeForce RTX 4090", (8, 9), 128, 72 * MB, 24 * GB, 99 << 10)
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 * MB, 80 * GB, 227 << 10)
H200 = Chip("NVIDIA H200", (9, 0), 132, 50 * MB, 141 * GB, 227 << 10)
B200 = Chip("NVIDIA B200", (10, 0), 148, 126 * MB, 180 * GB, 227 << 10)
CHIPS = {"a100": A100, "rtx4090": RTX4090, "h100": H100, "h200": H200, "b200": B200}
