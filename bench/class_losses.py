"""``python -m bench.class_losses``: what each class loss costs beside CosFace, on the same work.

Modules with their defaults, forward and backward (features and class weights), in interleaved
rounds in one process. Ratios are those of a round's own times.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from unitsface_kernels import CLASS_LOSSES

from .custom_policies import RESULTS, measure, summary
from .machine import machine

SIZE, FIRST = 512, "cosface"


def losses(names: list[str], classes: int) -> dict[str, Callable[..., Tensor]]:
    """A function of (features, class weights, labels) for every name, CosFace first."""
    found = {}
    for name in dict.fromkeys([FIRST, *names]):
        module = CLASS_LOSSES[name](SIZE, classes, backend="native")

        def loss(
            feats: Tensor, weight: Tensor, labels: Tensor, module: torch.nn.Module = module
        ) -> Tensor:
            module.weight = weight
            return module(feats, labels)

        found[name] = loss
    return found


def table(results: dict) -> str:
    lines = [
        "# Class losses beside CosFace",
        "",
        f"`{results['command']}`; {', '.join(f'{k} {v}' for k, v in results['machine'].items())}.",
        "",
        f"Forward and backward of {results['rows']} rows and {results['classes']} classes of "
        f"{SIZE} numbers; medians of",
        "interleaved rounds, in parentheses the quartiles. Ratio: time over that of CosFace.",
        "",
        "| loss | time | ratio |",
        "|---|---|---|",
    ]
    for name, figures in results["losses"].items():
        low, middle, high = (1e3 * t for t in figures["seconds"])
        ratio = "" if name == FIRST else "{1:.3f} ({0:.3f}-{2:.3f})".format(*figures["ratio"])
        lines.append(f"| {name} | {middle:.4g} ms ({low:.4g}-{high:.4g}) | {ratio} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # Those of one matrix of class weights and nothing else that is streamed.
    known = sorted(set(CLASS_LOSSES) - {"epl", "npt", "subcenter_arcface", "unpg", "vpl"})
    parser = argparse.ArgumentParser(prog="python -m bench.class_losses", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    parser.add_argument("--out", type=Path, default=RESULTS / "class_losses.json")
    arguments = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(arguments.rows, SIZE, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(arguments.classes, SIZE, generator=generator))
    labels = torch.randint(arguments.classes, (arguments.rows,), generator=generator)
    found = losses(arguments.only, arguments.classes)
    times = measure([feats, weight, labels], found, arguments.seconds)
    results = {
        "command": shlex.join(["python", "-m", "bench.class_losses", *argv]),
        "machine": machine(),
        "rows": arguments.rows,
        "classes": arguments.classes,
        "losses": summary(times),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
