"""Runs of a target in forked processes, with limits of time and memory for each."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing.connection import Connection, wait

#: Seconds of processor time, and bytes beyond those of the process at its start, of one run.
CALL_SECONDS = 5
CALL_MEMORY = 1 << 30
#: A run that waits takes no processor time. Generous, as other processes may need the cores.
CALL_WALL_SECONDS = 60.0
#: Runs of a process: forking costs milliseconds.
BATCH = 200

RunOne = Callable[[int], "str | None"]


@dataclass
class Failure:
    seed: int
    text: str
    details: str = ""


@dataclass
class Outcome:
    """Runs of a target, and those that failed."""

    runs: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


@dataclass
class _Child:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    seeds: Iterator[int]
    seed: int | None = None
    started: float = field(default_factory=time.monotonic)


def _limit_memory() -> None:
    """Private writable memory: files that are mapped do not count, nor does what is reserved."""
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (data + CALL_MEMORY, hard))


def _limit_time() -> None:
    # The kernel ends the process with SIGXCPU.
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = math.ceil(time.process_time()) + CALL_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _work(run_one: RunOne, seeds: list[int], connection: Connection) -> None:
    """In the child: reports every seed, then its outcome."""
    faulthandler.enable(all_threads=False)
    if os.path.exists("/proc/self/status"):
        _limit_memory()
    for seed in seeds:
        connection.send((seed, None, ""))
        _limit_time()
        try:
            text, details = run_one(seed), ""
        except BaseException as error:
            details = traceback.format_exc()
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(last.filename)}:{last.lineno}"
            line = str(error).strip().split("\n", 1)[0]
            text = f"{type(error).__name__}: {line} ({place})"
        if text is not None:
            connection.send((seed, text, details))
    connection.send((None, None, ""))


def _death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    if -exit_code == signal.SIGXCPU:
        return f"over {CALL_SECONDS} s of processor time"
    return f"the process was ended by {signal.Signals(-exit_code).name}"


def _read(child: _Child, outcome: Outcome, over: bool) -> bool:
    """Takes what a child has sent; False: it is gone or has been ended."""
    try:
        while child.connection.poll():
            seed, text, details = child.connection.recv()
            if seed is None:
                child.process.join()
                return False
            if text is not None:
                outcome.failures.append(Failure(seed, text, details))
                continue
            outcome.runs += 1
            child.seed, child.started = seed, time.monotonic()
    except EOFError:
        child.process.join()
        if child.seed is not None:
            outcome.failures.append(Failure(child.seed, _death(child.process.exitcode)))
        return False
    waited = time.monotonic() - child.started
    if not over and waited < CALL_WALL_SECONDS:
        return True
    child.process.kill()
    child.process.join()
    if not over and child.seed is not None:
        outcome.failures.append(Failure(child.seed, f"no answer in {waited:.0f} s"))
    return False


def run(
    run_one: RunOne,
    first_seed: int,
    runs: int | None = None,
    seconds: float | None = None,
    jobs: int = 1,
    most_failures: int = 20,
) -> Outcome:
    """Runs seeds from ``first_seed`` on until one of the limits is reached.

    A seed that ends its process is a failure; those after it go on in another process.

    Args:
        run_one: of the target.
        runs: how many seeds; None: any number.
        seconds: after which no further run starts, and those that go on are abandoned.
        jobs: processes at a time.
        most_failures: after which the rest is left out.
    """
    start = time.monotonic()
    deadline = math.inf if seconds is None else start + seconds
    context = multiprocessing.get_context("fork")
    seeds = iter(range(first_seed, first_seed + runs) if runs is not None else count(first_seed))
    outcome = Outcome()
    children: list[_Child] = []
    remaining: list[list[int]] = []

    def launch() -> bool:
        batch = remaining.pop() if remaining else list(islice(seeds, BATCH))
        if not batch:
            return False
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(run_one, batch, sender), daemon=True)
        process.start()
        sender.close()
        children.append(_Child(process, receiver, iter(batch)))
        return True

    try:
        while True:
            over = time.monotonic() >= deadline or len(outcome.failures) >= most_failures
            while not over and len(children) < jobs and launch():
                pass
            if not children:
                break
            left = min(1.0, max(0.0, deadline - time.monotonic()))
            wait([child.connection for child in children], timeout=left)
            for child in list(children):
                over = time.monotonic() >= deadline or len(outcome.failures) >= most_failures
                if _read(child, outcome, over):
                    continue
                children.remove(child)
                # What comes after the seed that ended the process.
                rest = list(child.seeds)
                if child.process.exitcode and child.seed is not None:
                    rest = [seed for seed in rest if seed > child.seed]
                    if rest:
                        remaining.append(rest)
                child.connection.close()
    finally:
        for child in children:
            child.process.kill()
    outcome.seconds = time.monotonic() - start
    return outcome
