"""``python -m bench.gpu_model.worker ARCHITECTURE TASK ...``: kernels and steps, as JSON lines.

With ``--recorded`` kernels of ``compiled.jsonl`` are not compiled again.

A process compiles for one architecture with one Triton. A task is the name of a step, whose
kernels are compiled; ``model:STEP``, whose time is predicted as well; ``variants``, of a loss of
each driver; ``variants:DTYPE``, those of one dtype; or ``variants:every``, of every loss.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import record
from .chips import CHIPS
from .compile import Compiled, Compiler
from .predict import Group, Prediction, predict
from .tritons import Triton

ROOT = Path(__file__).resolve().parents[2]
MODEL, RECORDED = "model:", "--recorded"
VARIANTS, EVERY = "variants", "every"


@dataclass
class Results:
    """Kernels of all workers, and (Triton, architecture, prediction) of each modeled step."""

    kernels: list[Compiled] = field(default_factory=list)
    steps: list[tuple[str, int, Prediction]] = field(default_factory=list)


def run(tasks: Sequence[str], tritons: Sequence[Triton], architectures: Sequence[int]) -> Results:
    """Runs tasks in worker processes, one per architecture and Triton.

    Raises:
        RuntimeError: with the end of the error output of a worker that failed.
    """
    return run_each([(tasks, triton, one) for triton in tritons for one in architectures])


def run_each(works: Sequence[tuple[Sequence[str], Triton, int]], *options: str) -> Results:
    """Each tasks with a Triton for an architecture, in worker processes; errors as of `run`.

    Args:
        options: of the workers.
    """
    results = Results()
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, triton, architecture), rows in zip(
            works, pool.map(lambda work: _rows(*work, cache, options), works), strict=True
        ):
            for row in rows:
                if "groups" in row:
                    row["groups"] = {name: Group(**group) for name, group in row["groups"].items()}
                    results.steps.append((triton.version, architecture, Prediction(**row)))
                else:
                    results.kernels.append(Compiled.load(row))
    return results


def _rows(
    tasks: Sequence[str], triton: Triton, architecture: int, cache: str, options: Sequence[str]
) -> list[dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, "-m", __name__, *options, str(architecture), *tasks],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=triton.environment | {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"},
    )
    if process.returncode:
        raise RuntimeError(f"sm_{architecture}, Triton {triton.version}: {process.stderr[-4000:]}")
    lines = process.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def work(
    architecture: int, tasks: Sequence[str], known: dict[str, Compiled]
) -> Iterator[Compiled | Prediction]:
    from . import steps, variants
    from .host import host_seconds

    chip, compiler = CHIPS[architecture], Compiler(architecture, known)
    for task in tasks:
        name = task.removeprefix(MODEL)
        if task.startswith(VARIANTS):
            _, *given = task.split(":")
            names = [name for name in given if name != EVERY] or variants.dtypes(architecture)
            tape = variants.record(chip.device, names, every=EVERY in given)
        else:
            tape = steps.record(steps.STEPS[name], chip.device)
        before = len(compiler.found)
        for launch in tape.of("triton"):
            compiler(launch)
        yield from list(compiler.found.values())[before:]
        if task.startswith(MODEL):
            prediction = predict(tape, name, steps.STEPS[name].flops, chip, compiler)
            prediction.host_seconds = host_seconds(steps.STEPS[name], chip.device, tape)
            yield prediction


def main(architecture: str, *tasks: str) -> None:
    known: dict[str, Compiled] = {}
    if architecture == RECORDED:
        architecture, *tasks = tasks
        known = {k: kernel for k, kernel in record.load().items() if not record.is_checked(k)}
    for result in work(int(architecture), tasks, known):
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
