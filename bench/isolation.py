"""Workloads in a second process, which is replaced when an implementation breaks the device.

A kernel's illegal access makes every later CUDA call of its process fail. On the CPU every
implementation has a process of its own anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from .session import DeviceLostError, processes
from .workloads import Workload

Work = Callable[[Workload, str, float, list[str], bool], dict]


class Runner:
    """Calls ``work``, again without implementations that broke the device, until it succeeds."""

    def __init__(self, work: Work, own_process: bool) -> None:
        self._work, self._own_process = work, own_process
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, workload: Workload, device: str, seconds: float, names: list[str], memory: bool
    ) -> dict:
        lost: dict[str, str] = {}
        while True:
            left = [name for name in names if name not in lost]
            try:
                result = self._call(workload, device, seconds, left, memory)
            except DeviceLostError as error:
                self.close()
                implementation, detail = error.args
                lost[implementation] = detail
                continue
            except Exception:
                # The process itself may be what is broken.
                self.close()
                raise
            for implementation, detail in lost.items():
                result.setdefault("implementations", {})[implementation] = {"failed": detail}
            return result

    def _call(self, *arguments) -> dict:
        if not self._own_process:
            return self._work(*arguments)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=processes())
        return self._pool.submit(self._work, *arguments).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
