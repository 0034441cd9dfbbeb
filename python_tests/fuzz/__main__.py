"""Command line of the fuzzer."""

from __future__ import annotations

import argparse
import importlib
import random
import sys
from pathlib import Path

from . import runner

PREFIX = "target_"


def main() -> int:
    here = Path(__file__).parent
    known = sorted(path.stem.removeprefix(PREFIX) for path in here.glob(f"{PREFIX}*.py"))
    parser = argparse.ArgumentParser(
        prog="python -m python_tests.fuzz",
        description="Runs targets with one seed after the other. A run that fails, crashes, takes "
        f"over {runner.CALL_SECONDS} s of processor time or {runner.CALL_MEMORY >> 20} MiB is "
        "printed with the command that repeats it. Exit status 1 if there is any.",
    )
    parser.add_argument("target", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--seconds", type=float, help="in all, shared by the targets; default: 10")
    parser.add_argument("--runs", type=int, help="of each target, in place of --seconds")
    parser.add_argument("--seed", type=int, help="the first one; default: a random one")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; default: 1")
    arguments = parser.parse_args()
    for name in arguments.target:
        if name not in known:
            parser.error(f"unknown target {name!r}: known are {', '.join(known)}")
    chosen = arguments.target or known
    seconds = arguments.seconds
    if seconds is None and arguments.runs is None:
        seconds = 10.0
    seed = random.SystemRandom().randrange(10**12) if arguments.seed is None else arguments.seed
    failed = False
    for name in chosen:
        share = None if seconds is None else seconds / len(chosen)
        run_one = importlib.import_module(f".{PREFIX}{name}", __package__).run_one
        outcome = runner.run(run_one, seed, arguments.runs, share, arguments.jobs)
        for failure in outcome.failures:
            failed = True
            print(f"{name}: {failure.text}")
            if arguments.runs == 1 and failure.details:
                print(failure.details)
            print(f"  python -m python_tests.fuzz {name} --runs 1 --seed {failure.seed}")
        print(
            f"{name}: {outcome.runs} runs from seed {seed} in {outcome.seconds:.1f} s, "
            f"{len(outcome.failures)} failed",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
