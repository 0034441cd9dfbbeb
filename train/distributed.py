"""The process group that ``torchrun`` describes, or a group of one without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.errors import LostProcessError, UserError

# Parts of the errors of gloo and NCCL when another process has gone or takes too long.
_LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "socket closed",
    "timed out",
    "timeout",
    "connection refused",
    "closed connection",
    "remote process",
)

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launchers that start several processes without these variables: number of processes, own number.
_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}

T = TypeVar("T")


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


@dataclass(frozen=True)
class DistributedEnv:
    """This process among those of a run, and what they exchange."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group, None for one process."""
        return dist.group.WORLD if self.size > 1 else None

    def print(self, *text: str, file: TextIO | None = None) -> None:
        """Prints in the first process only."""
        if self.is_main:
            print(*text, file=file, flush=True)

    def check_same(self, what: str, value: object) -> None:
        """An error on all processes unless the small ``value`` is the same on all of them."""
        found = self.gather_objects(value)
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        if others:
            raise UserError(
                f"{what} is another on process {', '.join(map(str, others))} than on process 0"
            )

    def mean(self, values: Tensor) -> Tensor:
        """Average over processes; the same on all of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather_objects(self, value: T) -> list[T]:
        """Every process's value, in order."""
        found: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(found, value)
        return found

    def share_buffers(self, module: nn.Module) -> None:
        """The first process's statistics, which are those of a checkpoint, on all of them."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def from_main(self, make: Callable[[], T]) -> T:
        """``make()`` of process 0, given to every process; so is its :class:`UserError`."""
        if self.size == 1:
            return make()
        box: list[object] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise UserError(str(box[1]))
        return box[0]  # type: ignore[return-value]


class Vote:
    """The largest number that any process gives, so that all of them act on it at the same step.

    With several processes the result is that of the call before: it has arrived by then, and
    neither a process nor its device waits for another. The numbers travel in a group of their own,
    between processors.
    """

    def __init__(self, world: DistributedEnv, timeout_s: float) -> None:
        self._group = self._work = self._sent = None
        if world.size > 1:
            timeout = timedelta(seconds=timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def __call__(self, number: int) -> int:
        if self._group is None:
            return number
        known = self.finish()
        self._sent = torch.tensor([number])
        self._work = dist.all_reduce(self._sent, dist.ReduceOp.MAX, self._group, async_op=True)
        return known

    def finish(self) -> int:
        """The result of the last call."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._sent)


def choose_device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch sees no CUDA device")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} has no GPU: {torch.cuda.device_count()} here; start fewer "
            "processes or use train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def lost_process(error: Exception) -> bool:
    """True where a collective failed for want of another process."""
    if not isinstance(error, RuntimeError) or not dist.is_available():
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _LOST)


def _not_joined(error: RuntimeError) -> UserError:
    """Why a process group did not come about."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(f"{address} is in use by another program; choose another MASTER_PORT")
    return LostProcessError(
        f"cannot join the other processes at {address} (MASTER_ADDR, MASTER_PORT): {text[:200]}"
    )


@contextmanager
def open_world(device: str, timeout_s: float = 1800.0) -> Iterator[DistributedEnv]:
    """Join the group of the RANK, WORLD_SIZE and LOCAL_RANK variables: gloo, with NCCL for GPUs.

    Raises:
        LostProcessError: within the time limit, if another process is gone.
    """
    rank, size, local_rank = place()
    chosen = choose_device(device, local_rank)
    if size > 1 and chosen.type == "cuda" and "LOCAL_RANK" not in os.environ:
        raise UserError("LOCAL_RANK is not set: it says which of the GPUs is this process's")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    started = size > 1 and not dist.is_initialized()
    joined = not started
    try:
        if started:
            # Numbers of the host travel between hosts: with NCCL alone they wait for the device.
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        joined = True
        yield DistributedEnv(rank, size, chosen)
    except RuntimeError as error:
        if size > 1 and lost_process(error):
            if not joined:
                raise _not_joined(error) from error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
            raise LostProcessError(
                f"lost another process of the run ({reason}); continue with --resume"
            ) from error
        raise
    # Not after an error: it may wait for processes that are gone, and this one is about to end.
    if started:
        dist.destroy_process_group()
