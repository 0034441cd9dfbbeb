"""``python -m bench.contention``: time beside another process that keeps every core busy.

A neighbor of low priority multiplies matrices on as many threads as there are cores, as data
loading and other jobs do; between its turns it is stopped. Rounds alternate between the idle and
the busy machine, and between implementations. What counts are the ratios of a round: eager code
loses time to the neighbor as well, and the fused loss must not lose more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from .harness import say
from .implementations import NAMES, PRIMARY, implementations
from .machine import machine
from .report import TIMES
from .report import seconds as duration
from .session import ImplementationFailedError, Remote, processes, start
from .workloads import WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parent / "results"
MODERATE = replace(WORKLOADS["class-100k"], name="class-50k", columns=50_000)
CHOICE = {**WORKLOADS, MODERATE.name: MODERATE}
DEFAULT = ("small", "pair-1k", "pair-8k", "memory-casia", "class-casia", MODERATE.name)
DEFAULT_IMPLEMENTATIONS = (PRIMARY["cpu"], "eager")
STATES = ("idle", "busy")
LEAST_ROUNDS = 3
SIDE = 1024
# For the scheduler to take the processes to their cores.
SETTLE_S = 0.02


def _multiply(pipe, threads: int, niceness: int) -> None:
    os.nice(niceness)
    torch.set_num_threads(threads)
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    torch.mm(a, b)
    pipe.send(None)
    while True:
        torch.mm(a, b)


class Neighbor:
    """A process that multiplies matrices while the machine is to be ``busy``."""

    def __init__(self, threads: int, niceness: int) -> None:
        context = processes()
        pipe, end = context.Pipe()
        self._process = context.Process(
            target=_multiply, args=(end, threads, niceness), daemon=True
        )
        self._process.start()
        end.close()
        try:
            pipe.recv()
        except EOFError:
            raise RuntimeError("the neighbor's process ended") from None
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    @contextlib.contextmanager
    def during(self, state: str) -> Iterator[None]:
        if state == "busy":
            self._signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _summary(times: dict[str, list[float]], primary: str) -> dict[str, dict[str, object]]:
    """Medians and spread and, by implementation, the median of the rounds' ratios to ours."""
    found: dict[str, dict[str, object]] = {}
    for name, own in times.items():
        row: dict[str, object] = {
            "samples": len(own),
            "median_s": statistics.median(own),
            "spread_s": [min(own), max(own)],
        }
        if name != primary:
            ratios = [t / ours for t, ours in zip(own, times[primary], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row |= {"speedup": middle, "speedup_quartiles": [low, high]}
        found[name] = row
    return found


def measure(
    workload: Workload, names: tuple[str, ...], neighbor: Neighbor, seconds: float
) -> dict[str, object]:
    """``seconds`` of rounds in each state, a few rounds at least."""
    sessions: dict[str, Remote] = {}
    times: dict[str, dict[str, list[float]]] = {s: {n: [] for n in names} for s in STATES}
    try:
        for name in names:
            session = sessions[name] = start(workload, name, "cpu")
            session.call("warm_up")
            session.call("first")
        begin, rounds = time.perf_counter(), 0
        while rounds < LEAST_ROUNDS or time.perf_counter() - begin < len(STATES) * seconds:
            rounds += 1
            for state in STATES:
                with neighbor.during(state):
                    for name, session in sessions.items():
                        times[state][name].append(session.call("step"))
    except ImplementationFailedError as error:
        return {"failed": str(error)}
    finally:
        for session in sessions.values():
            session.close()
    shape = {key: getattr(workload, key) for key in ("loss", "rows", "columns", "size")}
    return {**shape, **{state: _summary(times[state], names[0]) for state in STATES}}


def page(results: dict) -> str:
    """The results as Markdown."""
    neighbor = results["neighbor"]
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [
        "# Beside another process",
        "",
        f"`{results['command']}`; {facts}.",
        "",
        f"Forward and backward. Busy: beside a process of niceness {neighbor['niceness']} that",
        f"multiplies matrices on {neighbor['threads']} threads. Medians of interleaved rounds with",
        "their range; speedup: time of the implementation over that of the first row, the median",
        "of the rounds' own ratios, with quartiles.",
        "",
        "| workload | implementation | idle | speedup | busy | speedup |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["workloads"].items():
        if "failed" in result:
            lines.append(f"| {name} | failed: {result['failed']} | | | | |".replace("\n", " "))
            continue
        for implementation in result["idle"]:
            cells = [name, implementation]
            for state in STATES:
                row = result[state][implementation]
                low, high = map(duration, row["spread_s"])
                cells.append(f"{duration(row['median_s'])} ({low} - {high})")
                if "speedup" in row:
                    quartiles = "-".join(f"{q:.2f}" for q in row["speedup_quartiles"])
                    cells.append(f"{row['speedup']:.2f}{TIMES} ({quartiles})")
                else:
                    cells.append("")
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.contention", description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(CHOICE)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="per workload and state")
    parser.add_argument(
        "--implementations", nargs="+", help=f"beside native, of {', '.join(NAMES)}"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the neighbor")
    parser.add_argument("--niceness", type=int, default=10, help="of the neighbor")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args(argv)
    chosen = arguments.workloads or DEFAULT
    names = (PRIMARY["cpu"], *(arguments.implementations or DEFAULT_IMPLEMENTATIONS))
    names = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in CHOICE:
            parser.error(f"unknown workload {name}; known: {', '.join(CHOICE)}")
        missing = set(names) - implementations(CHOICE[name]).keys()
        if missing:
            parser.error(f"{name} has no implementation {', '.join(sorted(missing))}")
    if arguments.quick and arguments.out == RESULTS:
        parser.error("--quick needs --out: its measurements are meaningless")
    results: dict[str, object] = {
        "command": shlex.join(["python", "-m", "bench.contention", *argv]),
        "machine": machine(),
        "neighbor": {"threads": arguments.threads, "niceness": arguments.niceness},
        "workloads": {},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    neighbor = Neighbor(arguments.threads, arguments.niceness)
    try:
        for name in chosen:
            workload = CHOICE[name].shrunk(64, 256) if arguments.quick else CHOICE[name]
            say(f"contention: {name}")
            results["workloads"][name] = measure(workload, names, neighbor, arguments.seconds)
            text = json.dumps(results, indent=1) + "\n"
            (arguments.out / "contention.json").write_text(text)
            (arguments.out / "contention.md").write_text(page(results))
    finally:
        neighbor.close()
    print(page(results))


if __name__ == "__main__":
    main()
