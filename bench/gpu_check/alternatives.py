"""``python -m bench.gpu_check.alternatives``: the shipped launches of Triton against others.

Sets the launches below the public API, for whole steps: where a gradient tile lies when the
library's GEMMs read it is part of what a launch decides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from unitsface_kernels.backends.triton import autotune, configs, workspace

from . import pool, steps, timing
from .files import write_json

#: Kinds of kernels that take a step's time, as the search names them.
KINDS = {"pair-32k": ("sum",), "class-1m": ("statistics", "gradient")}
SHIPPED = "shipped"
#: Wave sizes for chips with 40 MB of second-level cache and memory, and with 50 MB and more.
WAVES = {
    "small waves": (1 << 25, 4096, 1 << 25, 32768, 8192),
    "large waves": (1 << 27, 8192, 1 << 27, 131072, 32768),
}
#: A result that differs by more from the shipped launch's is wrong.
SAME_LOSS = 1e-3
LIMIT_S = 20.0
SAMPLES_S = 0.05

Change = Callable[[configs.Config], configs.Config]


def _difference(a: Any, b: Any) -> str:
    """The fields of ``b`` in which it differs from ``a``."""
    found = [f.name for f in fields(b) if getattr(a, f.name) != getattr(b, f.name)]
    return ", ".join(f"{name} {getattr(b, name)}" for name in found)


def _unchanged(config: configs.Config) -> configs.Config:
    return config


def changes(step: str, base: configs.Config) -> dict[str, Change]:
    """What is compared, by name; waves first, which are expected to matter most."""
    found: dict[str, Change] = {SHIPPED: _unchanged}
    for name, (size, rows, unit, columns, height) in WAVES.items():
        wave = replace(
            base.wave,
            gradient_bytes=size,
            gradient_rows=rows,
            unit_bytes=unit,
            columns=columns,
            rows=height,
        )
        if wave != base.wave:
            found[name] = lambda config, wave=wave: replace(config, wave=wave)
    for kind in KINDS[step]:
        slot = autotune.SLOTS[kind]
        shipped = getattr(base, slot)
        for tile in autotune.tile_configs(shipped, kind)[1:]:
            found[f"{kind}: {_difference(shipped, tile)}"] = lambda config, slot=slot, tile=tile: (
                replace(config, **{slot: tile})
            )
    return found


@contextmanager
def selected(change: Change) -> Iterator[None]:
    """Calls inside have the changed launches."""
    shipped = workspace.device_config
    workspace.device_config = cache(lambda *key: change(shipped(*key)))
    try:
        yield
    finally:
        workspace.device_config = shipped


def names(step: str, capability: int) -> list[str]:
    """The names of :func:`changes` on a device of this capability."""
    return list(changes(step, configs.select(capability, torch.bfloat16, False)))


def change_of(step: str, name: str) -> Change:
    """A change by its name, whatever the device's launches are; none where it is shipped."""
    return lambda config: changes(step, config).get(name, _unchanged)(config)


@cache
def _made(step: str) -> steps.Step:
    return steps.make(step, "triton")


def measure(step: str, name: str) -> dict[str, Any]:
    """Time and loss of a step with a change."""
    # Results of an earlier search are not what is shipped.
    os.environ["UNITSFACE_AUTOTUNE"] = "0"
    one = _made(step)
    try:
        with selected(change_of(step, name)):
            loss = one.run()
            times = timing.seconds(one.run, at_least=SAMPLES_S)
    except Exception as error:  # it may need more than the device has
        return pool.refusal(error, torch.cuda.synchronize)
    return {
        "median_s": statistics.median(times),
        "spread_s": [min(times), max(times)],
        "loss": float(loss.detach()),  # type: ignore[attr-defined]
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.alternatives")
    parser.add_argument("steps", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    major, minor = torch.cuda.get_device_capability()
    report: dict[str, dict[str, Any]] = {}

    def add(task: pool.Task, result: dict[str, Any]) -> None:
        step, name = task
        rows = report.setdefault(step, {})
        # The shipped launch comes again at the end: the difference is noise.
        name = f"{name}, again" if name in rows else name
        first = next(iter(rows.values()), result)
        if "median_s" in result and "median_s" in first:
            result["speedup"] = first["median_s"] / result["median_s"]
            result["wrong"] = not abs(result["loss"] / first["loss"] - 1.0) < SAME_LOSS
        rows[name] = result
        print(step, name, result, flush=True)
        if given.out is not None:
            write_json(given.out, report)

    tasks = [
        (step, name) for step in given.steps for name in (*names(step, 10 * major + minor), SHIPPED)
    ]
    pool.run(measure, tasks, jobs=1, limit=LIMIT_S, report=add)
    # Alternatives may fail; the shipped launches may not.
    shipped = [rows.get(SHIPPED, {}) for rows in report.values()]
    return 1 if any("median_s" not in row for row in shipped) else 0


if __name__ == "__main__":
    sys.exit(main())
