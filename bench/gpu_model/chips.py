"""What is assumed about each GPU. Nothing here was measured by this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .. import fake_device

GUIDE = "CUDA C++ Programming Guide, throughput of arithmetic instructions per compute capability"
LIMITS = "CUDA C++ Programming Guide, technical specifications per compute capability"
SHEET = "data sheet"
GUESS = "estimate, not measured"


def _assumption(unit: str, source: str, default: Any = None) -> Any:
    options = {} if default is None else {"default": default}
    return field(metadata={"unit": unit, "source": source}, kw_only=True, **options)


@dataclass(frozen=True)
class Chip:
    """A GPU as the model sees it; what each number means and where it is from stands beside it.

    Attributes:
        device: its sizes.
        own_sources: of fields whose source on this chip is another one.
    """

    device: fake_device.Chip
    own_sources: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    clock: float = _assumption("Hz", SHEET + ", boost clock")
    tensor_fma: int = _assumption("bf16 FMA per cycle and SM", SHEET + ", dense peak")
    lanes: Mapping[str, int] = _assumption("lanes per cycle and SM by pipe", GUIDE)
    l2_usable: float = _assumption("fraction of L2 that reused buffers may fill", GUESS, 0.75)
    l2_rate: float = _assumption("bytes per cycle and SM from L2; the least certain", GUESS, 32.0)
    gemm_rate: float = _assumption("FLOP/s of a large bf16 GEMM of the library", GUESS)
    copy_rate: float = _assumption("bytes/s of a large copy, read plus written", GUESS)
    issue_efficiency: float = _assumption("of one instruction per scheduler and cycle", GUESS, 0.8)
    overlap: float = _assumption(
        "p of the p-norm of tensor, issue and L2 cycles of co-resident programs: 1 is no overlap, "
        "infinity a perfect one",
        GUESS,
        4.0,
    )
    kernel_seconds: float = _assumption("s, least time of a kernel among others", GUESS, 2.5e-6)
    reduction_seconds: float = _assumption("s, the same of a library reduction", GUESS, 4.0e-6)
    round_seconds: float = _assumption(
        "s of a round of loads of a program with the work on them, for kernels without a GEMM",
        GUESS,
        1.0e-6,
    )
    gemm_block: tuple[int, int] = _assumption(
        "output block of the library's GEMM", GUESS, (128, 256)
    )
    split_depth: int = _assumption("least depth of a part of a split GEMM", GUESS, 2048)
    split_efficiency: float = _assumption("rate of a split GEMM against a whole one", GUESS, 0.8)
    registers: int = _assumption("32-bit registers per SM", LIMITS, 65536)
    warps: int = _assumption("warps per SM", LIMITS, 64)

    @property
    def architecture(self) -> int:
        return self.device.arch

    @property
    def sms(self) -> int:
        return self.device.multiprocessors

    @property
    def l2_bandwidth(self) -> float:
        """Bytes/s of all SMs."""
        return self.l2_rate * self.sms * self.clock

    def assumptions(self) -> dict[str, dict[str, Any]]:
        """Value, meaning or unit, and source by name."""
        found = {
            f.name: {
                "value": getattr(self, f.name),
                "unit": f.metadata["unit"],
                "source": self.own_sources.get(f.name, f.metadata["source"]),
            }
            for f in fields(self)
            if f.metadata
        }
        for name in ("multiprocessors", "l2_bytes", "shared_bytes"):
            value = getattr(self.device, name)
            found[name] = {"value": value, "unit": "of the device", "source": SHEET}
        return found

    def programs_per_sm(self, registers: int, shared: int, warps: int) -> int:
        """Programs that an SM holds at once."""
        # Registers are given to warps in units of 256, and 1 KB of each block is the system's.
        per_warp = -(-max(registers, 1) * 32 // 256) * 256
        by_registers = self.registers // (per_warp * warps)
        by_shared = (self.device.shared_bytes + 1024) // (shared + 1024)
        return min(by_registers, by_shared, self.warps // warps, 32)


#: Integer and half-precision multiplications take half of the FMA lanes.
_LANES = {"FMA": 128, "IMAD": 64, "ALU": 64, "MUFU": 16, "SHFL": 32}
_ELSEWHERE = "measured on such a card by others"

A100 = Chip(
    fake_device.A100,
    clock=1.41e9,
    tensor_fma=1024,
    lanes=_LANES | {"FMA": 64},
    gemm_rate=250e12,
    copy_rate=1.7e12,
)
H200 = Chip(
    fake_device.H200,
    own_sources={"gemm_rate": _ELSEWHERE, "copy_rate": _ELSEWHERE},
    clock=1.83e9,
    tensor_fma=2048,
    lanes=_LANES,
    gemm_rate=790e12,
    copy_rate=4.3e12,
)
B200 = Chip(
    fake_device.B200,
    clock=1.85e9,
    tensor_fma=4096,
    lanes=_LANES,
    gemm_rate=1600e12,
    copy_rate=6.5e12,
)
#: By architecture.
CHIPS = {chip.architecture: chip for chip in (A100, H200, B200)}
