"""``python -m bench.heads``: a training step of one rank's class weights, optimizer included.

Forward, backward and SGD with momentum and weight decay on the classes that one rank holds.
Every implementation has a process of its own; its peak memory is relative to the process before it
has class weights. Rounds are interleaved. On CUDA the steps run under bfloat16 autocast, as
training does.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import unitsface_kernels as uk

from . import harness, machine, report
from .baselines.partial_fc import EagerPartialFC, bfloat16_gemms
from .session import ImplementationFailedError, Remote

RESULTS = Path(__file__).resolve().parent / "results"
SCALE, MARGIN = 64.0, 0.4
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
WARM_UP = 2
ROUNDS = 5
# Target for ours, beyond weights, momentum and gradient.
MOST_BEYOND_MB = 150


@dataclass(frozen=True)
class Head:
    """A step of one rank.

    Attributes:
        rows: N, of all ranks together.
        classes: of this rank.
        ranks: number of ranks over which classes and targets are spread.
    """

    name: str
    rows: int
    classes: int
    sample_rate: float = 1.0
    ranks: int = 1
    size: int = 512

    def needed_bytes(self, implementation: str) -> int:
        """Weights, momentum and, unless fused, the gradient of the sampled classes."""
        row = 4 * self.size
        gradient = 0 if implementation.startswith("fused") else int(self.sample_rate * self.classes)
        return row * (2 * self.classes + gradient)


HEADS = {
    head.name: head
    for head in (
        Head("head-400k", 512, 400_000),
        Head("head-400k-sampled", 512, 400_000, 0.1),
        # Ten million identities on 64 ranks, 64 images each.
        Head("shard-10m", 64 * 64, 10_000_000 // 64, ranks=64),
        Head("shard-10m-sampled", 64 * 64, 10_000_000 // 64, 0.1, ranks=64),
    )
}
IMPLEMENTATIONS = ("fused", "fused-step", "separate", "eager")


class HeadSession:
    """Weights and steps of one implementation."""

    def __init__(self, head: Head, name: str, device: str) -> None:
        self.head, self.name, self.device = head, name, device
        generator = torch.Generator().manual_seed(0)
        self.feats = torch.randn(head.rows, head.size, generator=generator).to(device)
        num_classes = head.classes * head.ranks
        labels = torch.randint(num_classes, (head.rows,), generator=generator).to(device)
        self.labels = labels % 32
        self._make(32)
        self._step()
        self._drop()
        self.before = machine.held_mb(device, reset=True)
        self.labels = labels
        if name == "eager":
            self.labels = torch.where(labels < head.classes, labels, -1)
        self._make(head.classes)

    def _make(self, classes: int) -> None:
        head = self.head
        options = {"scale": SCALE, "margin": MARGIN, "device": self.device}
        self.module = uk.PartialFC("cosface", head.size, classes, head.sample_rate, **options)
        if self.name == "eager":
            weight = self.module.weight.detach()
            self.module = EagerPartialFC(weight, head.sample_rate, SCALE, MARGIN)
            return
        # As one of several ranks: the targets of most rows are on other ranks.
        self.module.num_classes = classes * head.ranks
        self.module.shard = replace(self.module.shard, num_classes=classes * head.ranks)
        self.optimizer = uk.SampledSGD(self.module.parameters(), **SGD)
        if self.name.startswith("fused"):
            self.module.fuse(self.optimizer, "step" if self.name == "fused-step" else "backward")

    def _drop(self) -> None:
        self.module = self.optimizer = None
        gc.collect()

    def _step(self) -> float:
        feats = self.feats.detach().requires_grad_()
        if self.name == "eager":
            return self.module.step(feats, self.labels, **SGD)
        with bfloat16_gemms(self.device):
            loss = self.module(feats, self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def first(self) -> dict[str, float]:
        losses = [self._step() for _ in range(WARM_UP)]
        return {"loss": losses[0], "peak_mb": machine.held_mb(self.device) - self.before}

    def step(self) -> float:
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def rates(self) -> tuple[float, float]:
        return machine.gemm_rate(self.head.size, self.device), machine.copy_rate(self.device)


def measure(head: Head, names: list[str], rounds: int, device: str) -> dict[str, object]:
    rows: dict[str, dict[str, object]] = {}
    samples: dict[str, list[float]] = {}
    sessions, rates = {}, []
    for name in names:
        harness.say(f"{head.name}: {name}: first steps")
        session = Remote(HeadSession, head, name, device)
        try:
            rows[name] = session.call("first")
            sessions[name], samples[name] = session, []
            rows[name]["needed_mb"] = head.needed_bytes(name) / 2**20
        except ImplementationFailedError as error:
            rows[name] = {"failed": str(error)}
            session.close()
    for _ in range(rounds):
        for name, session in sessions.items():
            samples[name].append(session.call("step"))
        rates.append(next(iter(sessions.values())).call("rates"))
    for session in sessions.values():
        session.close()
    for name, times in samples.items():
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        rows[name] |= {"median_s": statistics.median(times), "quartiles_s": [low, high]}
        if "fused" in samples and name != "fused":
            ratios = [a / b for a, b in zip(times, samples["fused"], strict=True)]
            rows[name]["speedup"] = statistics.median(ratios)
    return {
        "rows": head.rows,
        "classes": head.classes,
        "ranks": head.ranks,
        "size": head.size,
        "sample_rate": head.sample_rate,
        "gemm_gflops": max(g for g, _ in rates) / 1e9,
        "copy_gb_s": max(c for _, c in rates) / 1e9,
        "implementations": rows,
    }


def page(results: dict) -> str:
    on_gpu = "gpu" in results["machine"]
    precision = "float32 under bfloat16 autocast" if on_gpu else "float32"
    lines = [
        "# A training step of one rank's class weights",
        "",
        f"CosFace, D = 512, {precision}: forward, backward and SGD with momentum and weight decay.",
        "`fused`: the optimizer's step within the backward pass; `fused-step`: within",
        "`optimizer.step()`, which computes the gradient again; `separate`: with a gradient;",
        "`eager`: one N x K matrix in place (`bench/baselines/partial_fc.py`). Peak memory is",
        "weights, momentum and, where nothing is fused, the gradient of the sampled classes, plus",
        f"the rest, whose target is at most {MOST_BEYOND_MB} MB for ours. Speedups are medians of",
        "interleaved rounds, times have quartiles. The loss is that of the first step; `eager`",
        "draws another sample.",
        "",
        "; ".join(f"`{c}`" for c in dict.fromkeys(h["command"] for h in results["heads"].values()))
        + ". "
        + ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        "",
        "| head | implementation | step | speedup of `fused` | peak memory | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["heads"].items():
        shape = (
            f"`{name}`: N = {result['rows']}, {result['classes']} classes"
            + (f" of one rank of {result['ranks']}" if result["ranks"] > 1 else "")
            + (f", rate {result['sample_rate']}" if result["sample_rate"] < 1 else "")
        )
        for implementation, row in result["implementations"].items():
            if "failed" in row:
                lines.append(f"| {shape} | {implementation} | failed: {row['failed']} | | | |")
                continue
            low, high = row["quartiles_s"]
            ratio = f"{row['speedup']:.2f} {report.TIMES}" if "speedup" in row else ""
            above = row["peak_mb"] - row["needed_mb"]
            lines.append(
                f"| {shape} | {implementation} | {report.seconds(row['median_s'])} "
                f"({low:.2f}-{high:.2f}) | {ratio} | "
                f"{row['needed_mb']:.0f} {above:+.0f} MB | {row['loss']:.4f} |"
            )
            shape = ""
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.heads", description=__doc__)
    parser.add_argument("heads", nargs="*", help=f"of {', '.join(HEADS)}")
    # The second is deprecated.
    names = ("--implementations", "--contestants")
    parser.add_argument(*names, nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--update", action="store_true", help="keep the file's other heads")
    parser.add_argument("--out", type=Path, help="without suffix; bench/results/heads[-cuda]")
    arguments = parser.parse_args(argv)
    if "--contestants" in argv:
        harness.say("warning: --contestants is deprecated, use --implementations")
    if unknown := [name for name in arguments.heads if name not in HEADS]:
        parser.error(f"unknown head {', '.join(unknown)}; known: {', '.join(HEADS)}")
    command = shlex.join(["python", "-m", "bench.heads", *argv])
    device = arguments.device
    out = arguments.out or RESULTS / ("heads" if device == "cpu" else f"heads-{device}")
    path = out.with_name(out.name + ".json")
    results: dict = {"machine": machine.machine(device), "heads": {}}
    if arguments.update and path.exists():
        stored = json.loads(path.read_text())
        if stored["machine"] != results["machine"]:
            parser.error(f"--update: {path} is from another machine or other versions")
        results = stored
    for name in arguments.heads or HEADS:
        head = HEADS[name]
        if arguments.quick:
            head = Head(name, 64, 2000, head.sample_rate, head.ranks, 32)
        found = measure(head, arguments.implementations, arguments.rounds, device)
        results["heads"][name] = {"command": command, **found}
        path.write_text(json.dumps(results, indent=1) + "\n")
        out.with_name(out.name + ".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
