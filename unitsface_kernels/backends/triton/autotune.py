"""Launch configurations found by measurement: searched for on request, kept on disk.

The rule, by ``UNITSFACE_AUTOTUNE``: not set, what an earlier search has found is used and
nothing is searched for; ``1``, what is missing is searched for, by the first call that needs
gradients for its loss, shape and dtype; ``0``, neither. Without a result the configuration is
the shipped one (``configs.py``). Only CUDA tensors have results.

A search times the stage of the call that starts it (forward or backward, with its own tensors,
library GEMMs included), because where a gradient tile lies when the GEMMs read it is part
of what a configuration decides. It is never made while a CUDA graph is being captured, and a
configuration that has run in a process stays in use there: results read from disk are read once.
"""

from __future__ import annotations

import logging
import os
import statistics
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from ..._version import __version__
from ...cache import folder
from ...validate import choice
from ..streaming import Call
from . import launch, sum_tile
from .autotune_store import Store
from .configs import Config, TileConfig, WaveConfig
from .workspace import DEPTH_MULTIPLE, shipped_config, uses_tf32

Stage = Literal["forward", "backward"]
Run = Callable[[Config], object]
Timer = Callable[[Callable[[], object]], float]

#: The launch of :class:`Config` that each kind of kernel takes. Pairs share those of ``sum``.
SLOTS = {
    "sum": "sum",
    "sum_heavy": "sum_heavy",
    "statistics": "statistics",
    "gradient": "gradient",
    "pairs": "sum",
    "pairs_gradient": "sum_heavy",
}
#: Kinds whose gradients do not use statistics of another pass. The others keep their step along
#: D: both passes must see the same cosines to the last bit.
ONE_PASS = ("sum", "sum_heavy")
#: What a candidate must win by; less is within the spread of two measurements of one.
MARGIN = 0.02

_log = logging.getLogger("unitsface_kernels.autotune")


@dataclass(frozen=True)
class Choice:
    """Configuration of one kind of kernel: its launch, and the work of one launch."""

    tile: TileConfig
    wave: WaveConfig

    def applied(self, config: Config, kind: str) -> Config:
        return replace(config, wave=self.wave, **{SLOTS[kind]: self.tile})


def kind_of(call: Call, stage: Stage) -> str | None:
    """The kind of kernel that takes the time of a stage; None: there is no choice."""
    forward, spec = stage == "forward", call.spec
    if spec.reduction == "nearest":
        return None
    if spec.reduction == "sum":
        return "sum_heavy" if sum_tile.is_heavy(spec, weighted=not forward) else "sum"
    if spec.topology == "class":
        return "statistics" if forward else "gradient"
    return "pairs" if forward else "pairs_gradient"


def shape_class(call: Call) -> str:
    """Calls of the same class share a result: powers of two that rows, columns and D fit into."""

    def bucket(size: int) -> int:
        return 1 << max(size - 1, 0).bit_length()

    columns = "batch" if call.columns is None else bucket(call.num_columns)
    return f"{bucket(call.rows.shape[0])} x {columns} x {bucket(call.rows.shape[1])}"


def key_of(call: Call, kind: str) -> str:
    """A result's name within one device, Triton and package version.

    It has the loss, too: how many registers a policy takes decides what spills.
    """
    dtype = str(call.compute_dtype).removeprefix("torch.")
    if call.compute_dtype == torch.float32 and uses_tf32():
        dtype = "tf32"
    return f"{kind}, {call.spec.name}, {dtype}, {shape_class(call)}"


def tile_configs(base: TileConfig, kind: str) -> list[TileConfig]:
    """Candidates: the shipped launch first, then one change at a time."""
    subtiles, warps = base.epilogue_subtiles, base.num_warps
    free = replace(base, max_registers=None)
    found = [
        base,
        free,
        replace(base, num_stages=base.num_stages + 1),
        replace(base, num_stages=max(base.num_stages - 1, 2)),
        # Fewer loads per cosine, and one program per SM; subtiles as wide as before.
        replace(
            free, block_n=2 * base.block_n, epilogue_subtiles=2 * subtiles if subtiles > 1 else 1
        ),
        replace(free, block_m=2 * base.block_m),
        # More programs per SM, with as many cosines per thread, and no more of them in a subtile.
        replace(base, block_n=base.block_n // 2, num_warps=warps // 2),
        replace(base, block_m=base.block_m // 2, num_warps=warps // 2),
        replace(base, group_m=base.group_m // 2),
        replace(base, group_m=base.group_m * 2),
    ]
    if kind != "gradient":  # its kernel takes the block whole
        found += [
            replace(base, epilogue_subtiles=subtiles * 2),
            replace(free, epilogue_subtiles=max(subtiles // 2, 1)),
        ]
    if kind in ONE_PASS:
        found += [replace(base, block_k=base.block_k // 2), replace(base, block_k=base.block_k * 2)]
    return [tile for tile in dict.fromkeys(found) if tile == base or _sensible(tile)]


def _stored_tile(entry: dict[str, Any]) -> TileConfig:
    """The launch of an entry on disk, also of one with the names that its fields had before."""
    if "tile" in entry:
        return TileConfig(**entry["tile"])
    former = {"parts": "epilogue_subtiles", "group": "group_m"}
    return TileConfig(**{former.get(name, name): v for name, v in entry["product"].items()})


def _sensible(tile: TileConfig) -> bool:
    return (
        tile.epilogue_subtiles <= 8
        and tile.num_warps >= 4
        and min(tile.block_m, tile.block_n, tile.block_k) >= 16
        and DEPTH_MULTIPLE % tile.block_k == 0
        and tile.group_m >= 1
    )


def waves(base: WaveConfig) -> list[WaveConfig]:
    """Candidates: the shipped sizes first, then smaller and larger tiles."""
    size, rows = base.gradient_bytes, base.gradient_rows
    return [
        base,
        replace(base, gradient_bytes=size // 4, gradient_rows=rows // 2),
        replace(base, gradient_bytes=size // 2),
        replace(base, gradient_bytes=size * 2, columns=base.columns * 2),
        replace(base, gradient_bytes=size * 4, gradient_rows=rows * 2),
        replace(base, unit_bytes=base.unit_bytes // 2, rows=base.rows // 2),
        replace(base, unit_bytes=base.unit_bytes * 2, columns=base.columns * 2),
    ]


def cuda_seconds(run: Callable[[], object]) -> float:
    """Median of event times over at least 5 runs and about 50 ms."""
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.05 and len(times) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


class Tuner:
    """Results of one environment: those on disk, and those of searches in this process."""

    def __init__(self, store: Store, timer: Timer) -> None:
        self._store, self._timer = store, timer
        self._known: dict[tuple[str, Config], Config] = {}
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether it has no result of any search: most processes never make one."""
        return not self._known and not self._store.entries

    def config(self, key: str, kind: str, base: Config, run: Run, search: bool) -> Config:
        """The configuration for ``key``; with ``search``, one is looked for if there is none."""
        found = self._known.get((key, base))
        if found is not None:
            return found
        with self._lock:
            found = self._known.get((key, base)) or self._stored(key, kind, base)
            if found is None and search:
                found = self._search(key, kind, base, run)
            if found is None:
                return base
            self._known[key, base] = found
            return found

    def _stored(self, key: str, kind: str, base: Config) -> Config | None:
        entry = self._store.entries.get(key)
        if entry is None:
            return None
        try:
            chosen = Choice(_stored_tile(entry), WaveConfig(**entry["wave"]))
        except (TypeError, KeyError):
            chosen = None
        # A search can have found nothing else; whatever else is there was not written by one.
        shipped = getattr(base, SLOTS[kind])
        if (
            chosen is None
            or chosen.tile not in tile_configs(shipped, kind)
            or chosen.wave not in waves(base.wave)
        ):
            warnings.warn(
                f"{self._store.path}: the entry {key!r} is none of the candidates; ignored",
                RuntimeWarning,
                stacklevel=2,
            )
            del self._store.entries[key]
            return None
        return chosen.applied(base, kind)

    def _search(self, key: str, kind: str, base: Config, run: Run) -> Config:
        shipped = Choice(getattr(base, SLOTS[kind]), base.wave)
        # What fails here fails in the call itself, too.
        run(base)
        shipped_seconds = self._timer(lambda: run(base))
        launches = [replace(shipped, tile=p) for p in tile_configs(shipped.tile, kind)[1:]]
        best, seconds = self._fastest(shipped, shipped_seconds, launches, kind, base, run)
        sizes = [replace(best, wave=wave) for wave in waves(base.wave)[1:]]
        best, seconds = self._fastest(best, seconds, sizes, kind, base, run)
        _log.info("%s: %.3g s instead of %.3g s with %s", key, seconds, shipped_seconds, best)
        self._store.add(
            key,
            {
                "tile": vars(best.tile),
                "wave": vars(best.wave),
                "seconds": seconds,
                "shipped_seconds": shipped_seconds,
            },
        )
        return best.applied(base, kind)

    def _fastest(
        self,
        best: Choice,
        seconds: float,
        candidates: list[Choice],
        kind: str,
        base: Config,
        run: Run,
    ) -> tuple[Choice, float]:
        """The fastest candidate if it wins by ``MARGIN``, else ``best``; and its time."""
        limit = (1.0 - MARGIN) * seconds
        timed = [(best, seconds)]
        for candidate in candidates:
            measured = self._seconds(candidate.applied(base, kind), run)
            if measured is not None and measured < limit:
                timed.append((candidate, measured))
        return min(timed, key=lambda pair: pair[1])

    def _seconds(self, config: Config, run: Run) -> float | None:
        """Time of a run; None for a configuration that cannot run here or whose kernels spill."""
        try:
            with launch.observed() as kernels:
                run(config)
            # None of the interpreter's has the attribute.
            if any(getattr(kernel, "n_spills", 0) for kernel in kernels):
                return None
            return self._timer(lambda: run(config))
        except Exception as error:  # whatever Triton, its assembler or the driver raises
            _log.debug("skipped %s: %s: %s", config, type(error).__name__, error)
            return None


@cache
def _tuner(device: int) -> Tuner:
    import triton

    properties = torch.cuda.get_device_properties(device)
    environment = {
        "unitsface_kernels": __version__,
        "triton": triton.__version__,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
    }
    return Tuner(Store(folder(), environment), cuda_seconds)


def _mode() -> str:
    mode = os.environ.get("UNITSFACE_AUTOTUNE", "")
    choice("UNITSFACE_AUTOTUNE", mode, ("", "0", "1"))
    return mode


def config(call: Call, stage: Stage, run: Run, search: bool = True) -> Config:
    """The configuration of a stage of a call, by the rule above.

    Args:
        call: the call.
        stage: which of its passes.
        run: executes the stage with a configuration; what a search times.
        search: whether the stage is one to measure: not one that leaves gradients out.
    """
    base = shipped_config(call)
    kind, mode = kind_of(call, stage), _mode()
    if kind is None or mode == "0" or not call.rows.is_cuda or call.rows.numel() == 0:
        return base
    search = search and mode == "1" and call.need_any and call.num_columns > 0
    # Timing synchronizes, which would end the capture.
    search = search and not torch.cuda.is_current_stream_capturing()
    tuner = _tuner(call.rows.device.index)
    if tuner.is_empty and not search:
        return base
    return tuner.config(key_of(call, kind), kind, base, run, search)


__all__ = ["Choice", "Tuner", "config", "key_of", "kind_of", "shape_class", "tile_configs", "waves"]
