"""What is assumed about each GPU. Nothing here was measured by this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

GUIDE = "CUDA C++ Programming Guide, throughput of arithmetic instructions per compute capability"
LIMITS = "CUDA C++ Programming Guide, technical specifications per compute capability"
SHEET = "data sheet"
GUESS = "estimate, not measured"


def _assumption(unit: str, source: str, default: Any = None) -> Any:
    options = {} if default is None else {"default": default}
    return field(metadata={"unit": unit, "source": source}, kw_only=True, **options)


@dataclass(frozen=True)
class Chip:
    """A GPU, as the model sees it. Units and sources of all numbers: :meth:`assumptions`.

    Attributes:
        lanes: per pipe, lanes per cycle and SM.
        own_sources: of fields whose source on this chip is another one.
    """

    name: str
    architecture: int
    own_sources: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    sms: int = _assumption("SMs", SHEET)
    clock: float = _assumption("Hz", SHEET + ", boost clock")
    tensor_fma: int = _assumption("bf16 FMA per cycle and SM", SHEET + ", dense peak")
    lanes: Mapping[str, int] = _assumption("lanes per cycle and SM", GUIDE)
    l2_bytes: float = _assumption("bytes", SHEET)
    #: How much of L2 a reused buffer may fill before it is counted as memory traffic.
    l2_usable: float = _assumption("fraction of L2", GUESS, 0.75)
    l2_rate: float = _assumption("bytes per cycle and SM, the least certain number", GUESS, 32.0)
    gemm_rate: float = _assumption("FLOP/s, large bf16 GEMM of the library", GUESS)
    copy_rate: float = _assumption("bytes/s read plus written, large copy", GUESS)
    #: Instructions issued per scheduler and cycle, where nothing else limits.
    issue_efficiency: float = _assumption("fraction", GUESS, 0.8)
    #: Of the p-norm that combines issue, L2 and tensor cores of co-resident programs: infinity
    #: would be a perfect overlap, 1 none.
    overlap: float = _assumption("exponent", GUESS, 4.0)
    #: Least time of a kernel between two others in a stream or a graph.
    kernel_seconds: float = _assumption("s", GUESS, 2.0e-6)
    #: Output block of a program of the library's GEMM.
    gemm_block: tuple[int, int] = _assumption("rows, columns", GUESS, (128, 256))
    registers: int = _assumption("32-bit registers per SM", LIMITS, 65536)
    shared_bytes: int = _assumption("bytes of shared memory per SM", LIMITS)
    warps: int = _assumption("warps per SM", LIMITS, 64)

    def assumptions(self) -> dict[str, dict[str, Any]]:
        """Value, unit and source by name."""
        return {
            f.name: {
                "value": getattr(self, f.name),
                "unit": f.metadata["unit"],
                "source": self.own_sources.get(f.name, f.metadata["source"]),
            }
            for f in fields(self)
            if f.metadata
        }

    def programs_per_sm(self, registers: int, shared: int, warps: int) -> int:
        """Programs that an SM holds at once."""
        # Registers are given to warps in units of 256, and 1 KB of each block is the system's.
        per_warp = -(-max(registers, 1) * 32 // 256) * 256
        by_registers = self.registers // (per_warp * warps)
        return min(by_registers, self.shared_bytes // (shared + 1024), self.warps // warps, 32)


#: Integer and half-precision multiplications take half of the FMA lanes.
_LANES = {"FMA": 128, "IMAD": 64, "ALU": 64, "MUFU": 16, "SHFL": 32}
_ELSEWHERE = "measured on such a card by others"

A100 = Chip(
    "A100 80 GB",
    80,
    sms=108,
    clock=1.41e9,
    tensor_fma=1024,
    lanes=_LANES | {"FMA": 64},
    l2_bytes=40e6,
    gemm_rate=250e12,
    copy_rate=1.7e12,
    shared_bytes=164 * 1024,
)
H200 = Chip(
    "H200",
    90,
    own_sources={"gemm_rate": _ELSEWHERE, "copy_rate": _ELSEWHERE},
    sms=132,
    clock=1.83e9,
    tensor_fma=2048,
    lanes=_LANES,
    l2_bytes=50e6,
    gemm_rate=790e12,
    copy_rate=4.3e12,
    shared_bytes=228 * 1024,
)
B200 = Chip(
    "B200",
    100,
    sms=148,
    clock=1.85e9,
    tensor_fma=4096,
    lanes=_LANES,
    l2_bytes=126e6,
    gemm_rate=1600e12,
    copy_rate=6.5e12,
    shared_bytes=228 * 1024,
)
#: By architecture.
CHIPS = {chip.architecture: chip for chip in (A100, H200, B200)}
