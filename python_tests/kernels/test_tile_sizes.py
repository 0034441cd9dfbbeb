"""Tile sizes of the GPU engines on devices of several sizes, none of which needs to be present."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from unitsface_kernels.backends import memory
from unitsface_kernels.backends import triton as backend
from unitsface_kernels.backends.memory import DeviceMemory
from unitsface_kernels.backends.native import cuda_engine
from unitsface_kernels.backends.native.cuda_engine import CudaEngine
from unitsface_kernels.backends.streaming import Call
from unitsface_kernels.losses import REGISTRY

MB, GB = 1 << 20, 1 << 30
BFLOAT16 = torch.bfloat16
# L2, memory as the driver reports it, capability.
DEVICES = {
    "A100-40": (40 * MB, int(39.4 * GB), 80),
    "A100-80": (40 * MB, int(79.2 * GB), 80),
    "H100": (50 * MB, int(79.1 * GB), 90),
    "H200": (60 * MB, int(139.8 * GB), 90),
    "B200": (126 * MB, int(178.4 * GB), 100),
    "RTX 3090": (6 * MB, int(23.7 * GB), 86),
    "RTX 4060": (24 * MB, int(7.6 * GB), 89),
    "RTX 4090": (72 * MB, int(23.5 * GB), 89),
    "RTX 5090": (96 * MB, int(31.4 * GB), 120),
}
LARGE = ("A100-40", "A100-80", "H100", "H200", "B200", "RTX 5090")


def make_call(rows: int, columns: int = 0, dtype: torch.dtype = BFLOAT16) -> Call:
    """Without memory: sizes are all that counts."""
    spec = REGISTRY["margin_softmax" if columns else "uss"]
    features = torch.empty(rows, 512, dtype=dtype, device="meta")
    weight = torch.empty(columns, 512, dtype=dtype, device="meta") if columns else None
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    static = (spec, spec.pack(spec.defaults()), "mean", "triton", dtype)
    return Call(*static, rows=features, row_labels=labels, columns=weight)


def triton_engine(name: str, call: Call, gradients: bool):
    reason = backend._broken()
    if reason is not None:
        pytest.skip(reason)
    from unitsface_kernels.backends.triton import configs
    from unitsface_kernels.backends.triton.engine import TritonEngine

    l2_bytes, total_bytes, capability = DEVICES[name]
    found = DeviceMemory(l2_bytes, total_bytes)
    config = configs.select(capability, call.compute_dtype, False, found)
    return TritonEngine(call, gradients, config=config)


def test_memory_is_that_of_the_device_and_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device.index)
        return SimpleNamespace(L2_cache_size=(5 + device.index) * MB, total_memory=7 * GB)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    memory.device_memory.cache_clear()
    try:
        for index in (0, 1, 0, 1):
            found = memory.device_memory(torch.device("cuda", index))
            assert found == DeviceMemory((5 + index) * MB, 7 * GB)
        assert asked == [0, 1]
        assert memory.device_memory(torch.device("cpu")) is None
    finally:
        memory.device_memory.cache_clear()


@pytest.mark.parametrize("name", LARGE)
def test_few_tiles_on_large_chips(name: str) -> None:
    """8192 rows with themselves are one tile, 100 000 classes one wave."""
    assert triton_engine(name, make_call(8192), True).sum_block == (8192, 8192)
    assert triton_engine(name, make_call(32768), True).sum_block == (8192, 8192)
    for gradients in (False, True):
        block = triton_engine(name, make_call(512, 100_000), gradients).class_block
        assert block[0] == 512
        assert block[1] >= 100_000


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("rows", [1, 130, 512, 5000, 9000, 40_000])
@pytest.mark.parametrize("name", DEVICES)
def test_workspaces_are_a_60th_of_the_memory(name: str, rows: int, dtype: torch.dtype) -> None:
    limit, size = DEVICES[name][1] / 60, dtype.itemsize
    side, _ = triton_engine(name, make_call(rows, dtype=dtype), True).sum_block
    assert side % 64 == 0
    assert side * side * size <= limit / 4
    # Losses alone: of partial results, two per row and 32 columns.
    side, _ = triton_engine(name, make_call(rows, dtype=dtype), False).sum_block
    assert side * side // 32 * 8 <= limit / 4
    for gradients in (False, True):
        height, columns = triton_engine(
            name, make_call(rows, 1_000_000, dtype), gradients
        ).class_block
        unit = columns * 512 * size
        # The gradient tile and, in float32, that of the unit columns; or two partial results.
        used = columns * (height * size + 512 * 4) if gradients else columns // 32 * height * 8
        assert unit + used <= limit
        assert columns % 64 == 0


def test_tiles_are_even() -> None:
    """A batch slightly larger than a tile is not a large tile and a sliver."""
    for count in (8200, 9000, 20_000, 33_000):
        side, _ = triton_engine("H100", make_call(count), True).sum_block
        parts = -(-count // 8192)
        assert -(-count // side) == parts
        assert parts * side - count < 128 * parts


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_native_tiles_stay_in_l2(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = DeviceMemory(*DEVICES[name][:2])
    monkeypatch.setattr(cuda_engine, "device_memory", lambda device: found)
    monkeypatch.setattr(CudaEngine, "_kernel", None)
    held = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    least = cuda_engine.LEAST_ROWS
    limit = max(found.l2_bytes, held * least * least)
    side, _ = CudaEngine(make_call(10_000, dtype=dtype)).sum_block
    assert side >= least
    assert side % 128 == 0
    assert side * side * held <= limit
    for rows in (1, 512, 3000):
        height, columns = CudaEngine(make_call(rows, 100_000, dtype)).class_block
        assert min(rows, height) * columns * held <= limit
        assert columns >= 128
