"""``python -m bench``: speedup, throughput, peak memory and accuracy, to JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from . import harness, isolation, report
from .implementations import NAMES, implementations
from .machine import machine
from .workloads import WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_ROWS, QUICK_COLUMNS = 128, 1024


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=6.0, help="per workload, at least")
    # The second is deprecated.
    names = ("--implementations", "--contestants")
    parser.add_argument(*names, nargs="+", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--update", action="store_true", help="keep the file's other workloads")
    parser.add_argument("--out", type=Path, help="path without suffix; bench/results/<device>")
    return parser


def _names(arguments: argparse.Namespace, workload: Workload) -> list[str]:
    every = list(implementations(workload, arguments.device))
    if arguments.implementations is None:
        return every
    primary = harness.PRIMARY[arguments.device]
    return [name for name in every if name in {primary, *arguments.implementations}]


def _results(path: Path, command: str, device: str, update: bool) -> dict[str, object]:
    """New results or, with ``update``, those of an earlier run on this machine."""
    facts = machine(device)
    if update and path.exists():
        earlier = json.loads(path.read_text())
        if earlier["machine"] != facts:
            raise SystemExit(f"--update: {path} is from another machine or other versions")
        return earlier
    return {"command": command, "device": device, "machine": facts, "workloads": {}}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    if "--contestants" in argv:
        harness.say("warning: --contestants is deprecated, use --implementations")
    unknown = [name for name in arguments.workloads if name not in WORKLOADS]
    if unknown:
        parser().error(f"unknown workload {', '.join(unknown)}; known: {', '.join(WORKLOADS)}")
    unknown = set(arguments.implementations or ()) - set(NAMES)
    if unknown:
        parser().error(f"unknown implementation {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser().error("Torch finds no CUDA device")
    if arguments.quick and arguments.out is None:
        parser().error("--quick needs --out: its measurements are meaningless")
    base = arguments.out or RESULTS / arguments.device
    # Not with_suffix: a name may have dots.
    out, page = (base.with_name(base.name + suffix) for suffix in (".json", ".md"))
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "bench", *argv])
    results = _results(out, command, arguments.device, arguments.update)
    harness.say(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    runner = isolation.Runner(harness.run, own_process=arguments.device == "cuda")
    default = [name for name, w in WORKLOADS.items() if arguments.device in w.on]
    for name in arguments.workloads or default:
        workload = WORKLOADS[name]
        if arguments.quick:
            workload = workload.shrunk(QUICK_ROWS, QUICK_COLUMNS)
        try:
            result = runner.run(
                workload,
                arguments.device,
                arguments.seconds,
                _names(arguments, workload),
                not arguments.no_memory,
            )
        except Exception as error:  # the other workloads still run
            harness.say(f"{name} failed: {error}")
            result = {"failed": f"{type(error).__name__}: {error}"}
        results["workloads"][name] = {"command": command, **result}
        # After each workload, so that an interrupted run leaves its results.
        out.write_text(json.dumps(results, indent=1) + "\n")
        page.write_text(report.page(results))
    runner.close()
    print(report.page(results))


if __name__ == "__main__":
    main()
