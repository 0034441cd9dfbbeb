"""The context in which a fake device exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from unitsface_kernels import autograd
from unitsface_kernels.backends import triton
from unitsface_kernels.backends.native import engine, loader
from unitsface_kernels.backends.triton import autotune, launch, matmul, workspace
from unitsface_kernels.backends.triton.autotune_store import Store
from unitsface_kernels.validate import label_ranges

from . import cuda
from .chips import H200, Chip
from .launches import NativeLaunches, TritonLaunches
from .recorder import META, Answer, Recorder
from .records import Array, Tape
from .replay import Replay


class FakeDevice:
    """What the context yields."""

    def __init__(self, chip: Chip, recorder: Recorder) -> None:
        self.chip, self._recorder = chip, recorder

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Collects the work that is enqueued inside."""
        with self._recorder.recording() as tape:
            yield tape

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Names the part of a step that the work inside belongs to."""
        before, self._recorder.section = self._recorder.section, name
        try:
            yield
        finally:
            self._recorder.section = before

    @property
    def live_bytes(self) -> int:
        return self._recorder.memory.live

    def array(self, tensor: Tensor) -> Array:
        """The place of a tensor of the device."""
        return self._recorder.memory.array(tensor)

    def replay(self, tape: Tape, native: Any = None) -> Replay:
        """What was recorded, on real memory; see :class:`Replay`."""
        return Replay(tape, self._recorder.memory, native)


@contextmanager
def fake_device(
    chip: Chip = H200, *, answer: Answer | None = None, capturing: bool = False
) -> Iterator[FakeDevice]:
    """``cuda:0`` is ``chip`` inside; one at a time, and in one thread.

    Args:
        chip: what the device is.
        answer: returns what the host waits for, from the operator's name and its arguments: a
            number, or a tensor of the CPU. None: waiting is an error.
        capturing: whether a CUDA graph is being captured.
    """
    recorder = Recorder(lambda: cuda.Stream.current.cuda_stream, answer)
    native = NativeLaunches(recorder, loader.extension())
    with ExitStack() as stack:

        def patch(target: Any, **attributes: Any) -> None:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(target, name, value, create=True))

        patch(torch.cuda, **cuda.attributes(chip, recorder, capturing))
        patch(FakeTensor, **_tensor_attributes(recorder))
        patch(Tensor, to=_to(Tensor.to), cuda=lambda tensor, *args, **kwargs: tensor.to(META))
        package_patches(patch, native, TritonLaunches(recorder))
        # Fake tensors are subclasses seen by a dispatch mode, for which a call would take the
        # operators of ``ops.py`` instead of the kernels.
        patch(autograd, applies=lambda tensors: True)
        stack.enter_context(recorder.mode)
        stack.enter_context(recorder)
        stack.enter_context(cuda.on_stream(cuda.Stream()))
        yield FakeDevice(chip, recorder)


def package_patches(patch: Callable[..., None], native: Any, run_triton: Any) -> None:
    """Replaces what launches kernels, and what the package caches per device.

    Args:
        patch: called with a target and new values of its attributes.
        native: in place of the extension.
        run_triton: in place of ``backends.triton.launch.run``.
    """
    patch(launch, INTERPRETED=False, run=run_triton)
    patch(loader, extension=lambda: native, device_failure=_device_failure)
    patch(engine, extension=lambda: native)
    # Answers that processes keep: this device's are not those of the next.
    patch(matmul, _mixes=cache(matmul._mixes.__wrapped__))
    patch(autotune, _tuner=cache(_no_results))
    patch(workspace, device_config=cache(workspace.device_config.__wrapped__))
    patch(triton, _usable=set())
    patch(label_ranges, _pending=[])


_real_failure = loader.device_failure


def _device_failure(device: torch.device) -> str | None:
    return None if device.type == "cuda" else _real_failure(device)


def _no_results(device: int) -> autotune.Tuner:
    """Results of searches on another machine are none of this device."""

    class Empty(Store):
        def __init__(self) -> None:
            self.path, self.entries = Path("none"), {}

    return autotune.Tuner(Empty(), autotune.cuda_seconds)


def _tensor_attributes(recorder: Recorder) -> dict[str, Any]:
    """Attributes of fake tensors as Python outside of Torch's own fake kernels sees them."""
    true_device = FakeTensor.device

    def device(tensor: FakeTensor) -> torch.device:
        found = true_device.fget(tensor)  # type: ignore[attr-defined]
        return cuda.DEVICE if found.type == "meta" and not recorder.inside else found

    def is_type(name: str) -> property:
        return property(lambda tensor: tensor.device.type == name)

    def data_ptr(tensor: FakeTensor) -> int:
        return recorder.memory.address(tensor) if tensor.numel() else 0

    return {
        "device": property(device),
        "is_cuda": is_type("cuda"),
        "is_meta": is_type("meta"),
        "is_cpu": is_type("cpu"),
        "get_device": lambda tensor: 0,
        "data_ptr": data_ptr,
    }


def _to(original: Any) -> Any:
    """``Tensor.to`` with the device's name for C++."""

    def place(value: Any) -> Any:
        is_device = isinstance(value, torch.device) or value == "cuda" or value == "cuda:0"
        return META if is_device and torch.device(value).type == "cuda" else value

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(v if isinstance(v, Tensor) else place(v) for v in args)
        if "device" in kwargs:
            kwargs["device"] = place(kwargs["device"])
        return original(tensor, *args, **kwargs)

    return to
