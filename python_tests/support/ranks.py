"""Functions run by the ranks of a process group: gloo, one process and one thread per rank."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# A server that has imported what ranks need forks them, in milliseconds instead of seconds. All
# tests of a process share the first one that starts: it has to know what any of them needs. It
# finds this in the folder that the tests are started from.
PRELOADED = [
    "torch",
    # Ten times a second of every rank: initializers of parameters import it.
    "torch._dynamo",
    "torch.distributed.run",
    "torch.nn.parallel",
    "unitsface_kernels",
    "sklearn.metrics",
    "sklearn.model_selection",
    "train.checkpoint",
    "train.config",
    "train.data.dataset",
    "train.data.duplicates",
    "train.trainer",
    "train.run_folder",
    "bench.implementations",
]
# What the other ranks have left to report, too, once one has failed: they may be waiting for it.
GRACE = 2.0


IDENTITIES = 5


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def identities(count: int, seed: int) -> Tensor:
    """Some of them ignored."""
    return torch.randint(-1, IDENTITIES, (count,), generator=torch.Generator().manual_seed(seed))


def own_rows(counts: Sequence[int], rank: int) -> slice:
    """Where the batch of a rank lies among those of all."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


class RankError(AssertionError):
    """Errors raised on ranks, with their tracebacks."""


def forkserver() -> Any:
    """The context of processes that are forked with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Code under test that starts one finds this one.
    ensure_running()
    return context


def _rank(
    connection: Connection,
    rank: int,
    world_size: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        answer = True, function(rank, *arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    # By value: shared memory would be gone with this process.
    data = io.BytesIO()
    torch.save(answer, data)
    connection.send_bytes(data.getvalue())
    # Peers may still be in a collective with this rank: wait for the parent before leaving.
    connection.poll(60)
    os._exit(0)


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0
) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of a group, the default one there.

    Args:
        world_size: ranks, each a process that starts here: let one call check much.
        function: of a module's top level.
        arguments: whatever can be pickled.
        timeout: seconds for everything.

    Returns:
        What the ranks returned, tensors and plain containers of them, in rank order.

    Raises:
        RankError: one raised, died or did not finish.
    """
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe() for _ in range(world_size)]
        workers = [
            context.Process(
                target=_rank,
                args=(end, rank, world_size, str(Path(folder) / "store"), function, arguments),
                daemon=True,
            )
            for rank, (_, end) in enumerate(ends)
        ]
        for worker in workers:
            worker.start()
        for _, end in ends:
            end.close()
        try:
            answers = _answers([end for end, _ in ends], timeout)
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join()
    failures = [
        f"rank {rank} of {world_size}: {answer[1] if answer else 'no answer'}"
        for rank, answer in enumerate(answers)
        if answer is None or not answer[0]
    ]
    if failures:
        raise RankError("\n".join(failures))
    return [answer[1] for answer in answers if answer is not None]


def _answers(connections: list[Connection], timeout: float) -> list[tuple[bool, Any] | None]:
    """Whether each rank succeeded, and its output; None: it died or did not finish."""
    answers: list[tuple[bool, Any] | None] = [None] * len(connections)
    open_ends = dict(zip(connections, range(len(connections)), strict=True))
    deadline = time.monotonic() + timeout
    while open_ends and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(open_ends), timeout=left):
            rank = open_ends.pop(connection)
            try:
                answers[rank] = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
            except EOFError:
                answers[rank] = (False, "died")
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE)
    return answers
