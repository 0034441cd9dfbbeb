"""The operators under PyTorch's transformations: opcheck, compile, autocast, func, DDP, pickle."""

from __future__ import annotations

import copy
import io
import os
import socket

import pytest
import torch
from cases import Problem, problem
from helpers import FUSED, TARGETS, Target
from tolerances import (
    AUTOCAST_GRADIENT,
    AUTOCAST_LOSS,
    SAME_GRADIENT,
    SAME_LOSS,
    check_same,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import unitsface_kernels
from unitsface_kernels import CLASS_LOSSES, PAIR_LOSSES, UniTSFaceLoss
from unitsface_kernels.losses import REGISTRY, LossSpec

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
each_fused = pytest.mark.parametrize("target", FUSED, ids=str)
each_loss = pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
each_class_loss = pytest.mark.parametrize(
    "spec",
    [spec for spec in REGISTRY.values() if spec.topology == "class"],
    ids=lambda spec: spec.name,
)
# In the batch or against a few classes, and against columns; what a reduction changes is whether
# gradients are known in the forward pass.
each_form = pytest.mark.parametrize(
    ("columns", "reduction"), [(None, "mean"), (None, "none"), (6, "sum"), (6, "none")], ids=str
)


# --- the operators --------------------------------------------------------------------------------


def _operator_arguments(p: Problem, backend: str) -> tuple:
    """The positional arguments that the public function passes on."""
    leaves = p.leaves()
    values = {**p.spec.defaults(), **p.values}
    return (
        leaves["rows"],
        p.labels,
        leaves.get("columns", p.columns),
        p.column_labels,
        p.index,
        leaves.get("b"),
        p.spec.name,
        list(p.spec.pack(values)),
        p.reduction,
        backend,
        p.rows.dtype,
        True,
        "columns" in leaves,
        "b" in leaves,
    )


@each_fused
@each_loss
@each_form
def test_opcheck_forward(
    target: Target, spec: LossSpec, columns: int | None, reduction: str
) -> None:
    p = problem(spec, target.device, rows=5, columns=columns, reduction=reduction, labels="ignored")
    arguments = _operator_arguments(p, target.backend)
    torch.library.opcheck(torch.ops.unitsface.similarity_loss.default, arguments)


@each_fused
@each_loss
@each_form
def test_opcheck_backward(
    target: Target, spec: LossSpec, columns: int | None, reduction: str
) -> None:
    p = problem(spec, target.device, rows=5, columns=columns, reduction=reduction, labels="ignored")
    arguments = [
        a.detach() if isinstance(a, Tensor) else a for a in _operator_arguments(p, target.backend)
    ]
    _, *saved = torch.ops.unitsface.similarity_loss(*arguments)
    torch.library.opcheck(
        torch.ops.unitsface.similarity_loss_backward.default, (p.upstream, *saved, *arguments)
    )


@each_fused
@each_class_loss
def test_opcheck_sampled_classes(target: Target, spec: LossSpec) -> None:
    p = problem(spec, target.device, rows=5, columns=9, subset=True)
    arguments = _operator_arguments(p, target.backend)
    torch.library.opcheck(torch.ops.unitsface.similarity_loss.default, arguments)


# --- torch.compile --------------------------------------------------------------------------------


def _check_compiled(p: Problem, backend: str, compiler: str, **options) -> None:
    loss, gradients = p.evaluate(backend)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=compiler, **options)
    def step(leaves: dict[str, Tensor]) -> Tensor:
        # Something of the user's on either side of the loss.
        return 2.0 * p.loss(backend, **{**leaves, "rows": leaves["rows"] * 3.0})

    leaves = p.leaves()
    compiled = step(leaves)
    compiled.backward(p.upstream)
    check_same("loss", compiled.detach(), 2.0 * loss, SAME_LOSS)
    for name, leaf in leaves.items():
        check_same(name, leaf.grad, 2.0 * gradients[name], SAME_GRADIENT)


@each_target
@each_loss
@each_form
def test_compile(target: Target, spec: LossSpec, columns: int | None, reduction: str) -> None:
    p = problem(spec, target.device, rows=9, columns=columns, reduction=reduction, labels="ignored")
    _check_compiled(p, target.backend, "aot_eager")


@each_target
@each_loss
def test_compile_of_any_batch_size(target: Target, spec: LossSpec) -> None:
    """One graph for every N, without a recompilation that specialises."""
    torch.compiler.reset()
    count = 0

    def counting(module, example_inputs):
        nonlocal count
        count += 1
        return module.forward

    @torch.compile(fullgraph=True, backend=counting, dynamic=True)
    def step(rows: Tensor, labels: Tensor) -> Tensor:
        return p.loss(target.backend, rows=rows, labels=labels)

    for rows in (5, 8, 9):
        p = problem(spec, target.device, rows=rows)
        check_same("loss", step(p.rows, p.labels), p.loss(target.backend), SAME_LOSS)
    assert count == 1


@each_target
@each_loss
def test_compile_of_changing_numbers(target: Target, spec: LossSpec) -> None:
    """A schedule of the scale or of a fixed threshold makes them symbolic when recompiled."""
    p = problem(spec, target.device, rows=5)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def step(scale: float, b: float) -> Tensor:
        changes = {} if spec.threshold == "none" else {"b": b}
        return p.loss(target.backend, values={"scale": scale}, **changes)

    for scale, b in ((8.0, 1.5), (9.0, 2.5), (10.5, -1.0)):
        want = p.loss(target.backend, values={"scale": scale}, b=b)
        check_same("loss", step(scale, b), want, SAME_LOSS)


@each_loss
@pytest.mark.parametrize(
    "target", [target for target in TARGETS if not target.interpreted], ids=str
)
def test_compile_with_inductor(target: Target, spec: LossSpec) -> None:
    if target.backend == "reference":
        pytest.skip("that would test PyTorch")
    p = problem(spec, target.device, rows=9, columns=6)
    _check_compiled(p, target.backend, "inductor")


@each_target
def test_compile_of_modules(target: Target) -> None:
    module = _unitsface(target.backend).to(target.device)
    feats = torch.randn(9, 8, device=target.device, requires_grad=True)
    labels = torch.arange(9, device=target.device) % 4
    module(feats, labels).backward()
    want = [feats.grad, *(p.grad for p in module.parameters())]
    for leaf in (feats, *module.parameters()):
        leaf.grad = None
    torch.compiler.reset()
    torch.compile(module, fullgraph=True, backend="aot_eager")(feats, labels).backward()
    for i, leaf in enumerate((feats, *module.parameters())):
        check_same(f"gradient {i}", leaf.grad, want[i], SAME_GRADIENT)


# --- autocast -------------------------------------------------------------------------------------


@each_target
@each_loss
def test_autocast(target: Target, spec: LossSpec) -> None:
    """The features of a model under autocast are bfloat16, its parameters float32."""
    p = problem(spec, target.device, rows=9, columns=6, values={"scale": 8.0})
    layer = nn.Linear(p.rows.shape[1], 16, device=target.device)
    project = torch.randn(p.rows.shape[1], 16, device=target.device)
    columns = (p.columns @ project).requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast(target.device, torch.bfloat16, enabled=enabled):
            feats = layer(p.rows)
            assert feats.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = p.loss(target.backend, rows=feats, columns=columns)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, [columns, *layer.parameters()])))
    check_same("loss", results[1][0].detach(), results[0][0].detach(), AUTOCAST_LOSS)
    for want, got in zip(results[0][1:], results[1][1:], strict=True):
        assert got.dtype == torch.float32
        check_same("gradient", got, want, AUTOCAST_GRADIENT)


# --- torch.func -----------------------------------------------------------------------------------


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


def _forward_mode(function, x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        result = function(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(result).tangent


@each_fused
@each_loss
@pytest.mark.parametrize("transform", [*TRANSFORMS, "forward mode"])
def test_transforms_are_refused(target: Target, spec: LossSpec, transform: str) -> None:
    """Not silently without a gradient, as an operator without rules for them would be."""
    p = problem(spec, target.device, rows=5, columns=6)

    def function(rows: Tensor) -> Tensor:
        return p.loss(target.backend, rows=rows)

    apply = TRANSFORMS.get(transform, _forward_mode)
    with pytest.raises(RuntimeError, match=r"torch\.func .*backend=\"reference\""):
        apply(function, p.rows)
    # Plain calls work again afterwards.
    assert bool(function(p.rows).isfinite())


@each_loss
def test_transforms_of_the_reference(spec: LossSpec) -> None:
    p = problem(spec, rows=5, columns=6)

    def function(rows: Tensor) -> Tensor:
        return p.loss("reference", rows=rows)

    gradient = p.evaluate("reference")[1]["rows"] / p.upstream
    check_same("grad", TRANSFORMS["grad"](function, p.rows), gradient, SAME_GRADIENT)
    want = torch.stack([function(p.rows), function(2 * p.rows)])
    check_same("vmap", TRANSFORMS["vmap"](function, p.rows), want, SAME_LOSS)
    along = _forward_mode(function, p.rows)
    assert along is not None
    check_same("forward mode", along, gradient.sum(), SAME_GRADIENT)


# --- processes ------------------------------------------------------------------------------------


def _unitsface(backend: str) -> UniTSFaceLoss:
    torch.manual_seed(3)
    class_loss = CLASS_LOSSES["cosface"](8, 4, scale=8.0, backend=backend)
    return UniTSFaceLoss(class_loss, PAIR_LOSSES["uss"](scale=8.0, backend=backend))


class _Model(nn.Module):
    """A layer and its losses in one module, as data parallelism wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = _unitsface("auto")
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.layer(x), labels)


def _share(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5 + rank, 6, generator=generator)
    return x, torch.randint(0, 4, (5 + rank,), generator=generator)


def _worker(rank: int, port: int, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_Model())
    model(*_share(rank)).backward()
    queue.put({name: p.grad.tolist() for name, p in model.module.named_parameters()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_data_parallel_gradients_are_averages() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(90)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
    found = [queue.get() for _ in workers]
    model = _Model()
    sum(model(*_share(rank)) / 2 for rank in range(2)).backward()
    for name, parameter in model.named_parameters():
        for gradients in found:
            check_same(name, torch.tensor(gradients[name]), parameter.grad, SAME_GRADIENT)


# --- modules --------------------------------------------------------------------------------------

MODULES = {
    **{name: lambda c=c: c(8, 4, scale=9.0) for name, c in CLASS_LOSSES.items()},
    **{name: lambda c=c: c(scale=9.0, init_threshold=2.0) for name, c in PAIR_LOSSES.items()},
    "unitsface": lambda: _unitsface("auto"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_copy_and_pickle(name: str) -> None:
    module = MODULES[name]()
    feats, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, -1])
    want = module(feats, labels)
    assert want.shape == ()
    assert float(want.detach()) > 0
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = MODULES[name]()
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 0.5)
    assert not torch.equal(fresh(feats, labels), want)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(feats, labels), want)
        assert [k for k, _ in other.named_parameters()] == [k for k, _ in module.named_parameters()]
        assert repr(other) == repr(module)
        assert "scale=" in repr(module)


@pytest.mark.parametrize("name", MODULES)
def test_modules_train(name: str) -> None:
    """Every parameter gets a gradient, and following it lowers the loss."""
    module = MODULES[name]()
    feats, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = module(feats, labels)
        loss.backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in module.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@each_target
def test_modules_are_their_functions(target: Target) -> None:
    feats = torch.randn(6, 8, device=target.device)
    labels = torch.tensor([0, 1, 2, 3, 0, -1], device=target.device)
    presets = {
        "normface": {"m1": 1.0, "m2": 0.0, "m3": 0.0},
        "cosface": {"m1": 1.0, "m2": 0.0, "m3": 0.3},
        "arcface": {"m1": 1.0, "m2": 0.3, "m3": 0.0},
        "sphereface": {"m1": 1.3, "m2": 0.0, "m3": 0.0},
    }
    assert presets.keys() == CLASS_LOSSES.keys()
    margins = {"cosface": 0.3, "arcface": 0.3, "sphereface": 1.3}
    for name, values in presets.items():
        margin = {"margin": margins[name]} if name in margins else {}
        module = CLASS_LOSSES[name](8, 4, scale=9.0, **margin, backend=target.backend)
        module = module.to(target.device)
        want = unitsface_kernels.fused_margin_softmax_loss(
            feats, module.weight, labels, scale=9.0, **values, backend=target.backend
        )
        assert torch.equal(module(feats, labels), want)
    memory = torch.randn(5, 8, device=target.device)
    memory_labels = torch.tensor([0, 1, 2, -1, 3], device=target.device)
    module = PAIR_LOSSES["uss"](9.0, 0.2, 1.5, reduction="sum", backend=target.backend)
    module = module.to(target.device)
    options = {"scale": 9.0, "margin": 0.2, "reduction": "sum", "backend": target.backend}
    for given in ({}, {"memory": memory, "memory_labels": memory_labels}):
        want = unitsface_kernels.fused_uss_loss(feats, labels, 1.5, **options, **given)
        assert torch.equal(module(feats, labels, **given), want)
        both = UniTSFaceLoss(CLASS_LOSSES["cosface"](8, 4).to(target.device), module)
        total = both.class_loss(feats, labels) + want
        assert torch.equal(both(feats, labels, **given), total)
