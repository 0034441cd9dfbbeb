"""``python -m bench.gpu_small_cases``: every loss, backend and topology once, on small odd sizes.

Short enough to run under compute-sanitizer, which makes kernels up to a hundred times slower: a
few blocks of every kernel, none of them full. Losses and gradients are compared with the
reference backend in float64. The test suite checks accuracy; the
limits here only separate a wrong index or a race from rounding.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import unitsface_kernels
from unitsface_kernels import metrics

ROWS, COLUMNS, SIZE, IDENTITIES = 139, 203, 72, 17
SCALE = 16.0
#: Of the loss, and of the relative norm of a gradient. In half precision a cosine is good to about
#: 1e-3 (1e-4 in float16), the scale multiplies that, and Triton's interpreter cuts digits off.
LIMITS = {
    torch.float32: (1e-5, 1e-4),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (5e-2, 8e-2),
}
FUNCTIONS = {
    name: getattr(unitsface_kernels, name)
    for name in unitsface_kernels.__all__
    if name.startswith("fused_")
}
#: Thresholds of a loss: one number, or one per identity or class. Other losses have none.
THRESHOLDS = {
    "fused_pair_bce_loss": ("each",),
    "fused_uce_loss": ("one", "each"),
}
#: Rounding may change which columns are nearest; the gradient of either choice is right.
DISCONTINUOUS = ("fused_npt_loss",)


@dataclass(frozen=True)
class SmallCase:
    """One call; ``columns``: "batch", "memory", "classes" or a "subset" of them by row index."""

    function: str
    columns: str
    threshold: str
    reduction: str

    def __str__(self) -> str:
        threshold = "" if self.threshold == "none" else f", {self.threshold} threshold"
        return f"{self.function}, {self.columns}{threshold}, {self.reduction}"

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def normal(count: int) -> Tensor:
            found = torch.randn(count, SIZE, generator=generator)
            return (found + 0.5 * torch.randn(SIZE, generator=generator)).to(device, dtype)

        def labels(count: int, identities: int) -> Tensor:
            found = torch.randint(0, identities, (count,), generator=generator)
            found[::13] = -1
            return found.to(device)

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
        return found

    def evaluate(self, inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and gradients by name, of weighted rows for ``reduction="none"``."""
        leaves = {
            name: t.detach().requires_grad_() if t.is_floating_point() else t
            for name, t in inputs.items()
        }
        function = FUNCTIONS[self.function]
        options = {"scale": SCALE} if "scale" in inspect.signature(function).parameters else {}
        loss = function(**leaves, **options, reduction=self.reduction, backend=backend)
        weights = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=loss.device)
        loss.backward(weights.view(loss.shape).to(loss.dtype))
        gradients = {n: t.grad for n, t in leaves.items() if t.grad is not None}
        return loss.detach(), gradients


def cases() -> Iterator[SmallCase]:
    """Every loss with every kind of columns, threshold, and rows weighted in the backward pass."""
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters
        kinds = ("classes", "subset") if "weight" in parameters else ("batch", "memory")
        thresholds = THRESHOLDS.get(name, ("one",)) if "b" in parameters else ("none",)
        for columns in kinds:
            for threshold in thresholds:
                for reduction in ("mean", "none"):
                    yield SmallCase(name, columns, threshold, reduction)


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


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_small_cases", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", nargs="+", default=["native", "triton"])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=[str(d)[6:] for d in LIMITS]
    )
    parser.add_argument("--match", default="", help="only cases whose name has this in it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    # Memory that nothing wrote shows as NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    checks: dict[str, Callable[[], str | None]] = {}
    for backend in options.backends:
        for name in options.dtypes:
            for case in cases():
                checks[f"{backend}, {name}, {case}"] = lambda c=case, n=name, b=backend: check(
                    c, getattr(torch, n), b, options.device
                )
    if "native" in options.backends:
        checks["native, pair_histogram"] = lambda: check_histogram("native", options.device)
        checks["native, rows"] = lambda: check_rows(options.device)
    failed = 0
    ran = 0
    for name, run in checks.items():
        if options.match not in name:
            continue
        ran += 1
        try:
            wrong = run()
        except Exception as error:  # the other cases still run
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if wrong:
            failed += 1
            print(f"FAILED {name}: {wrong}", flush=True)
    print(f"{ran} small cases, {failed} failed", flush=True)
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
