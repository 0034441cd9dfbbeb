"""Hashes of what the package computes: equal before and after a change that moves code only.

python python_tests/support/hash_calls.py > before.txt    (from the root of either checkout)

One line per case: a SHA-256 of every bit of losses, gradients, parameters and counts. Only the
public interface is used, so that the same file runs on two checkouts. Hashes depend on the
processor and the Torch version; both runs belong on one machine. A case takes milliseconds.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Triton decides at import whether its kernels are compiled or interpreted.
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[0] = str(Path.cwd())

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import unitsface_kernels as uk  # noqa: E402
from unitsface_kernels.losses import REGISTRY, LossSpec  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int, identities: int, seed: int) -> Tensor:
    """Some of them ignored."""
    return torch.randint(-1, identities, (count,), generator=torch.Generator().manual_seed(seed))


def digest(*tensors: Tensor | None) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            total.update(b"none")
            continue
        tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


class ThroughOperators(TorchDispatchMode):
    """Calls take the way of ``torch.compile``, without the compiler."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def upstream(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape)


def threshold(spec: LossSpec, identities: int) -> Tensor | None:
    if spec.threshold == "none":
        return None
    per_column = spec.threshold == "per_column"
    return normal(identities, seed=5) + 1.0 if per_column else torch.tensor(1.25)


def call(
    spec: LossSpec,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    columns: str,
    **settings: Any,
) -> str:
    """Loss and gradients of one call."""
    rows, count, size = shape
    identities = count if spec.topology == "class" else 7
    feats = normal(rows, size, seed=1).to(dtype).requires_grad_()
    targets = labels(rows, identities, seed=2)
    other: Tensor | None = None
    arguments: dict[str, Any] = {}
    b = threshold(spec, identities)
    if b is not None:
        arguments["b"] = b.requires_grad_()
    sizes = {"scalar": 1, "row": rows, "column": count, "identity": identities}
    arguments |= {v.name: torch.full((sizes[v.kind],), 0.7) for v in spec.variables if v.given}
    if spec.topology == "class":
        other = arguments["weight"] = normal(count, size, seed=3).to(dtype).requires_grad_()
        if columns == "index":
            arguments["class_index"] = torch.arange(0, count, 2)
            targets = targets.clamp(max=(count + 1) // 2 - 1)
    elif columns != "batch":
        other = arguments["memory"] = normal(count, size, seed=3).to(dtype)
        other.requires_grad_(columns == "memory with gradient")
        arguments["memory_labels"] = labels(count, identities, seed=4)
        arguments["batch_offset"] = 3
    if columns == "threshold alone":
        feats = feats.detach()
    loss = getattr(uk, spec.function)(feats, labels=targets, **arguments, **settings)
    if loss.requires_grad:
        loss.backward(upstream(loss))
    return digest(loss, *(None if t is None else t.grad for t in (feats, other, b)))


def calls() -> Iterator[tuple[str, Callable[[], str]]]:
    small, large = (33, 70, 20), (700, 1500, 40)
    for spec in REGISTRY.values():
        kinds = ["whole", "index"]
        if spec.topology == "pair":
            kinds = ["batch", "memory", "memory with gradient"]
            if spec.threshold != "none":
                kinds.append("threshold alone")
        options = inspect.signature(getattr(uk, spec.function)).parameters
        skips = "skip_tolerance" in options
        for shape, dtype, columns, reduction in itertools.product(
            (small, large), DTYPES, kinds, REDUCTIONS
        ):
            grid: list[dict[str, Any]] = [{"backend": "native"}]
            if skips:
                grid.append({"backend": "native", "skip_tolerance": 0.3})
            if shape == small and dtype == torch.float32:
                grid += [{"backend": "triton"}, {"backend": "reference"}]
            for extra in grid:
                settings = {"reduction": reduction, **extra}
                words = [spec.name, str(shape), str(dtype), columns, *map(str, settings.items())]
                yield (
                    " ".join(words),
                    lambda a=(spec, shape, dtype, columns), s=settings: call(*a, **s),
                )
                if extra == {"backend": "native"}:

                    def dispatched(a=(spec, shape, dtype, columns), s=settings) -> str:
                        with ThroughOperators():
                            return call(*a, **s)

                    yield " ".join([*words, "operators"]), dispatched


def modules() -> Iterator[tuple[str, Callable[[], str]]]:
    def train(make: Callable[[], torch.nn.Module], count: int) -> str:
        torch.manual_seed(0)
        module = make()
        optimizer = (
            torch.optim.SGD(module.parameters(), lr=0.1) if list(module.parameters()) else None
        )
        seen = []
        for step in range(3):
            feats = normal(40, 16, seed=step).requires_grad_()
            loss = module(feats, labels(40, count, seed=step + 9))
            loss.backward()
            seen += [loss, feats.grad]
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        state = [module.state_dict()[name] for name in sorted(module.state_dict())]
        return digest(*seen, *state)

    for name, cls in uk.CLASS_LOSSES.items():
        yield f"module {name}", lambda cls=cls: train(lambda: cls(16, 30), 30)
    for name, cls in uk.PAIR_LOSSES.items():
        size = (9,) if name == "pair_bce" else ()
        yield f"module {name}", lambda cls=cls, size=size: train(lambda: cls(*size), 9)
    for rate, optimizer, fuse in itertools.product(
        (1.0, 0.4), (uk.SampledSGD, uk.SampledAdamW), (None, "backward", "step")
    ):
        label = f"partial_fc {rate} {optimizer.__name__} {fuse}"
        yield label, lambda a=(rate, optimizer, fuse): partial_fc("cosface", *a)


def partial_fc(loss: str, rate: float, optimizer: Any, fuse: str | None) -> str:
    layer = uk.PartialFC(loss, 16, 50, sample_rate=rate, seed=3)
    steps = optimizer(layer.parameters(), lr=0.05)
    if fuse:
        layer.fuse(steps, when=fuse)
    seen = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(3):
        feats = normal(12, 16, seed=10 * step + rank).requires_grad_()
        value = layer(feats, labels(12, 50, seed=10 * step + rank + 5))
        value.backward()
        steps.step()
        steps.zero_grad()
        seen += [value, feats.grad]
    return digest(*seen, *(p for p in layer.parameters()))


def metrics() -> Iterator[tuple[str, Callable[[], str]]]:
    feats, identities = normal(900, 24, seed=1), labels(900, 30, seed=2).clamp(min=0)
    weight = normal(30, 24, seed=3)
    module: Any = uk.metrics
    functions: dict[str, Callable[[str], Any]] = {
        "tar_at_far": lambda backend: module.tar_at_far(
            feats, identities, [1e-4, 1e-2], backend=backend
        ),
        "pair_histogram": lambda backend: module.pair_histogram(feats, identities, backend=backend),
        "kth_largest_score": lambda backend: module.kth_largest_score(
            feats, identities, 9, backend=backend
        ),
        "best_threshold": lambda backend: module.best_threshold(feats, identities, backend=backend),
        "threshold_gap": lambda backend: module.threshold_gap(
            feats, identities, 3.0, 8.0, backend=backend
        ),
        "identity_thresholds": lambda backend: module.identity_thresholds(
            feats, identities, backend=backend
        ),
        "classification_accuracy": lambda backend: module.classification_accuracy(
            feats, weight, identities, backend=backend
        ),
    }
    for backend in ("native", "reference"):
        for name, function in functions.items():

            def run(function=function, backend=backend) -> str:
                return hashlib.sha256(repr(function(backend)).encode()).hexdigest()[:16]

            yield f"metrics {name} {backend}", run


def of_ranks() -> list[str]:
    group = dist.group.WORLD
    lines = []
    for spec in REGISTRY.values():
        if spec.topology != "pair":
            continue
        for exchange, columns, reduction, dtype in itertools.product(
            ("gather", "ring"), ("batch", "memory"), REDUCTIONS, DTYPES
        ):
            rows = 20 + dist.get_rank()
            feats = normal(rows, 16, seed=dist.get_rank()).to(dtype).requires_grad_()
            arguments: dict[str, Any] = {}
            b = threshold(spec, 7)
            if b is not None:
                arguments["b"] = b.requires_grad_()
            if columns == "memory":
                arguments["memory"] = normal(50, 16, seed=3).to(dtype)
                arguments["memory_labels"] = labels(50, 7, seed=4)
            if "group" not in inspect.signature(getattr(uk, spec.function)).parameters:
                continue
            loss = getattr(uk, spec.function)(
                feats,
                labels=labels(rows, 7, seed=dist.get_rank() + 40),
                reduction=reduction,
                group=group,
                exchange=exchange,
                **arguments,
            )
            loss.backward(upstream(loss))
            hashed = digest(loss, feats.grad, None if b is None else b.grad)
            lines.append(f"2 ranks {spec.name} {exchange} {columns} {reduction} {dtype} {hashed}")
    for loss in ("cosface", "uce", "class_bce", "npt", "sphereface2"):
        for rate, fuse in itertools.product((1.0, 0.4), (None, "backward", "step")):
            hashed = partial_fc(loss, rate, uk.SampledSGD, fuse)
            lines.append(f"2 ranks partial_fc {loss} {rate} {fuse} {hashed}")
    return [f"{line} rank {dist.get_rank()}" for line in lines]


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    Path(f"{folder}/{number}.txt").write_text("\n".join(of_ranks()))
    dist.barrier()
    os._exit(0)  # without gloo's threads, which would end the process by a signal


def main() -> None:
    assert Path(uk.__file__).is_relative_to(Path.cwd()), uk.__file__
    torch.set_num_threads(2)
    torch.set_printoptions(precision=9, threshold=10**9)
    count = 0
    for name, run in itertools.chain(calls(), modules(), metrics()):
        try:
            print(f"{name}: {run()}")
        except (TypeError, ValueError) as error:
            print(f"{name}: {type(error).__name__}: {error}")
        count += 1
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank, (folder,), nprocs=2)
        for number in range(2):
            text = Path(f"{folder}/{number}.txt").read_text()
            print(text)
            count += len(text.splitlines())
    print(f"{count} cases")


if __name__ == "__main__":
    main()
