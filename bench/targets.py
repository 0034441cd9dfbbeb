"""What the fused losses are meant to reach, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """On one workload.

    Attributes:
        ratio: how many times longer ``against`` has to take than ours.
        memory_mb: what ours may take at its peak above inputs and gradients.
        ours: the contestant of ours it speaks of; the device's primary one if None.
    """

    workload: str
    against: str = "eager"
    ratio: float | None = None
    memory_mb: float | None = None
    ours: str | None = None
    device: str = "cpu"


TARGETS = (
    Target("small", ratio=1.0, ours="auto"),
    Target("pair-8k", ratio=2.5, memory_mb=100.0),
    Target("pair-8k", against="torch.compile", ratio=1.0),
    Target("pair-8k-bf16", against="native-float32", ratio=1.3),
    Target("pair-8k-bf16", ratio=1.0),
    Target("memory-glint", ratio=1.0),
    Target("memory-glint-trained", ratio=1.0),
    Target("class-100k", ratio=1.5, memory_mb=60.0),
    Target("class-100k", against="torch.compile", ratio=1.0),
    Target("class-100k-trained", ratio=1.5),
    Target("class-400k", ratio=1.5),
    Target("uce-100k", ratio=1.5),
    Target("pair-32k", ratio=1.0, device="cuda"),
    Target("class-glint", ratio=1.0, device="cuda"),
)
# Of the line a + b N M D, anywhere on the scaling curves.
SCALING_DEVIATION = 0.15
