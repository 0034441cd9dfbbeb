"""Public loss functions, drawn, against float64: losses and gradients."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unitsface_kernels
from unitsface_kernels.losses import REGISTRY, LossSpec, Parameter

from . import draw
from .bounds import JUMPS, MOVES, beyond, off, sharp
from .draw import Source

MATRICES = ("feats", "weight", "memory")


class _Watched(TorchDispatchMode):
    """Calls go through the registered operators, as under torch.compile."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        return function(*arguments, **(kwargs or {}))


@dataclass
class Drawn:
    spec: LossSpec
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    gradients: list[str]
    upstream: Tensor
    backend: str
    dtype: torch.dtype
    autocast: bool = False
    watched: bool = False
    twice: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def gemm_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype


def _threshold(s: Source, spec: LossSpec, count: int) -> Tensor | float:
    if spec.threshold == "scalar":
        b = s.pick([0.0, 1.0, 5.0, -3.0, 30.0])
        shape = s.pick([None, (), (), (1,), (1, 1), (1, 1, 1)])
        return b if shape is None else torch.full(shape, b)
    return 3.0 if s.chance(0.1) else 5.0 * s.normal(count)


def _value(s: Source, p: Parameter) -> Any:
    """One that is legal."""
    options = list(p.choices) or draw.VALUES.get(p.name, [p.default])
    low = p.at_least if p.minimum is None else p.minimum
    return s.pick([v for v in options if p.choices or low is None or v >= low])


def drawn(s: Source) -> Drawn:
    spec = s.pick([spec for spec in REGISTRY.values() if spec.name not in JUMPS])
    backend = "triton" if s.chance(0.015) else "auto"
    large = s.chance(0.004) and backend == "auto"
    dtype = s.pick(draw.DTYPES)
    rows = s.pick([1030, 1100]) if large else s.pick(draw.ROWS)
    width = s.pick(draw.WIDTHS)
    columns = s.pick(draw.ROWS) if not large else s.pick([40, 800, 1500])
    tensors: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    if spec.topology == "class":
        tensors["weight"] = draw.features(s, columns, width, dtype, None)
        kinds = columns
        if s.chance(0.2):
            index = torch.randperm(columns, generator=s.generator)
            tensors["class_index"] = index[: s.random.randrange(columns + 1)]
            kinds = len(tensors["class_index"])
        tensors["feats"] = draw.features(s, rows, width, dtype, tensors["weight"])
        tensors["labels"] = draw.labels(s, rows, kinds, wide=False)
        identities = columns
    else:
        identities = s.pick([1, 2, 3, 5, 20, 0 if spec.threshold == "per_column" else 4])
        wide = spec.threshold != "per_column"
        tensors["feats"] = draw.features(s, rows, width, dtype, None)
        tensors["labels"] = draw.labels(s, rows, identities, wide)
        if s.chance(0.6):
            tensors["memory"] = draw.features(s, columns, width, dtype, tensors["feats"])
            tensors["memory_labels"] = draw.labels(s, columns, identities, wide)
            if s.chance(0.4):
                options["batch_offset"] = s.pick([0, 0, 1, -1, columns - rows, 10**6, -(2**63)])
    if spec.threshold != "none":
        b = _threshold(s, spec, identities)
        (tensors if isinstance(b, Tensor) else options)["b"] = b
    sizes = {"scalar": 1, "row": rows, "column": columns, "identity": identities}
    for variable in spec.variables:
        if variable.given:
            size = sizes[variable.kind]
            tensors[variable.name] = 0.3 + torch.rand(size, generator=s.generator)
        backend = "auto" if variable.streamed else backend
    values = {p.name: _value(s, p) for p in spec.parameters if s.chance(0.6)}
    if "skip_tolerance" in _keywords(spec) and s.chance(0.3):
        options["skip_tolerance"] = s.pick([1e-9, 1e-7])
    options["reduction"] = s.pick(["mean", "mean", "sum", "none"])
    wanted = [n for n in (*MATRICES, "b") if n in tensors and s.chance(0.8)]
    count = rows if options["reduction"] == "none" else 1
    upstream = s.pick([1.0, 1.0, 0.0, -2.0, 1e-3, 1024.0]) * (
        torch.ones(count) if s.chance(0.5) else s.normal(count)
    )
    if options["reduction"] != "none":
        upstream = upstream.reshape(())
    laid = {name: draw.laid_out(s, t) for name, t in tensors.items()}
    return Drawn(
        spec, laid, options, wanted, upstream, backend, dtype,
        autocast=dtype == torch.float32 and s.chance(0.05),
        watched=s.chance(0.06),
        twice=s.chance(0.05),
        values=values,
    )  # fmt: skip


def _keywords(spec: LossSpec) -> tuple[str, ...]:
    function = getattr(unitsface_kernels, spec.function)
    return function.__code__.co_varnames[
        : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
    ]


def evaluate(d: Drawn, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    function = getattr(unitsface_kernels, d.spec.function)
    leaves = {n: t.detach().requires_grad_() for n, t in d.tensors.items() if n in d.gradients}
    with ExitStack() as stack:
        if d.autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if d.watched:
            stack.enter_context(_Watched())
        loss = function(**(d.tensors | leaves), **d.options, **d.values, backend=backend)
        upstream = d.upstream.to(loss.dtype)
        if d.twice and loss.requires_grad:
            loss.backward(upstream, retain_graph=True)
            for leaf in leaves.values():
                leaf.grad = None
        if loss.requires_grad:
            loss.backward(upstream)
    zeros = {n: torch.zeros_like(leaf) for n, leaf in leaves.items()}
    return loss.detach(), {
        n: zeros[n] if leaf.grad is None else leaf.grad for n, leaf in leaves.items()
    }


def exact(d: Drawn, move: float = 0.0, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The float64 reference, of operands that are moved."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(d.tensors)
    for name in (*MATRICES, "b"):
        if name in tensors:
            wide = tensors[name].double()
            # Noise per element in units of its row: zeros are rounded, too.
            size = wide.abs().amax(dim=-1, keepdim=True) if wide.dim() and wide.numel() else wide
            noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
            tensors[name] = wide + move * (wide.abs() + 0.1 * size) * noise
    return evaluate(replace(d, tensors=tensors, autocast=False, watched=False), "reference")


def _scaled(d: Drawn, name: str, gradient: Tensor) -> Tensor:
    """Gradients of features by the logarithm of their norm: independent of it."""
    if name not in MATRICES:
        return gradient.double()
    norms = d.tensors[name].double().norm(dim=1, keepdim=True)
    return gradient.double() * norms.clamp(min=1e-5)


def _angular(values: dict[str, Any]) -> bool:
    return (
        values.get("m1", 1.0) != 1.0
        or values.get("m2", 0.0) != 0.0
        or values.get("margin_type") == "A"
    )


def run_one(seed: int) -> str | None:
    s = Source(seed)
    torch.set_num_threads(s.pick([1, 1, 1, 2]))
    d = drawn(s)
    loss, gradients = evaluate(d, d.backend)
    want, wanted = exact(d)
    eager, of_eager = evaluate(replace(d, autocast=False, watched=False), "reference")
    moved = [exact(d, MOVES[d.gemm_dtype], k) for k in (1, 2)]
    if _angular(d.values) and sharp(d.tensors["feats"], d.tensors["weight"], d.gemm_dtype):
        return None
    terms = want.double().nan_to_num(posinf=0.0, neginf=0.0) * d.upstream
    size = float(terms.abs().sum())
    found = off("loss", loss, want, eager, [m[0] for m in moved], d.gemm_dtype, 0.0)
    params = d.spec.pack({**d.spec.defaults(), **d.values})
    slope = 4.0 if d.spec.triplet else d.spec.slope_bound(params)
    slope *= max(1.0, float(d.values.get("m1", 1.0)))
    columns = len(d.tensors.get("weight", d.tensors.get("memory", d.tensors["feats"])))
    size += float(d.upstream.abs().sum()) * (1 + columns * (d.spec.reduction == "sum"))
    # Eager gradients are NaN also where a pair that has none is multiplied by 0.
    finite = all(bool(t.isfinite().all()) for t in d.tensors.values())
    for name, gradient in gradients.items():
        if found is None and finite:
            # A stored gradient in half precision is rounded, too.
            found = off(
                name,
                *(_scaled(d, name, g) for g in (gradient, wanted[name], of_eager[name])),
                [_scaled(d, name, m[1][name]) for m in moved],
                d.gemm_dtype if d.gemm_dtype != torch.float32 else d.dtype,
                size * (1.0 if name == "b" else slope),
            )
    if found is not None and "error" in found:

        def named(loss: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": loss, **(gradients if finite else {})}

        found = beyond(named(loss, gradients), lambda: named(*exact(d)), d.gemm_dtype, d.backend)
    if found is None:
        return None
    shapes = {n: (tuple(t.shape), t.stride()) for n, t in d.tensors.items()}
    return f"{found} [{d.spec.name} {d.dtype} {d.backend} {d.options} {d.values} {shapes}]"
