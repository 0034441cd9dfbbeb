"""One implementation on one workload, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable

import torch

from . import accuracy, inputs, machine
from .implementations import implementations
from .inputs import make_inputs
from .workloads import Workload, step

CUDA_WARM_UP = 3
BURST_S = 0.05


class ImplementationFailedError(RuntimeError):
    """An implementation raised, ran out of memory or was killed."""


class DeviceLostError(RuntimeError):
    """An implementation left the device unusable for this process: (its name, the error)."""


class Session:
    """Inputs and steps of an implementation, with their time and peak memory."""

    def __init__(self, workload: Workload, name: str, device: str) -> None:
        self.workload, self.device = workload, device
        self.implementation = implementations(workload, device)[name]
        self.inputs = None

    def check(self) -> dict[str, float]:
        """Errors against float64; also loads libraries and starts thread pools."""
        return accuracy.errors(self.workload, self.implementation, self.device)

    def warm_up(self) -> None:
        step(self.implementation, make_inputs(self.workload.shrunk(64, 64), self.device))

    def first(self) -> dict[str, float]:
        """The first full step, with its peak of memory; ``seconds`` are those of a later one."""
        self.inputs = make_inputs(self.workload, self.device)
        for _ in range(
            CUDA_WARM_UP if self.device == "cuda" else int(self.implementation.compiled)
        ):
            self.run()
        self._drop_gradients()
        gc.collect()
        before = machine.held_mb(self.device, reset=True)
        seconds = self.run()
        peak = machine.held_mb(self.device) - before
        grads = [t.grad for t in self.inputs.values() if t.grad is not None]
        gradients = sum(grad.nbytes for grad in grads) / 2**20
        del grads
        self._drop_gradients()
        return {
            "seconds": seconds,
            "loss": self.loss,
            "peak_mb": peak,
            "above_gradients_mb": peak - gradients,
        }

    def step(self) -> float:
        """Seconds of a step; of short steps the median, without the first (it wakes threads)."""
        times = [self.run()]
        while sum(times) < BURST_S:
            times.append(self.run())
        self._drop_gradients()
        return statistics.median(times[1:] or times)

    def _drop_gradients(self) -> None:
        """Between rounds only the inputs stay in memory."""
        for tensor in self.inputs.values():
            tensor.grad = None

    def run(self) -> float:
        """Seconds of one forward and backward pass."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            loss = step(self.implementation, self.inputs)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            loss = step(self.implementation, self.inputs)
            seconds = time.perf_counter() - start
        self.loss = float(loss.detach())
        return seconds

    def facts(self) -> dict[str, float]:
        """The threshold, and the probability that limits gradient filtering in a softmax."""
        found = {}
        if "b" in self.inputs:
            found["threshold"] = float(self.inputs["b"].detach())
        if self.workload.trained and self.workload.loss == "margin_softmax":
            found["negative_prob"] = inputs.negative_prob(self.workload, self.inputs)
        return found

    def close(self) -> None:
        self.inputs = None
        if self.implementation.compiled:
            # The compiler stops recompiling a function after a number of shapes.
            torch.compiler.reset()
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _serve(pipe, make, *arguments) -> None:
    """The other end of :class:`Remote`."""
    session = None
    while (method := pipe.recv()) != "close":
        try:
            if session is None:
                session = make(*arguments)
            pipe.send((getattr(session, method)(), None))
        except BaseException as error:  # reported to the parent
            detail = "".join(traceback.format_exception_only(error)).strip()
            pipe.send((None, detail.splitlines()[-1][:300]))


def processes() -> multiprocessing.context.BaseContext:
    """Context of processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.implementations"])
    return context


class Remote:
    """A session in a process of its own, which isolates its memory and its crashes.

    Args:
        make: function of a module's top level, called in the process when first needed.
    """

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = processes()
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, make, *arguments), daemon=True)
        self._process.start()
        end.close()

    def call(self, method: str):
        try:
            self._pipe.send(method)
            value, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ImplementationFailedError(
                f"its process ended with status {self._process.exitcode}"
            ) from None
        if error is not None:
            raise ImplementationFailedError(error)
        return value

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send("close")
        self._process.join()
        self._pipe.close()


class Local:
    """A session in this process: on CUDA, whose memory several processes would have to divide."""

    def __init__(self, workload: Workload, name: str, device: str) -> None:
        self._arguments = (workload, name, device)
        self._session: Session | None = None

    def call(self, method: str):
        try:
            if self._session is None:
                self._session = Session(*self._arguments)
            return getattr(self._session, method)()
        except Exception as error:
            detail = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            if not self._device_answers():
                raise DeviceLostError(self._arguments[1], detail) from None
            raise ImplementationFailedError(detail) from None

    def _device_answers(self) -> bool:
        """Whether the device responds; after an illegal access every further call fails."""
        device = self._arguments[2]
        try:
            return float(torch.ones((), device=device)) == 1.0
        except RuntimeError:
            return False

    def close(self) -> None:
        if self._session is not None:
            # On a lost device the cleanup fails, too.
            with contextlib.suppress(RuntimeError):
                self._session.close()
            self._session = None


def start(workload: Workload, name: str, device: str) -> Remote | Local:
    if device == "cuda":
        return Local(workload, name, device)
    return Remote(Session, workload, name, device)
