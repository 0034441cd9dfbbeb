"""Tasks in worker processes that may fail in any way: raise, hang, or lose the device.

A worker that a task has broken is replaced, since after an illegal access every further call of
its process fails. ``concurrent.futures`` would give up all the tasks.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Task = tuple[Any, ...]
Result = dict[str, Any]
LONGEST_ERROR = 400
#: Workers are forked with what takes seconds to import.
PRELOADED = ["bench.gpu_check.steps"]


def describe(error: BaseException) -> str:
    """Type and first lines of an error."""
    return "".join(traceback.format_exception_only(error)).strip()[:LONGEST_ERROR]


def refusal(error: Exception, device_answers: Callable[[], object]) -> Result:
    """The result of a task whose error the process survives; else the error is raised again."""
    try:
        device_answers()
    except Exception:
        raise error from None
    return {"refused": describe(error)}


def _serve(pipe: Connection, module: str, function: str) -> None:
    work = getattr(importlib.import_module(module), function)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            task = pipe.recv()
            try:
                pipe.send(work(*task))
            except Exception as error:
                # The device may be lost: this process ends, and another takes the next task.
                pipe.send({"error": describe(error)})
                return


class _Worker:
    """A process and the task it is at."""

    def __init__(self, context: Any, module: str, function: str) -> None:
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, module, function), daemon=True)
        self.process.start()
        end.close()
        self.task: Task = ()
        self.begun = 0.0

    def give(self, task: Task) -> None:
        self.task, self.begun = task, time.monotonic()
        # The result of a task whose worker has died is an error.
        with contextlib.suppress(OSError):
            self.pipe.send(task)

    def result(self) -> Result:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"error": f"its process ended with status {self.process.exitcode}"}

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(
    function: Callable[..., Result],
    tasks: Sequence[Task],
    jobs: int,
    limit: float,
    report: Callable[[Task, Result], object],
) -> None:
    """Calls ``function(*task)`` in worker processes.

    Args:
        function: of a module's top level.
        tasks: arguments, in the order in which they are begun.
        jobs: workers at once.
        limit: seconds of a task, with the start of its worker.
        report: called with each task and its result as it comes; ``{"error": ...}`` if it raised,
            took too long or ended its process.
    """
    module = function.__module__
    if module == "__main__":
        # The name under which a worker can import it.
        module = importlib.import_module("__main__").__spec__.name
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, idle, busy = deque(tasks), [], []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker = idle.pop() if idle else _Worker(context, module, function.__name__)
                worker.give(waiting.popleft())
                busy.append(worker)
            first = min(worker.begun for worker in busy) + limit
            ready = wait([w.pipe for w in busy], timeout=max(first - time.monotonic(), 0.0))
            for worker in list(busy):
                if worker.pipe in ready:
                    result = worker.result()
                elif time.monotonic() - worker.begun >= limit:
                    result = {"error": f"took longer than {limit:g} s"}
                else:
                    continue
                busy.remove(worker)
                if "error" in result:
                    worker.end()
                else:
                    idle.append(worker)
                report(worker.task, result)
    finally:
        for worker in (*busy, *idle):
            worker.end()
