"""Stand-ins for the parts of ``torch.cuda`` that the package uses: properties, streams, events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .chips import Chip
from .recorder import Recorder

DEVICE = torch.device("cuda", 0)


class Stream:
    """A stream of the fake device."""

    _handles = iter(range(0x1000, 1 << 62, 0x10))
    current: Stream
    default: Stream

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = DEVICE
        self.cuda_stream = next(self._handles)

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or torch.cuda.Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        torch.cuda.synchronize()


# The handle of CUDA's default stream, which no capture may use.
Stream.default = Stream()
Stream.default.cuda_stream = 0
Stream.current = Stream.default


class Guard:
    """``with torch.cuda.device(...)``: there is one device."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    before = Stream.current
    Stream.current = stream or before
    try:
        yield
    finally:
        Stream.current = before


def attributes(chip: Chip, recorder: Recorder, capturing: bool) -> dict[str, Any]:
    """Attributes of ``torch.cuda``, by name."""

    class Event:
        """An event that never arrives, as for a host that is far ahead of its device."""

        def __init__(self, enable_timing: bool = False, **options: Any) -> None: ...

        def record(self, stream: Stream | None = None) -> None:
            if stream is None or stream.cuda_stream == Stream.current.cuda_stream:
                recorder.add("event", "record", launches=0)
                return
            with on_stream(stream):
                recorder.add("event", "record", launches=0)

        def wait(self, stream: Stream | None = None) -> None:
            recorder.add("event", "wait for another stream", launches=0)

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            recorder.wait("event.synchronize")

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: chip.capability,
        "get_device_name": lambda device=None: chip.name,
        "get_device_properties": lambda device=None: chip.properties(),
        "mem_get_info": lambda device=None: (
            chip.memory_bytes - recorder.memory.live,
            chip.memory_bytes,
        ),
        "memory_allocated": lambda device=None: recorder.memory.live,
        "is_current_stream_capturing": lambda: capturing,
        "current_stream": lambda device=None: Stream.current,
        "default_stream": lambda device=None: Stream.default,
        "stream": on_stream,
        "synchronize": lambda device=None: recorder.wait("cuda.synchronize"),
        "device": Guard,
        "Event": Event,
        "Stream": Stream,
    }
