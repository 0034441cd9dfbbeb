"""``python -m bench.gpu_check``; ``bench/gpu_check.sh --help`` has the options."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from . import processes
from .files import trim
from .results import Outcome, Results
from .stages import BUDGET, USAGE, Command, Options, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = {0: "ok", processes.TIMED_OUT: "out of time"}
#: What a reader of the end of the output sees of the page.
SHOWN = 11_000

_HELP = """\
Checks and measures on a CUDA machine, without a network. Stages go on after failures,
each within a limit of its own, all within the budget; each is of use alone (--only).

  env       device, versions, tools; what is missing
  build     for the device's architecture only
  compile   every Triton kernel, in parallel processes: registers, stack, time; fills the cache
  cases     small cases of every kernel against the reference
  host      a step's wall time and its host time against the replay of its CUDA graph
  profile   GEMM, copy and L2 rates of the device; steps by phase against them; the shipped
            launches against alternatives; counters of the pair kernel, where ncu may read them
  peers     kernels of other packages on the same shapes
  tests     the test files that need a device
not by default, for a call of their own:
  bench     python -m bench and bench.heads, with all implementations
  sanitize  compute-sanitizer over the small cases

Needs a Python with Torch, Triton, NumPy, pytest, setuptools, cmake and ninja, and nvcc.
PYTHON names the interpreter (default: python3). The exit status is the sum of 1 (env), 2 (build,
compile), 4 (cases, tests), 8 (sanitize), 16 (host, profile) and 32 (peers, bench) for what has
failed; 64 for a wrong option. Wheels for a machine without a registry: hypothesis
sortedcontainers pytorch-metric-learning liger-kernel cut-cross-entropy inf-cl.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"gpu_check: {message}", file=sys.stderr)
        self.print_help(sys.stderr)
        sys.exit(USAGE)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Stage]]:
    parser = _Parser(
        prog="bench/gpu_check.sh",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workloads", nargs="*", help="of python -m bench, for peers and bench")
    parser.add_argument("--out", help="few small files (default: $OUT or bench/results/gpu)")
    parser.add_argument("--wheels", help="folder of wheels to install first")
    parser.add_argument("--only", help="stages, separated by commas")
    parser.add_argument("--tests", help="pytest -k expression instead of the device's tests")
    parser.add_argument("--seconds", type=float, default=2.0, help="per workload of a benchmark")
    parser.add_argument("--budget", type=int, help=f"seconds for everything (default: {BUDGET})")
    parser.add_argument("--dry-run", action="store_true", help="print what every stage would run")
    given = parser.parse_args(arguments)
    if given.wheels and not Path(given.wheels).is_dir():
        parser.error(f"no folder {given.wheels}")
    given.out = given.out or os.environ.get("OUT") or str(ROOT / "bench" / "results" / "gpu")
    python = os.environ.get("PYTHON", "python3")
    options = Options(
        # The stages run in the checkout; a name without a folder is looked up.
        python=os.path.abspath(python) if os.sep in python else python,
        out=os.path.abspath(given.out),
        wheels=os.path.abspath(given.wheels) if given.wheels else "",
        tests=given.tests,
        seconds=given.seconds,
        workloads=tuple(given.workloads),
    )
    known = {stage.name: stage for stage in stages(options)}
    if given.only is None:
        return given, [stage for stage in known.values() if stage.by_default]
    names = given.only.split(",")
    for name in names:
        if name not in known:
            parser.error(f"unknown stage {name}")
    chosen = [stage for stage in known.values() if stage.name in names]
    return given, chosen


def _environment() -> None:
    """Adds CUDA's toolkit to every program's PATH, on which it often is not."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [toolkit / "bin", toolkit / "compute-sanitizer"]
    folders += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    found = [str(folder) for folder in folders if folder.is_dir()]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *found])
    os.environ["PYTHONUNBUFFERED"] = "1"
    # The programs are modules of the checkout, which may not be installed.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])


class _Run:
    """One run of stages, within a budget."""

    def __init__(
        self,
        out: Path,
        results: Results,
        budget: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out, self._results, self._clock = out, results, clock
        self._deadline = clock() + budget
        self._folder = tempfile.TemporaryDirectory(prefix="gpu_check-")

    def stage(self, stage: Stage, last: bool) -> bool:
        """Whether everything in it succeeded; the last one gets all that is left."""
        outcome = Outcome(stage.name, stage.limit)
        self._results.stages.append(outcome)
        begin = self._clock()
        end = self._deadline if last else min(self._deadline, begin + stage.limit)
        for number, command in enumerate(stage.commands):
            # A command may use what those before it in the stage have left.
            after = sum(later.limit for later in stage.commands[number + 1 :])
            limit = max(end - self._clock() - after, min(command.limit, end - self._clock()))
            outcome.commands.append(self._command(command, limit))
            outcome.seconds = self._clock() - begin
        wrong = [one.verdict for one in outcome.commands if one.verdict != "ok"]
        outcome.verdict = wrong[0] if wrong else "ok"
        self._results.write()
        return not wrong

    def _command(self, command: Command, limit: float) -> Outcome:
        outcome = Outcome(command.name, limit)
        begin = self._clock()
        with (self._out / command.log).open("a") as log:
            if limit < 1:
                log.write(f"$ {shlex.join(command.argv)}\nnot run: the budget is spent\n")
                outcome.status, outcome.verdict = processes.TIMED_OUT, "out of time"
                return outcome
            report = Path(self._folder.name) / f"{command.name}.json"
            take = lambda: self._results.take(command.name, report)  # noqa: E731
            argv = [*command.argv, *(["--out", str(report)] if command.reports else [])]
            outcome.status = processes.run(
                argv, limit, log, watch=take if command.reports else lambda: None, clock=self._clock
            )
            take()
        outcome.seconds = self._clock() - begin
        outcome.verdict = VERDICTS.get(outcome.status, "FAILED")
        return outcome


def _dry_run(chosen: Sequence[Stage]) -> None:
    for stage in chosen:
        print(f"== {stage.name}, {stage.limit:.0f} s")
        for command in stage.commands:
            line = shlex.join(command.argv)
            print(f"  {command.limit:4.0f} s  {command.log:16} {line[:240]}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    given, chosen = _parse(arguments)
    if given.dry_run:
        _dry_run(chosen)
        return 0
    if given.budget is None:
        # Stages that do not run by default have limits beyond the budget of those that do.
        given.budget = BUDGET if given.only is None else round(sum(s.limit for s in chosen))
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    logs = {command.log for stage in chosen for command in stage.commands}
    # Logs of an earlier run, which would be appended to.
    for log in ("environment.txt", "build.log", "checks.log", "tests.log", "sanitize.log"):
        (out / log).unlink(missing_ok=True)
    _environment()
    os.chdir(ROOT)
    # The results are written as they come; the running program has to be ended.
    signal.signal(signal.SIGTERM, _stop)
    results = Results(out, shlex.join(["bench/gpu_check.sh", *arguments]), given.budget)
    run = _Run(out, results, given.budget)
    failed = 0
    for stage in chosen:
        print(f"== {stage.name}", flush=True)
        if not run.stage(stage, last=stage is chosen[-1]):
            failed |= stage.bit
        outcome = results.stages[-1]
        print(f"{stage.name:10} {outcome.verdict:12} {outcome.seconds:4.0f} s", flush=True)
    results.finished = True
    results.write()
    for log in logs:
        trim(out / log)
    print(f"== results in {out}")
    print(results.page.read_text()[-SHOWN:])
    return failed


if __name__ == "__main__":
    sys.exit(main())
