"""Problems that hypothesis draws, for relations that hold for every input.

hypothesis draws sizes, parameters and a seed; the numbers themselves come from the seed, because
drawing them one by one is slow and makes failures no smaller. Draws are the same on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch

# What needs it is skipped where it is not installed.
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.cases import Problem, variants
from support.evaluation import expected
from support.given_variables import draw_variables
from support.grid import calls, extended_if
from support.helpers import TARGETS, Target
from support.tolerances import check
from torch import Tensor
from torch.nn import functional as F

from unitsface_kernels.losses import REGISTRY, LossSpec

Evaluation = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Draw:
    """Shape and kind of a drawn problem; a loss uses the fields that apply to it.

    Attributes:
        columns: of a memory; 0: the batch itself. Classes are one more.
        identities: of samples.
        ignored: share of rows, and of a memory's columns, whose label is -1.
        variant: which of the loss's parameter sets; ``scale`` and ``margin`` replace its own.
        threshold: in units of the scale.
        common: length of what all features have in common, of theirs.
    """

    seed: int
    rows: int
    columns: int
    dim: int
    identities: int
    ignored: float
    variant: int
    scale: float
    margin: float
    threshold: float
    common: float
    reduction: str

    def build(self, spec: LossSpec, device: str, *, columns: bool = False) -> Problem:
        """``columns``: a pair loss gets a memory in any case."""
        generator = torch.Generator().manual_seed(self.seed)
        classes = spec.topology == "class"
        count = self.columns + 1 if classes or columns else self.columns

        def labels(size: int, identities: int) -> Tensor:
            drawn = torch.randint(identities, (size,), generator=generator)
            return drawn.where(torch.rand(size, generator=generator) >= self.ignored, -1)

        def features(size: int) -> Tensor:
            found = F.normalize(torch.randn(size, self.dim, generator=generator), dim=1)
            found = F.normalize(found + self.common * shared, dim=1)
            return found * (0.5 + torch.rand(size, 1, generator=generator))

        shared = F.normalize(torch.randn(1, self.dim, generator=generator), dim=1)
        upstream = torch.tensor(1.7)
        if self.reduction == "none":
            upstream = 0.5 + torch.rand(self.rows, generator=generator)
        b = None
        if spec.threshold != "none":
            b = torch.tensor(self.threshold * self.scale)
        if spec.threshold == "per_column":
            b = b + torch.randn(count if classes else self.identities, generator=generator)
        sets = list(variants(spec).values())
        values = {**sets[self.variant % len(sets)]}
        chosen = {"scale": self.scale, "margin": self.margin, "m3": self.margin}
        values |= {name: value for name, value in chosen.items() if name in spec.defaults()}
        p = Problem(
            spec=spec,
            rows=features(self.rows),
            labels=labels(self.rows, count if classes else self.identities),
            columns=features(count) if count else None,
            column_labels=None if classes or not count else labels(count, self.identities),
            index=None,
            b=b,
            values=values,
            reduction=self.reduction,
            upstream=upstream,
            variables=draw_variables(spec, self.rows, count or self.rows, device),
        )
        tensors = {name: t for name, t in vars(p).items() if isinstance(t, Tensor)}
        for name, tensor in tensors.items():
            setattr(p, name, tensor.to(device))
        return p


DRAWS = st.builds(
    Draw,
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 12),
    columns=st.integers(0, 12),
    dim=st.integers(3, 40),
    identities=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.0, 0.3]),
    variant=st.integers(0, 11),
    scale=st.sampled_from([1.0, 4.0, 16.0, 30.0, 64.0]),
    margin=st.sampled_from([0.0, 0.1, 0.4]),
    threshold=st.floats(-1.5, 1.5, width=32),
    common=st.sampled_from([0.0, 0.5, 2.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)


def for_all(specs: Iterable[LossSpec]) -> Callable:
    """Runs ``test(target, spec, drawn)`` on drawn problems for every target and loss.

    An interpreter gets fewer draws and does not look for smaller failures, which takes minutes.
    """

    # The oracle's own properties have the fused backends' as representatives.
    grid = [
        pytest.param(
            *call.values,
            id=call.id,
            marks=[*call.marks, *extended_if(call.values[0].backend == "reference")],
        )
        for call in calls(TARGETS, specs)
    ]

    def decorate(test: Callable[[Target, LossSpec, Draw], None]) -> Callable:
        @pytest.mark.parametrize(("target", "spec"), grid)
        def run(target: Target, spec: LossSpec) -> None:
            def example(drawn: Draw) -> None:
                test(target, spec, drawn)

            # What draws follow from: other problems for every property, loss and target.
            example.__name__ = f"{test.__name__}_{spec.name}_{target.backend}"
            profile = settings(
                derandomize=True,
                deadline=None,
                database=None,
                max_examples=2 if target.interpreted else 5,
                phases=[Phase.generate] if target.interpreted else [Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            profile(given(DRAWS)(example))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def losses(topology: str = "any", reduction: str = "any") -> list[LossSpec]:
    return [
        spec
        for spec in REGISTRY.values()
        if topology in ("any", spec.topology) and reduction in ("any", spec.reduction)
    ]


def check_equal(p: Problem, got: Evaluation, *wanted: Evaluation) -> None:
    """Two float32 evaluations of the loss of ``p`` agree but for the rounding of both."""
    target = Target("reference", str(p.rows.device))
    rounding = expected(target, p, torch.float32)
    for loss, gradients in wanted:
        assert got[1].keys() == gradients.keys()
        for name, value in {"loss": loss, **gradients}.items():
            found = got[0] if name == "loss" else got[1][name]
            spread = replace(rounding[name], want=value.double())
            check(name, found, spread, computations=2.0)
