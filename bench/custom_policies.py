"""``python -m bench.custom_policies``: a user's loss against the built-in one of the same formula.

Forward and backward in one process, in interleaved rounds: the built-in loss, the same formula as a
policy that is compiled at its first use, in eager operations on tiles (as where there is no
compiler), and on the whole matrix (the reference backend). Ratios are those of a round's own times.
The time of the first call, in a process of its own with an empty cache, is the compiler's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import unitsface_kernels as uk
from train.examples import policies as examples
from unitsface_kernels import policy
from unitsface_kernels.backends.native import custom, loader
from unitsface_kernels.losses.pair_softmax import PairSoftmax
from unitsface_kernels.losses.uss import USS

from .machine import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
#: The page whose table has the examples.
PAGE = ROOT / "docs" / "custom_losses.md"
BEGIN, END = "<!-- custom policies: begin -->", "<!-- custom policies: end -->"
BUILT_IN, CUSTOM, TILES, EAGER = "built-in", "custom", "eager tiles", "eager"
LEAST_ROUNDS = 5
#: A custom loss may take this much longer than the built-in one.
TARGET = 1.05


class CosFace(policy.Class):
    """The formula of :func:`unitsface_kernels.fused_margin_softmax_loss` with its defaults."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.4

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


class UCE(policy.Class):
    """The formula of :func:`unitsface_kernels.fused_uce_loss`."""

    combine = "softplus"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.4
    b: policy.Threshold

    def positive(self, c):
        return self.scale * (c - self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b


@dataclass(frozen=True)
class Workload:
    """``rows`` samples, in one batch or against ``classes`` weights, of 512 numbers.

    ``margin``: of a policy with a learned one per class.
    """

    name: str
    policy: policy.Policy
    built_in: Callable[..., Tensor] | None
    rows: int
    classes: int = 0
    threshold: float | None = None
    margin: float | None = None
    size: int = 512

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(self.rows, self.size, generator=generator, requires_grad=True)
        if not self.classes:
            found = [feats, torch.randint(self.rows // 4, (self.rows,), generator=generator)]
        else:
            weight = torch.randn(self.classes, self.size, generator=generator, requires_grad=True)
            labels = torch.randint(self.classes, (self.rows,), generator=generator)
            found = [feats, weight, labels]
        if self.threshold is not None:
            found.append(torch.tensor(self.threshold, requires_grad=True))
        if self.margin is not None:
            found.append(torch.full((self.classes,), self.margin, requires_grad=True))
        return found

    def custom(self, backend: str, *inputs: Tensor) -> Tensor:
        count = 3 if self.classes else 2
        name = "b" if self.threshold is not None else "margin"
        given = dict(zip([name], inputs[count:], strict=False))
        loss = uk.fused_class_loss if self.classes else uk.fused_pair_loss
        return loss(self.policy, *inputs[:count], backend=backend, **given)

    def implementations(self) -> dict[str, Callable[..., Tensor]]:
        found = {
            CUSTOM: lambda *inputs: self.custom("native", *inputs),
            TILES: lambda *inputs: self.custom("native", *inputs),
            EAGER: lambda *inputs: self.custom("reference", *inputs),
        }
        built_in = self.built_in
        if built_in is not None:
            found = {BUILT_IN: lambda *inputs: built_in(*inputs, backend="native"), **found}
        return found


WORKLOADS = (
    Workload("uss-1k", USS(), uk.fused_uss_loss, 1024, threshold=20.0),
    Workload("uss-4k", USS(), uk.fused_uss_loss, 4096, threshold=20.0),
    Workload("pair-softmax-1k", PairSoftmax(), uk.fused_pair_softmax_loss, 1024),
    Workload("cosface-10k", CosFace(), uk.fused_margin_softmax_loss, 256, 10_000),
    Workload("uce-10k", UCE(), uk.fused_uce_loss, 256, 10_000, threshold=20.0),
    Workload("contrastive-1k", examples.Contrastive(), None, 1024),
    Workload("verification-1k", examples.Verification(), None, 1024, threshold=10.0),
    Workload("class-margin-10k", examples.ClassMargin(), None, 256, 10_000, margin=0.4),
    Workload("circle-1k", examples.Circle(), uk.fused_circle_loss, 1024),
    Workload("adaptive-margin-10k", examples.AdaptiveMargin(), None, 256, 10_000),
)


@contextmanager
def compiler_of(name: str):
    """No compiler while the eager tiles run."""
    before = os.environ.get("UNITSFACE_POLICY_COMPILER")
    if name == TILES:
        os.environ["UNITSFACE_POLICY_COMPILER"] = "off"
    try:
        yield
    finally:
        os.environ.pop("UNITSFACE_POLICY_COMPILER", None)
        if before is not None:
            os.environ["UNITSFACE_POLICY_COMPILER"] = before


def _step(name: str, loss: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    for tensor in inputs:
        tensor.grad = None
    with compiler_of(name):
        start = time.perf_counter()
        loss(*inputs).backward()
        return time.perf_counter() - start


def measure(
    inputs: list[Tensor], losses: dict[str, Callable[..., Tensor]], seconds: float
) -> dict[str, list[float]]:
    """Seconds of every implementation in every round."""
    names = list(losses)
    for name, loss in losses.items():
        _step(name, loss, inputs)
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[names[0]]) < LEAST_ROUNDS:
        # Each round begins with another one: after a slow one the cache is cold.
        first = len(times[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_step(name, losses[name], inputs))
    return times


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(samples, n=4)
    return low, middle, high


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Quartiles of each implementation's seconds, and of its ratio to the first one's."""
    base = times[next(iter(times))]
    return {
        name: {
            "seconds": quartiles(samples),
            "ratio": quartiles([a / b for a, b in zip(samples, base, strict=True)]),
        }
        for name, samples in times.items()
    }


_FIRST = """
import time
from bench.custom_policies import WORKLOADS, CUSTOM, _step
work = next(w for w in WORKLOADS if w.name == {name!r})
inputs, loss = work.inputs(), work.implementations()[CUSTOM]
first = _step(CUSTOM, loss, inputs)
print(first - _step(CUSTOM, loss, inputs))
"""


def first_use(name: str) -> tuple[float, float]:
    """Seconds that the first call takes longer than the second: empty cache, and filled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "UNITSFACE_CACHE_DIR": cache}
        run = [sys.executable, "-c", _FIRST.format(name=name)]
        empty, filled = (
            float(subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(2)
        )
    return empty, filled


def table(results: dict) -> str:
    lines = [
        "# Users' losses",
        "",
        f"`{results['command']}`; {', '.join(f'{k} {v}' for k, v in results['machine'].items())}.",
        "",
        "Forward and backward; medians of interleaved rounds, in parentheses the quartiles. Ratio:",
        f"time over that of the first line. Target: custom at most {TARGET:g} of built-in.",
        "",
        "| workload | implementation | time | ratio |",
        "|---|---|---|---|",
    ]
    for name, found in results["workloads"].items():
        for place, (implementation, figures) in enumerate(found.items()):
            low, middle, high = (1e3 * t for t in figures["seconds"])
            ratio = "" if place == 0 else "{1:.3f} ({0:.3f}-{2:.3f})".format(*figures["ratio"])
            lines.append(
                f"| {'' if place else name} | {implementation} "
                f"| {middle:.3g} ms ({low:.3g}-{high:.3g}) | {ratio} |"
            )
    lines += ["", "| first call of a process | empty cache | filled cache |", "|---|---|---|"]
    for name, (empty, filled) in results["first_use_s"].items():
        lines.append(f"| {name} | {empty:.2f} s | {filled:.3f} s |")
    return "\n".join([*lines, ""])


def page_table(workloads: dict[str, dict[str, dict[str, tuple[float, float, float]]]]) -> str:
    """The examples of :data:`PAGE`: medians in milliseconds."""
    lines = [
        "| formula | size | compiled | eager tiles, no compiler | eager matrix | built-in |",
        "|---|---|---|---|---|---|",
    ]
    for workload in WORKLOADS:
        found = workloads.get(workload.name)
        if found is None or type(workload.policy).__module__ != examples.__name__:
            continue
        size = f"N = {workload.rows}"
        if workload.classes:
            size += ", C = " + f"{workload.classes:,}".replace(",", " ")
        times = (
            f"{1e3 * found[name]['seconds'][1]:.3g} ms" if name in found else "none"
            for name in (CUSTOM, TILES, EAGER, BUILT_IN)
        )
        cells = [type(workload.policy).__name__, size, *times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(page: str, results: dict) -> str:
    """The page with the table of these results."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    facts = results["machine"]
    note = (
        f"Medians of interleaved rounds, {facts['processor']}, {facts['threads']} threads "
        "([all results](../bench/results/custom_policies.md))."
    )
    table = page_table(results["workloads"])
    return f"{head}{BEGIN}\n{note}\n\n{table}\n{END}{tail}"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    known = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m bench.custom_policies", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="per workload")
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    parser.add_argument("--page", action="store_true", help="fill the table of the documentation")
    parser.add_argument("--out", type=Path, default=RESULTS / "custom_policies.json")
    arguments = parser.parse_args(argv)
    # What the eager tiles say.
    warnings.filterwarnings("ignore", message=".*UNITSFACE_POLICY_COMPILER=off")
    results: dict = {
        "command": shlex.join(["python", "-m", "bench.custom_policies", *argv]),
        "machine": machine(),
        "workloads": {},
        "first_use_s": {},
    }
    for workload in WORKLOADS:
        if workload.name in arguments.only:
            reason = custom.failure(policy.spec(workload.policy), loader.extension())
            if reason is not None:
                sys.exit(f"error: the formula of {workload.name} is not compiled: {reason}")
            times = measure(workload.inputs(), workload.implementations(), arguments.seconds)
            results["workloads"][workload.name] = summary(times)
            results["first_use_s"][workload.name] = first_use(workload.name)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    if arguments.page:
        PAGE.write_text(filled(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
