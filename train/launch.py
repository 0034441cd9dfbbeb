"""Which process of a run this is, by the variables that ``torchrun`` sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from train.errors import UserError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launchers that start several processes without these variables: number of processes, own number.
_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}


class Place(NamedTuple):
    rank: int
    size: int
    local_rank: int


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip() or str(default)
    if not text.isdecimal() or not text.isascii() or len(text) > 9:
        raise UserError(f"{name}: expected a whole number, got '{environment[name]}'")
    return int(text)


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Rank, processes and rank on this machine; alone without any of the variables."""
    missing = [name for name in _NEEDED if not environment.get(name, "").strip()]
    rank, size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    several = size > 1 or rank > 0
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        for launcher, (count, number) in _LAUNCHERS.items():
            if _number(environment, count, 1) > 1 or _number(environment, number, 0) > 0:
                raise UserError(
                    f"{launcher} has started several processes ({count}, {number}), and "
                    f"{', '.join(missing)} are not set: start them by torchrun, or set RANK, "
                    f"LOCAL_RANK and WORLD_SIZE from {launcher}'s variables and MASTER_ADDR and "
                    "MASTER_PORT for all"
                )
    elif several and missing:
        given = ", ".join(f"{k}={environment[k]}" for k in _NEEDED if k not in missing)
        raise UserError(
            f"{', '.join(missing)} not set beside {given}: a run of several processes needs "
            f"{', '.join(_NEEDED)}, which torchrun sets"
        )
    if rank >= size:
        raise UserError(f"RANK={rank}: expected a number below WORLD_SIZE={size}")
    if several and not 0 < _number(environment, "MASTER_PORT", 0) < 2**16:
        port = environment["MASTER_PORT"]
        raise UserError(f"MASTER_PORT: expected a number between 1 and 65535, got '{port}'")
    return Place(rank, size, _number(environment, "LOCAL_RANK", 0))
