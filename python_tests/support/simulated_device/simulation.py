"""The device of a simulated machine: a fake one, with times, graphs and small workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import gpu_profile, gpu_small_cases, session, workloads
from bench.fake_device import H200, FakeDevice, fake_device
from bench.gpu_check import compile_kernels, host, rates, reread, steps, timing
from unitsface_kernels.backends.triton import autotune

#: Of every event after the one before it.
EVENT_MS = 200.0
ROWS, COLUMNS = 256, 1100
#: One for each kind of driver.
LOSSES = ("fused_uss_loss", "fused_margin_softmax_loss", "fused_npt_loss")
#: What the host sees of a device that computes nothing, by type.
SEEN = {torch.bool: True, torch.int64: 1, torch.int32: 1}


def _answer(name: str, args: tuple[Any, ...]) -> Any:
    """A result that is right: true, equal, or a difference of nearly nothing."""
    tensor = next((one for one in args if isinstance(one, Tensor)), None)
    if tensor is None or "equal" in name:
        return True
    # Where the size of a result on the device depends on the data.
    if "nonzero" in name:
        return torch.zeros(1, max(tensor.dim(), 1), dtype=torch.int64, device="meta")
    if "unique" in name:
        place = torch.zeros(tensor.shape, dtype=torch.int64, device="meta")
        one = torch.zeros(1, dtype=torch.int64, device="meta")
        return one, place, one
    if "index" in name:
        return torch.zeros(1, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
    if "item" in name or "local_scalar" in name:
        return SEEN.get(tensor.dtype, 1e-9)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


class _Event:
    """An event whose time is a number of others."""

    count = 0

    def __init__(self, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        _Event.count += 1
        self.number = _Event.count

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: _Event) -> float:
        return EVENT_MS * (other.number - self.number)


class _Driver:
    """Triton's, which names the target that it compiles for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H200.arch, 32)


@contextmanager
def _capture(graph: object, **options: Any) -> Iterator[None]:
    yield


def _kernel_seconds(device: FakeDevice) -> Callable[[Callable[[], object]], dict[str, float]]:
    """By name, as a profiler would see them, 10 us each."""

    def measure(step: Callable[[], object]) -> dict[str, float]:
        found: dict[str, float] = {}
        with device.recording() as tape:
            step()
        for work in tape.work:
            if work.launches:
                found[work.name] = found.get(work.name, 0.0) + 1e-5 * work.launches
        return found

    return measure


def _built(kernel: Any, *args: Any, grid: Any, **options: Any) -> SimpleNamespace:
    """What compiling returns, for constants as the key."""
    key = kernel.fn.__name__ + str(sorted((k, str(v)) for k, v in options.items()))
    metadata = SimpleNamespace(shared=1024, num_warps=options["num_warps"])
    return SimpleNamespace(hash=key, asm={"cubin": b""}, metadata=metadata)


@contextmanager
def simulated(compilation: str = "none") -> Iterator[FakeDevice]:
    """An H200 that is recorded; ``compilation`` "triton": its kernels are really compiled."""
    small = {name: w.shrunk(ROWS, COLUMNS) for name, w in workloads.WORKLOADS.items()}
    with fake_device(H200, answer=_answer) as device, ExitStack() as stack:

        def patch(target: Any, **attributes: Any) -> None:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(target, name, value, create=True))

        patch(torch, Generator=_generator(torch.Generator))
        patch(
            torch.cuda,
            Event=_Event,
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
            graph=_capture,
            empty_cache=lambda: None,
            reset_peak_memory_stats=lambda: None,
            max_memory_allocated=lambda: device.live_bytes,
            memory_reserved=lambda: device.live_bytes,
        )
        stack.enter_context(mock.patch.dict(workloads.WORKLOADS, small))
        patch(steps, PARTIAL_FC=replace(steps.PARTIAL_FC, rows=ROWS, classes=COLUMNS))
        patch(gpu_profile, kernel_seconds=_kernel_seconds(device))
        patch(rates, COPIED=1 << 20)
        # Nothing is measured: once is enough.
        patch(timing, LEAST=1, WARM_UP=0)
        patch(host, LAUNCHED=1, IN_A_ROW=1)
        patch(steps, WARM_UP=1)
        losses = {name: gpu_small_cases.FUNCTIONS[name] for name in LOSSES}
        # What is not computed is not compared.
        patch(gpu_small_cases, FUNCTIONS=losses, _error=lambda *_: 0.0)
        patch(gpu_small_cases, check_histogram=lambda *_: None)
        candidates = autotune.tile_configs
        patch(autotune, tile_configs=lambda *given: candidates(*given)[:4])
        patch(reread, reread_kernel={(132 * rates.PROGRAMS_PER_SM,): lambda *a, **k: None})
        patch(FakeTensor, tolist=lambda t: torch.zeros(t.shape, dtype=t.dtype).tolist())
        if compilation == "triton":
            driver.set_active(_Driver())
        else:
            patch(compile_kernels, compile_kernel=_built)
        # Its answer is a number.
        patch(session.Local, _device_answers=lambda self: True)
        yield device


def _generator(real: type[torch.Generator]) -> Callable[..., torch.Generator]:
    return lambda device="cpu": real()
