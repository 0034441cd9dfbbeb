"""Where the time of a step goes, without waiting for the device."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import tiny, train, write_faces

from train.meter import Averages
from train.run_folder import read_metrics
from train.step_clock import PARTS, StepClock


def steps(clock: StepClock, count: int, parts: int) -> None:
    """Steps of batches that are split into ``parts``."""
    for _ in clock.waiting(range(count)):
        clock.mark()
        clock.mark("augment")
        for _ in range(parts):
            clock.mark("forward")
            clock.mark("backward")
        clock.mark("optimizer")


def test_parts_add_up_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock(torch.device("cpu"))
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    for _ in range(2):
        steps(clock, 3, parts=2)
        found = clock.take()
        # The wait for the end of an epoch counts, too: it is there once for three batches.
        expected = {"data": 4 / 3, "augment": 1, "forward": 2, "backward": 2, "optimizer": 1}
        assert found == {f"{k}_ms": round(v * 1e3, 3) for k, v in expected.items()}
    assert set(clock.take().values()) == {0.0}


def test_events_are_read_at_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == "the stream of cuda:1"
            calls.append("record")

        def elapsed_time(self, other: Event) -> float:
            calls.append("elapsed")
            return 2.0

        def synchronize(self) -> None:
            raise AssertionError

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it waits"))
    clock = StepClock(torch.device("cuda", 1))
    steps(clock, 2, parts=1)
    assert calls == ["record"] * 10
    found = clock.take()
    assert calls[10:] == ["elapsed"] * 8
    assert {k: v for k, v in found.items() if k != "data_ms"} == {
        f"{part}_ms": 2.0 for part in PARTS[1:]
    }


def test_metrics_say_where_the_time_goes(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", identities=4, images=4)
    keys = {"epochs": 2, "accumulate": 2}
    train(tiny(faces, tmp_path / "run", model={"name": "conv4"}, train=keys))
    for line in read_metrics(tmp_path / "run"):
        parts = [line[f"{part}_ms"] for part in PARTS]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= 1e3 * 8 / line["images_per_s"] * 1.01
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header.endswith(",images_per_s,data_ms,augment_ms,forward_ms,backward_ms,optimizer_ms")


def test_waiting_for_data_is_shown_where_it_matters() -> None:
    for waited, shown in ((1.0, "512 images/s"), (30.0, "512 images/s, 30% waiting for data")):
        times = {"data_ms": waited}
        assert Averages(1.0, 1.0, 0.0, 512.0, None, times, step_ms=100.0).speed == shown
