"""What the fused losses are meant to reach, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """On one workload.

    Attributes:
        against: the contestant that ``ratio`` and ``memory_share`` speak of.
        ratio: how many times longer ``against`` has to take than ours.
        memory_mb: what ours may take at its peak above inputs and gradients.
        memory_share: the same, as a part of what ``against`` takes.
        of_bound: the part of the rate of bare matrix products that ours has to reach.
        ours: the contestant of ours it speaks of; the device's primary one if None.
    """

    workload: str
    against: str = "eager"
    ratio: float | None = None
    memory_mb: float | None = None
    memory_share: float | None = None
    of_bound: float | None = None
    ours: str | None = None
    device: str = "cpu"


# 5 % of the logits of 512 rows and 100 000 classes, or of 128 and 400 000.
LOGITS_MB = 0.05 * 4 * 512 * 100_000 / 2**20

TARGETS = (
    Target("pair-8k", ratio=4.0, memory_share=0.05, of_bound=0.7),
    Target("pair-8k", against="torch.compile", ratio=2.0),
    Target("pair-32k", memory_mb=300.0, of_bound=0.7),
    Target("memory-glint", ratio=2.8, memory_share=0.03, of_bound=0.65),
    Target("memory-glint", against="torch.compile", ratio=1.2),
    Target("memory-glint-trained", ratio=4.5, memory_share=0.03),
    Target("memory-glint-trained", against="torch.compile", ratio=2.0),
    Target("class-100k", ratio=1.8, memory_mb=LOGITS_MB, of_bound=0.75),
    Target("class-100k", against="torch.compile", ratio=1.15),
    Target("class-100k-trained", ratio=4.0, memory_mb=LOGITS_MB),
    Target("class-100k-trained", against="torch.compile", ratio=2.5),
    Target("class-100k-converged", ratio=4.0, memory_mb=LOGITS_MB),
    Target("class-100k-converged", against="torch.compile", ratio=2.5),
    Target("class-400k", ratio=3.0, memory_mb=LOGITS_MB),
    Target("class-400k", against="torch.compile", ratio=1.4),
    Target("uce-100k", ratio=2.5, memory_mb=LOGITS_MB, of_bound=0.75),
    Target("uce-100k", against="torch.compile", ratio=1.4),
    Target("pair-8k-bf16", against="native-float32", ratio=1.3),
    Target("small", ratio=1.0 / 1.5),
    Target("small", ratio=1.0 / 1.5, ours="auto"),
    Target("pair-32k", ratio=5.0, of_bound=0.6, device="cuda"),
    Target("pair-32k", against="torch.compile", ratio=2.5, device="cuda"),
    Target("pair-32k", against="inf-cl", ratio=2.0, device="cuda"),
    Target("class-1m", against="sharded", ratio=2.0, device="cuda"),
    Target("class-1m", against="torch.compile", ratio=1.3, device="cuda"),
    Target("class-1m-trained", against="torch.compile", ratio=3.0, device="cuda"),
)
# Of the line a + b N M D, anywhere on the scaling curves.
SCALING_DEVIATION = 0.15
