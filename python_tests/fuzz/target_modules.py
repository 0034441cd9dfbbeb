"""Modules, partial FC and adapters, drawn, against float64: losses and gradients of two steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unitsface_kernels import CLASS_LOSSES, PAIR_LOSSES, PartialFC
from unitsface_kernels.adapters import metric_learning
from unitsface_kernels.partial_fc import SHARDABLE

from . import draw
from .bounds import JUMPS, MOVES, beyond, off, sharp
from .draw import Source

_ADAPTED: dict[str, Callable[..., nn.Module]] = {
    "adapter ntxent": lambda _, __, **k: metric_learning.NTXentLoss(**k),
    "adapter supcon": lambda _, __, **k: metric_learning.SupConLoss(**k),
    "adapter cosface": lambda d, c, **k: metric_learning.CosFaceLoss(c, d, **k),
    "adapter multi similarity": lambda _, __, **k: metric_learning.MultiSimilarityLoss(**k),
    "adapter proxy anchor": lambda d, c, **k: metric_learning.ProxyAnchorLoss(c, d, **k),
    "adapter memory": lambda d, _, **k: metric_learning.CrossBatchMemory(
        metric_learning.NTXentLoss(**k), d, 150
    ),
}
_OPTIONS: dict[str, dict[str, list]] = {
    "epl": {
        "base": ["cosface", "arcface", "uce"],
        "start_epoch": [0, 3],
        "k": [0.0, 0.7],
        "activation": ["softsign", "sigmoid", "direct"],
    },
    "vpl": {"start_iteration": [0, 1], "mix": [0.0, 0.15]},
    "unpg": {"whisker": [None, 1.5]},
    "uss": {"init_threshold": [None, 3.0]},
    "pair_bce": {"init_threshold": [None, 3.0]},
    "npt": {"k": [1, 3]},
    "multi_similarity": {"alpha": [1.0, 2.0, 8.0], "beta": [8.0, 50.0]},
    "contrastive": {"negative_margin": [0.5, 1.0], "distance": ["euclidean", "cosine"]},
    "batch_hard": {"k": [1, 3], "distance": ["squared", "euclidean"]},
    "proxy_nca": {"denominator": ["negatives", "all"]},
}


def _made(name: str, width: int, count: int, **options: Any) -> nn.Module:
    if name in _ADAPTED:
        return _ADAPTED[name](width, count, **options)
    if name in CLASS_LOSSES:
        return CLASS_LOSSES[name](width, count, **options)
    return PAIR_LOSSES[name](*([count] if name == "pair_bce" else []), **options)


def _steps(module: nn.Module, batches: list, upstream: Tensor, scaled: bool = True) -> list[Tensor]:
    """Loss and features' gradients of every batch, and the parameters' of all together.

    ``scaled``: gradients of features are by the logarithm of their norm.
    """
    found = []
    for feats, labels, more in batches:
        feats = feats.detach().requires_grad_()
        loss = module(feats, labels, **more)
        weight = upstream[: loss.numel()].reshape(loss.shape).to(loss.dtype)
        if loss.requires_grad:
            (loss * weight).sum().backward()
        gradient = torch.zeros_like(feats) if feats.grad is None else feats.grad
        norms = feats.detach().double().norm(dim=1, keepdim=True).clamp(min=1e-5)
        found += [loss.detach(), gradient.double() * norms if scaled else gradient]
    for parameter in module.parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        found.append(gradient.to_dense() if gradient.is_sparse else gradient)
    return found


def run_one(seed: int) -> str | None:
    s = Source(seed)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    name = s.pick([n for n in (*CLASS_LOSSES, *PAIR_LOSSES, *_ADAPTED) if n not in JUMPS])
    dtype = s.pick(draw.DTYPES)
    width, count = s.pick(draw.WIDTHS), s.pick([1, 2, 3, 5, 17, 64])
    options = {k: s.pick(v) for k, v in _OPTIONS.get(name, {}).items()}
    if not name.startswith("adapter"):
        options["reduction"] = s.pick(["mean", "sum", "none"])
        scale = s.pick([4.0, 16.0, 64.0])
        if "scale" in inspect.signature({**CLASS_LOSSES, **PAIR_LOSSES}[name]).parameters:
            options["scale"] = scale
    if name == "adacos":
        count = max(count, 3)
    own: nn.Module = _made(name, width, count, **options)
    copied = copy.deepcopy(own)
    for module in copied.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    sharded = name in SHARDABLE and s.chance(0.5)
    if sharded and options["reduction"] == "none":
        # Where classes have the losses, rows have none.
        sharded = all(c.spec.topology == "class" for c in own.comparisons())
    if sharded:
        own = PartialFC(name, width, count, **options)
        copied.load_state_dict(own.loss.state_dict())
    if name in ("epl",):
        for module in (own.loss if sharded else own, copied):
            module.set_epoch(1)
    batches = []
    for _ in range(2):
        rows = s.pick(draw.ROWS)
        feats = draw.laid_out(s, draw.features(s, rows, width, dtype, None))
        lowest = name.startswith("adapter")
        found = draw.labels(s, rows, count, wide=False)
        if lowest:
            found = found.to(torch.int64).clamp(min=0)
        more = {}
        if name in PAIR_LOSSES and s.chance(0.5):
            columns = s.pick(draw.ROWS)
            more["memory"] = draw.laid_out(s, draw.features(s, columns, width, dtype, feats))
            more["memory_labels"] = draw.labels(s, columns, count, wide=False)
        batches.append((feats, draw.laid_out(s, found), more))
    upstream = s.normal(max(draw.ROWS))

    def exact(move: float, number: int, scaled: bool = True) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number)

        def moved(x: Tensor) -> Tensor:
            x = x.double()
            size = x.abs().amax() if x.numel() else 0.0
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            return x + move * (x.abs() + 0.1 * size) * noise

        module = copy.deepcopy(copied).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(moved(parameter))
        wide = [
            (moved(f), y, {k: moved(t) if t.is_floating_point() else t for k, t in m.items()})
            for f, y, m in batches
        ]
        return _steps(module, wide, upstream, scaled)

    fresh = copy.deepcopy(own)
    got = _steps(own, batches, upstream)
    eager = _steps(copy.deepcopy(copied), batches, upstream)
    want, others = exact(0.0, 0), [exact(MOVES[dtype], k) for k in (1, 2)]
    angular = name in ("arcface", "epl", "magface", "sphereface", "subcenter_arcface", "vpl")
    weights = [p.flatten(0, -2) for p in copied.parameters() if p.dim() >= 2]
    for feats, _, _ in batches if angular else []:
        if any(sharp(feats, w, dtype) for w in weights):
            return None
    size = 1.0 + max((float(w.abs().nan_to_num(posinf=0.0).sum()) for w in want[:4:2]), default=0.0)
    finite = all(bool(b[0].isfinite().all()) for b in batches)
    finite &= all(bool(t.isfinite().all()) for b in batches for t in b[2].values())
    for place, values in enumerate(zip(got, want, eager, strict=True)):
        # Eager gradients are NaN also where a pair that has none is multiplied by 0.
        if not finite and place not in (0, 2):
            continue
        problem = off(f"result {place}", *values, [o[place] for o in others], dtype, 64 * size)
        if problem is not None and "error" in problem:
            places = range(len(got)) if finite else (0, 2)

            def named(values: list[Tensor], places: Any = places) -> dict[str, Tensor]:
                return {f"result {place}": values[place] for place in places}

            problem = beyond(
                named(_steps(fresh, batches, upstream, scaled=False)),
                lambda: named(exact(0.0, 0, scaled=False)),
                dtype,
                "auto",
            )
            if problem is None:
                return None
        if problem is not None:
            sizes = [tuple(b[0].shape) for b in batches]
            return f"{problem} [{name} {dtype} {options} sharded={sharded} C={count} {sizes}]"
    return None
