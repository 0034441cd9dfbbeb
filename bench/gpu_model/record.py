"""Kernels that have been compiled before: ``compiled.jsonl``, one per line.

The same Triton IR and options give the same code with the same Triton, and Triton's front end takes
a fiftieth of the time of a compilation. ``python -m bench.gpu_model.scopes`` writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from .compile import Compiled

PATH = Path(__file__).with_name("compiled.jsonl")
#: One kernel of so many is compiled all the same, as a check of the record.
CHECKED = 64


def is_checked(key: str) -> bool:
    return int(key, 16) % CHECKED == 0


def load() -> dict[str, Compiled]:
    if not PATH.exists():
        return {}
    kernels = map(Compiled.load, map(json.loads, PATH.read_text().splitlines()))
    return {kernel.key_of_ir: kernel for kernel in kernels}


def row(kernel: Compiled) -> Compiled:
    """A kernel without the call that launches it, of which there may be many."""
    return replace(kernel, label="", variant="")


def save(kernels: Iterable[Compiled]) -> None:
    found = {kernel.key_of_ir: row(kernel) for kernel in kernels}
    rows = sorted(found.values(), key=lambda k: (k.triton, k.architecture, k.kernel, k.key_of_ir))
    lines = (json.dumps(asdict(one), separators=(",", ":")) + "\n" for one in rows)
    PATH.write_text("".join(lines))
