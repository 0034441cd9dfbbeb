"""The model's results as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unitsface_kernels import __version__

from .budgets import cost
from .chips import CHIPS
from .compile import Compiled
from .predict import Prediction
from .tiles import tile_cost
from .worker import Results

LABEL = "predicted: counted from compiled kernels and recorded steps, not measured on a device"
INTRODUCTION = (
    "**Predicted.** Instructions, registers, bytes and launches are counted from what is compiled",
    "and recorded; cycles, times and fractions follow from the assumptions at the end. Nothing",
    "was measured on a device. Host times are measured: the least processor time of a step whose",
    "launches do nothing, without the driver. [docs/gpu_model.md](../../docs/gpu_model.md) has the",
    "columns.",
)
PIPES = ("TENSOR", "FMA", "IMAD", "ALU", "MUFU", "SHFL", "SHARED", "LOAD", "STORE", "LOCAL", "SYNC")
OTHERS = "other"
TILE_COLUMNS = (
    "kernel, first step",
    "registers",
    "stack",
    "local",
    "shared KB",
    "programs per SM",
    "warnings",
    "instructions before / in / after",
    "issue",
    "ALU",
    "FMA",
    "MUFU",
    "SHFL",
    "tensor",
    "L2 KB (cycles)",
    "memory KB",
    "predicted cycles",
)
STEP_COLUMNS = (
    "step",
    "chip",
    "Triton",
    "launches",
    "host ms",
    "predicted ms",
    "roofline ms",
    "predicted fraction",
    "bound",
    "largest parts, predicted ms",
)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def dump(results: Results, command: str) -> str:
    """JSON of everything."""
    kernels = [_kernel_row(k, results.steps) for k in results.kernels]
    content = {
        "label": LABEL,
        "command": command,
        "unitsface_kernels": __version__,
        "assumptions": {CHIPS[a].device.name: CHIPS[a].assumptions() for a in _chips(results)},
        "kernels": kernels,
        "steps": [_step_row(*step) for step in results.steps],
    }
    return json.dumps(content, indent=1) + "\n"


def _chips(results: Results) -> list[int]:
    return sorted({kernel.architecture for kernel in results.kernels})


def _kernel_row(kernel: Compiled, steps: Iterable[tuple[str, int, Prediction]]) -> dict[str, Any]:
    budget = cost(kernel)
    row = asdict(kernel) | {
        "programs_per_sm": budget.programs,
        "issue_cycles": kernel.issue_cycles,
    }
    del row["key_of_ir"]
    if kernel.gemm is not None:
        predicted = asdict(tile_cost(kernel, CHIPS[kernel.architecture]))
        row["tile"] = predicted | {"hbm_bytes": _memory_bytes(kernel, steps)}
    return row


def _memory_bytes(kernel: Compiled, steps: Iterable[tuple[str, int, Prediction]]) -> float | None:
    """Bytes from memory per program, in the first modeled step that launches the kernel."""
    for triton, architecture, step in steps:
        group = step.groups.get(kernel.kernel)
        same = (triton, architecture) == (kernel.triton, kernel.architecture)
        if same and group is not None and group.programs:
            return group.hbm_bytes / group.programs
    return None


def _step_row(triton: str, architecture: int, step: Prediction) -> dict[str, Any]:
    return {
        "triton": triton,
        "architecture": architecture,
        "chip": CHIPS[architecture].device.name,
        **asdict(step),
        "predicted_seconds": step.seconds,
        "predicted_roofline_fraction": step.roofline_fraction,
    }


def markdown(results: Results, command: str) -> str:
    parts = ["# GPU kernels and steps, predicted", f"`{command}`", "\n".join(INTRODUCTION)]
    if results.steps:
        parts += ["## Steps", table(STEP_COLUMNS, map(_step_cells, results.steps))]
    for architecture in _chips(results):
        for version in sorted({kernel.triton for kernel in results.kernels}):
            own = [
                kernel
                for kernel in results.kernels
                if (kernel.triton, kernel.architecture) == (version, architecture)
            ]
            tiles = [kernel for kernel in own if kernel.gemm is not None]
            if not tiles:
                continue
            parts.append(f"## Tiles: sm_{architecture}, Triton {version}")
            parts.append(table(TILE_COLUMNS, (_tile_cells(k, results.steps) for k in tiles)))
            parts.append("Instructions of a warp by pipe, before, in and after the GEMM:")
            header = ("kernel", "part", *PIPES, OTHERS)
            parts.append(table(header, (row for k in own for row in _pipe_rows(k))))
    parts += ["## Assumptions", *_assumptions(_chips(results))]
    return "\n\n".join(parts) + "\n"


def _step_cells(entry: tuple[str, int, Prediction]) -> tuple[str, ...]:
    triton, architecture, step = entry
    largest = list(step.groups.items())[:4]
    host, bound = "-", "-"
    if step.host_seconds is not None:
        host = f"{1e3 * step.host_seconds:.1f}"
        bound = "host" if step.host_seconds > step.seconds else "device"
    return (
        step.step,
        CHIPS[architecture].device.name,
        triton,
        f"{step.launches}" + (f", {step.waits} waits" if step.waits else ""),
        host,
        f"{1e3 * step.seconds:.2f}",
        f"{1e3 * step.roofline_seconds:.2f}",
        f"{step.roofline_fraction:.0%}",
        bound,
        ", ".join(f"{name} {1e3 * group.seconds:.2f}" for name, group in largest),
    )


def _name(kernel: Compiled) -> str:
    """Name of a kernel without the arguments that are None."""
    words = [word for word in kernel.variant.split() if not word.startswith("-")]
    return f"`{kernel.kernel}` {' '.join(words)}"


def _tile_cells(kernel: Compiled, steps: Sequence[tuple[str, int, Prediction]]) -> tuple[str, ...]:
    tile = tile_cost(kernel, CHIPS[kernel.architecture])
    parts = (kernel.before, kernel.inside, kernel.after)
    memory = _memory_bytes(kernel, steps)
    return (
        f"{_name(kernel)}, {kernel.label}",
        str(kernel.registers),
        str(kernel.stack),
        str(kernel.local),
        f"{kernel.shared / 1024:.0f}",
        str(tile.programs),
        " ".join(kernel.warnings) or "-",
        " / ".join(str(sum(part.values())) for part in parts),
        f"{tile.issue:.0f}",
        *(f"{tile.pipes[pipe]:.0f}" for pipe in ("ALU", "FMA", "MUFU", "SHFL")),
        f"{tile.tensor:.0f}",
        f"{tile.l2_bytes / 1024:.0f} ({tile.l2:.0f})",
        "-" if memory is None else f"{memory / 1024:.0f}",
        f"{tile.cycles:.0f}",
    )


def _pipe_rows(kernel: Compiled) -> Iterator[tuple[str, ...]]:
    for part in ("before", "inside", "after"):
        pipes = getattr(kernel, part)
        if pipes:
            rest = sum(count for pipe, count in pipes.items() if pipe not in PIPES)
            counts = [str(pipes.get(pipe, 0)) for pipe in PIPES]
            where = {"inside": "in"}.get(part, part) if kernel.gemm else "all"
            yield (_name(kernel), where, *counts, str(rest))


def _assumptions(architectures: Sequence[int]) -> Iterator[str]:
    chips = [CHIPS[architecture] for architecture in architectures]
    rows = []
    for name, first in chips[0].assumptions().items():
        found = [chip.assumptions()[name] for chip in chips]
        sources = dict.fromkeys(entry["source"] for entry in found)
        rows.append((name, *(_value(e["value"]) for e in found), first["unit"], "; ".join(sources)))
    yield table(("name", *(chip.device.name for chip in chips), "meaning", "source"), rows)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def write(results: Results, command: str, path: Path) -> str:
    """Writes JSON, and beside it Markdown, which it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(results, command))
    text = markdown(results, command)
    path.with_suffix(".md").write_text(text)
    return text
