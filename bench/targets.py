"""Performance targets of the fused losses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A target on one workload.

    Attributes:
        against: the implementation that ``speedup`` and ``memory_fraction`` are relative to.
        speedup: least speedup.
        memory_mb: largest peak memory above inputs and gradients.
        memory_fraction: the same, relative to ``against``.
        roofline_fraction: least fraction of the roofline.
        ours: our implementation; the device's primary one if None.
    """

    workload: str
    against: str = "eager"
    speedup: float | None = None
    memory_mb: float | None = None
    memory_fraction: float | None = None
    roofline_fraction: float | None = None
    ours: str | None = None
    device: str = "cpu"


# 5 % of the logits of 512 rows and 100 000 classes, or of 128 and 400 000.
LOGITS_MB = 0.05 * 4 * 512 * 100_000 / 2**20

TARGETS = (
    Target("pair-8k", speedup=4.0, memory_fraction=0.05, roofline_fraction=0.7),
    Target("pair-8k", against="torch.compile", speedup=2.0),
    Target("pair-32k", memory_mb=300.0, roofline_fraction=0.7),
    Target("memory-glint", speedup=2.8, memory_fraction=0.03, roofline_fraction=0.65),
    Target("memory-glint", against="torch.compile", speedup=1.2),
    Target("memory-glint-trained", speedup=4.5, memory_fraction=0.03),
    Target("memory-glint-trained", against="torch.compile", speedup=2.0),
    Target("class-100k", speedup=2.2, memory_mb=LOGITS_MB, roofline_fraction=0.75),
    Target("class-100k", against="torch.compile", speedup=1.5),
    Target("class-100k-trained", speedup=4.0, memory_mb=LOGITS_MB),
    Target("class-100k-trained", against="torch.compile", speedup=2.5),
    Target("class-100k-converged", speedup=4.0, memory_mb=LOGITS_MB),
    Target("class-100k-converged", against="torch.compile", speedup=2.5),
    Target("class-400k", speedup=3.0, memory_mb=LOGITS_MB),
    Target("class-400k", against="torch.compile", speedup=1.4),
    Target("class-glint", against="torch.compile", speedup=1.15),
    Target("uce-100k", speedup=2.5, memory_mb=LOGITS_MB, roofline_fraction=0.75),
    Target("uce-100k", against="torch.compile", speedup=1.4),
    Target("clip-8k", speedup=3.0, memory_fraction=0.05),
    Target("siglip-8k", speedup=3.0, memory_fraction=0.05),
    Target("pair-8k-bf16", against="native-float32", speedup=1.3),
    Target("small", speedup=1.0 / 1.5),
    Target("small", speedup=1.0 / 1.5, ours="auto"),
    Target("pair-32k", speedup=5.0, roofline_fraction=0.6, device="cuda"),
    Target("pair-32k", against="torch.compile", speedup=2.5, device="cuda"),
    Target("pair-32k", against="inf-cl", speedup=2.0, device="cuda"),
    Target("class-1m", against="sharded", speedup=2.0, device="cuda"),
    Target("class-1m", against="torch.compile", speedup=1.3, device="cuda"),
    Target("class-1m-trained", against="torch.compile", speedup=3.0, device="cuda"),
)
# From the line a + b N M D, anywhere on the scaling curves.
SCALING_DEVIATION = 0.15
