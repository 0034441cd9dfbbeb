"""Sizes of a device's memories, from which tile sizes follow."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

_MB, _GB = 1 << 20, 1 << 30


class DeviceMemory(NamedTuple):
    """Bytes of the L2 cache and of the whole device memory."""

    l2_bytes: int
    total_bytes: int

    @classmethod
    def common(cls, capability: int) -> DeviceMemory:
        """Sizes of a common device of a compute capability such as 90, without a device."""
        if 100 <= capability < 120:
            return cls(126 * _MB, 180 * _GB)  # B200
        if 90 <= capability < 100:
            return cls(50 * _MB, 80 * _GB)  # H100
        if capability == 80:
            return cls(40 * _MB, 40 * _GB)  # A100
        return cls(6 * _MB, 24 * _GB)  # consumer Ampere, the least L2


@cache
def device_memory(device: torch.device) -> DeviceMemory | None:
    """Sizes of a CUDA device, looked up once; None if it is no CUDA device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return DeviceMemory(properties.L2_cache_size, properties.total_memory)


__all__ = ["DeviceMemory", "device_memory"]
