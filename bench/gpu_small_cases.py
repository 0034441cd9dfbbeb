"""``python -m bench.gpu_small_cases``: every loss, backend and topology once, on small odd sizes.

Short enough to run under compute-sanitizer, which makes kernels up to a hundred times slower: a
few blocks of every kernel, none of them full. Losses and gradients are compared with the
reference backend in float64, heads and optimizers with the CPU and with Torch. The test suite
checks accuracy; the limits here only separate a wrong index or a race from rounding.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unitsface_kernels
from unitsface_kernels import metrics

from .gpu_check import pool
from .gpu_check.files import write_json

ROWS, COLUMNS, SIZE, IDENTITIES = 139, 203, 72, 17
SCALE = 16.0
#: Limits of the loss's error and of a gradient's relative error. In half precision a cosine is good
#: to about 1e-3 (1e-4 in float16), the scale multiplies that, and Triton's interpreter truncates.
LIMITS = {
    torch.float32: (1e-5, 1e-4),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (5e-2, 8e-2),
}
FUNCTIONS = {
    name: getattr(unitsface_kernels, name)
    for name in unitsface_kernels.__all__
    # Those of users' policies have no formula of their own.
    if name.startswith("fused_") and name not in ("fused_pair_loss", "fused_class_loss")
}
#: Thresholds of a loss: one number, or one per identity or class. Other losses have none.
THRESHOLDS = {
    "fused_pair_bce_loss": ("each",),
    "fused_uce_loss": ("one", "each"),
}
#: Heads over a sample of the classes: a softmax, a sum with a threshold per class, a search.
HEADS = ("cosface", "uce", "npt")
#: Leaves out next to nothing of a gradient, by the kernels that decide what.
TOLERANCE = 1e-5
#: Features of losses between two towers.
TOWERS = ("a", "b", "queries", "keys")
#: Limit of one case in a separate process, which may have to compile its kernels.
LIMIT_S = 30.0
#: Rounding may change which columns are nearest; the gradient of either choice is right.
DISCONTINUOUS = ("fused_npt_loss",)


@dataclass(frozen=True)
class SmallCase:
    """One call; ``columns``: "batch", "memory", "classes", a "subset" of them by row index, or
    "towers".
    """

    function: str
    columns: str
    threshold: str
    reduction: str
    filtered: bool = False

    def __str__(self) -> str:
        threshold = "" if self.threshold == "none" else f", {self.threshold} threshold"
        filtered = ", filtered" if self.filtered else ""
        return f"{self.function}, {self.columns}{threshold}, {self.reduction}{filtered}"

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def normal(count: int) -> Tensor:
            found = torch.randn(count, SIZE, generator=generator)
            return (found + 0.5 * torch.randn(SIZE, generator=generator)).to(device, dtype)

        def labels(count: int, identities: int) -> Tensor:
            found = torch.randint(0, identities, (count,), generator=generator)
            found[::13] = -1
            return found.to(device)

        parameters = inspect.signature(FUNCTIONS[self.function]).parameters
        if self.columns == "towers":
            found = {name: normal(ROWS) for name in TOWERS if name in parameters}
            if "key_labels" in parameters:
                found |= {name: labels(ROWS, IDENTITIES) for name in ("labels", "key_labels")}
            return found | self._numbers(found, device)
        classes = self.columns in ("classes", "subset")
        taken = COLUMNS // 2 if self.columns == "subset" else COLUMNS
        found = {"feats": normal(ROWS), "labels": labels(ROWS, taken if classes else IDENTITIES)}
        if classes:
            found["weight"] = normal(COLUMNS)
        if self.columns == "memory":
            found |= {"memory": normal(COLUMNS), "memory_labels": labels(COLUMNS, IDENTITIES)}
        if self.columns == "subset":
            order = torch.randperm(COLUMNS, generator=generator)
            found["class_index"] = order[:taken].to(device)
        if self.threshold == "one":
            found["b"] = torch.tensor(2.0, device=device)
        elif self.threshold == "each":
            count = COLUMNS if classes else IDENTITIES
            found["b"] = 2.0 + torch.randn(count, generator=generator).to(device)
        return found | self._numbers(found, device)

    def _numbers(self, given: dict[str, Tensor], device: str) -> dict[str, Tensor]:
        """Numbers of a formula that have no default."""
        return {
            name: torch.tensor(0.3, device=device)
            for name, parameter in inspect.signature(FUNCTIONS[self.function]).parameters.items()
            if parameter.default is parameter.empty and name not in (*given, "scale")
        }

    def evaluate(self, inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and gradients by name, of weighted rows for ``reduction="none"``."""
        leaves = {
            name: t.detach().requires_grad_() if t.is_floating_point() else t
            for name, t in inputs.items()
        }
        function = FUNCTIONS[self.function]
        options = {"scale": SCALE} if "scale" in inspect.signature(function).parameters else {}
        if self.filtered and backend != "reference":
            options["skip_tolerance"] = TOLERANCE
        loss = function(**leaves, **options, reduction=self.reduction, backend=backend)
        weights = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=loss.device)
        loss.backward(weights.view(loss.shape).to(loss.dtype))
        # What a formula takes as a constant has none, or zeros.
        gradients = {
            n: torch.zeros_like(t) if t.grad is None else t.grad
            for n, t in leaves.items()
            if t.is_floating_point()
        }
        return loss.detach(), gradients


def cases() -> Iterator[SmallCase]:
    """Every loss with every kind of columns, threshold, and rows weighted in the backward pass."""
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters
        kinds: tuple[str, ...] = (
            ("classes", "subset") if "weight" in parameters else ("batch", "memory")
        )
        thresholds = THRESHOLDS.get(name, ("one",)) if "b" in parameters else ("none",)
        if "feats" not in parameters:
            kinds, thresholds = ["towers"], ("none",)
        for columns in kinds:
            for threshold in thresholds:
                for reduction in ("mean", "none"):
                    yield SmallCase(name, columns, threshold, reduction)
            if "skip_tolerance" in parameters:
                yield SmallCase(name, columns, thresholds[0], "mean", filtered=True)


def _error(got: Tensor, want: Tensor) -> float:
    """Relative norm; infinite where a NaN is or a zero gradient should be."""
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-12))


def check(case: SmallCase, dtype: torch.dtype, backend: str, device: str) -> str | None:
    """What is wrong; None if nothing is."""
    inputs = case.inputs(dtype, device)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    want_loss, want = case.evaluate(wide, "reference")
    loss, gradients = case.evaluate(inputs, backend)
    loss_limit, limit = LIMITS[dtype]
    errors = {"loss": (_error(loss, want_loss), loss_limit)}
    if gradients.keys() != want.keys():
        return f"gradients of {sorted(gradients)}, not of {sorted(want)}"
    judged = dtype == torch.float32 or case.function not in DISCONTINUOUS
    for name, gradient in gradients.items():
        errors[name] = (_error(gradient, want[name]), limit if judged else float("inf"))
    wrong = [f"{name} {error:.1e}" for name, (error, bound) in errors.items() if not error < bound]
    return ", ".join(wrong) or None


def check_histogram(backend: str, device: str) -> str | None:
    """The metrics' kernel: integers, so equal. Cosines are far from the edges of two bins."""
    generator = torch.Generator().manual_seed(0)
    # Axes and their opposites: cosines -1, 0 and 1.
    signs = torch.randint(0, 2, (ROWS,), generator=generator) * 2.0 - 1.0
    axes = torch.randint(0, 5, (ROWS,), generator=generator)
    feats = torch.zeros(ROWS, SIZE)
    feats[torch.arange(ROWS), axes] = signs
    labels = torch.randint(0, IDENTITIES, (ROWS,), generator=generator)
    got, want = (
        metrics.pair_histogram(feats.to(device), labels.to(device), bins=7, backend=name)
        for name in (backend, "reference")
    )
    same = torch.equal(got.positives, want.positives) and torch.equal(got.negatives, want.negatives)
    return None if same else "counts differ"


def check_rows(device: str) -> str | None:
    """The optimizers' kernel, over all rows in another order: what Torch does without rows."""
    for name in ("SGD", "AdamW"):
        options = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(ROWS, SIZE, generator=generator).to(device)
        rows, dense = (torch.nn.Parameter(weight.clone()) for _ in range(2))
        sampled = getattr(unitsface_kernels, f"Sampled{name}")([rows], **options)
        wanted = getattr(torch.optim, name)([dense], **options)
        for _ in range(3):
            order = torch.randperm(ROWS, generator=generator).to(device)
            dense.grad = torch.randn(ROWS, SIZE, generator=generator).to(device)
            sampled.begin_row_update(rows)(slice(0, ROWS), dense.grad[order], order, None)
            wanted.step()
        error = _error(rows.detach(), dense.detach().double())
        if not error < LIMITS[torch.float32][0]:
            return f"{name} {error:.1e}"
    return None


def _trained(loss: str, backend: str, device: str, fused: bool) -> Tensor:
    """(C, D) float32 class weights after three steps over samples of the classes."""
    torch.manual_seed(0)
    head = unitsface_kernels.PartialFC(
        loss, SIZE, COLUMNS, sample_rate=0.4, device=device, backend=backend
    )
    optimizer = unitsface_kernels.SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
    if fused:
        head.fuse(optimizer, "backward")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        feats = torch.randn(ROWS, SIZE, generator=generator).to(device).requires_grad_()
        labels = torch.randint(0, COLUMNS // 4, (ROWS,), generator=generator).to(device)
        head(feats, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    # The class weights are the largest of its parameters.
    return max(head.parameters(), key=Tensor.numel).detach()


def check_partial_fc(loss: str, backend: str, device: str, fused: bool) -> str | None:
    """The draw, gradients of sampled rows and the optimizer's step, as on the CPU."""
    got = _trained(loss, backend, device, fused)
    want = _trained(loss, "native", "cpu", fused)
    error = _error(got.cpu(), want.double())
    limit = LIMITS[torch.float32][1]
    return None if error < limit else f"weights {error:.1e}"


@cache
def checks(
    backends: tuple[str, ...], dtypes: tuple[str, ...], device: str
) -> dict[str, Callable[[], str | None]]:
    """What to run, by name."""
    # Memory that nothing wrote shows as NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    found: dict[str, Callable[[], str | None]] = {}
    for backend in backends:
        for name in dtypes:
            for case in cases():
                found[f"{backend}, {name}, {case}"] = partial(
                    check, case, getattr(torch, name), backend, device
                )
        for loss in HEADS:
            for fused in (False, True):
                how = "fused" if fused else "separate"
                found[f"{backend}, PartialFC {loss}, {how}"] = partial(
                    check_partial_fc, loss, backend, device, fused
                )
    if "native" in backends:
        found["native, pair_histogram"] = partial(check_histogram, "native", device)
        found["native, rows"] = partial(check_rows, device)
    return found


def run_check(
    backends: tuple[str, ...], dtypes: tuple[str, ...], device: str, name: str
) -> dict[str, Any]:
    """One of :func:`checks`, by name; in a worker process, an error ends it."""
    return {"wrong": checks(backends, dtypes, device)[name]()}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_small_cases", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", nargs="+", default=["native", "triton"])
    every = [str(dtype).removeprefix("torch.") for dtype in LIMITS]
    parser.add_argument("--dtypes", nargs="+", default=every, choices=every)
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=0, help="worker processes; 0: in this one")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    settings = tuple(options.backends), tuple(options.dtypes), options.device
    names = [name for name in checks(*settings) if options.match in name]
    report: dict[str, Any] = {"cases": len(names), "ran": 0, "failed": {}}

    def add(task: pool.Task, result: dict[str, Any]) -> None:
        report["ran"] += 1
        wrong = result.get("error") or result["wrong"]
        if wrong:
            report["failed"][task[-1]] = wrong
            print(f"FAILED {task[-1]}: {wrong}", flush=True)
        if options.out is not None:
            write_json(options.out, report)

    tasks = [(*settings, name) for name in names]
    if options.jobs:
        pool.run(run_check, tasks, options.jobs, LIMIT_S, add)
    else:
        for task in tasks:
            try:
                result = run_check(*task)
            except Exception as error:  # the other cases still run
                result = {"error": pool.describe(error)}
            add(task, result)
    print(f"{report['ran']} small cases, {len(report['failed'])} failed", flush=True)
    return 1 if report["failed"] or not names else 0


if __name__ == "__main__":
    # The module that worker processes import, not a second one named __main__.
    from bench import gpu_small_cases

    sys.exit(gpu_small_cases.main())
