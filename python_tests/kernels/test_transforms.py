"""The operators under PyTorch's transformations: opcheck, compile, autocast, torch.func."""

from __future__ import annotations

import pytest
import torch
from support.cases import Problem, problem
from support.grid import calls, extended_if, representatives
from support.helpers import FUSED, TARGETS, Target
from support.tolerances import (
    AUTOCAST_GRADIENT,
    AUTOCAST_LOSS,
    SAME_GRADIENT,
    SAME_LOSS,
    check_same,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

from unitsface_kernels.backends.streaming import CallTensors
from unitsface_kernels.functional.variables import packed
from unitsface_kernels.losses import REGISTRY, LossSpec

each_loss = pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
each_call = pytest.mark.parametrize(("target", "spec"), calls(TARGETS))
each_fused_call = pytest.mark.parametrize(("target", "spec"), calls(FUSED, of_operator=True))
each_fused_class_call = pytest.mark.parametrize(
    ("target", "spec"), calls(FUSED, [s for s in REGISTRY.values() if s.topology == "class"])
)


def _guards() -> list:
    """Calls whose graphs have guards or symbols of their own: an eager formula has those of its
    loss; of the operator, which is one for all, a loss of each driver and topology stands for the
    others, and of each topology on a compiled backend in ``make test``."""
    fused = calls(FUSED, representatives(REGISTRY.values()))
    first = {param.values[0]: set() for param in fused}
    found = []
    for param in fused:
        target, spec = param.values
        later = target.interpreted or spec.topology in first[target]
        first[target].add(spec.topology)
        found.append(pytest.param(target, spec, id=param.id, marks=extended_if(later)))
    return [*calls([t for t in TARGETS if t not in FUSED], of_operator=True), *found]


each_guarded_call = pytest.mark.parametrize(("target", "spec"), _guards())
# In the batch or against a few classes, and against columns; what a reduction changes is whether
# gradients are known in the forward pass.
FORMS = [(None, "mean"), (6, "none"), (None, "none"), (6, "sum")]


def _forms(targets: list[Target]) -> pytest.MarkDecorator:
    """The operator is one for all backends: the first two forms do where a call is slow."""
    return pytest.mark.parametrize(
        ("target", "spec", "columns", "reduction"),
        [
            pytest.param(
                *call.values,
                *form,
                id=f"{call.id}-{form[0]}-{form[1]}",
                marks=[*call.marks, *extended_if(form not in FORMS[:1])],
            )
            for call in calls(targets, of_operator=True)
            for form in (FORMS[:2] if call.values[0].interpreted else FORMS)
        ],
    )


each_compiled_form = _forms(TARGETS)
each_fused_form = _forms(FUSED)


# --- the operators --------------------------------------------------------------------------------


def _operator_arguments(p: Problem, backend: str) -> tuple:
    """The positional arguments that the public function passes on."""
    leaves = p.leaves()
    values = {**p.spec.defaults(), **p.values}
    threshold = leaves.get("b")
    if threshold is not None and p.spec.threshold == "per_column":
        columns = p.index
        if p.spec.topology == "pair":
            columns = (p.labels if p.column_labels is None else p.column_labels).clamp(min=0)
        if columns is not None:
            threshold = threshold.detach()[columns.long()].requires_grad_()
    tensors = CallTensors(p.rows, p.labels, p.columns, p.column_labels, p.index)
    variables = packed(p.spec, p.variables, tensors)
    return (
        leaves["rows"],
        p.labels,
        leaves.get("columns", p.columns),
        p.column_labels,
        p.index,
        0 if p.columns is None else None,
        threshold,
        p.spec.name,
        list(p.spec.pack(values)),
        p.reduction,
        backend,
        p.rows.dtype,
        0.0,
        True,
        "columns" in leaves,
        "b" in leaves,
        *(() if variables is None else (variables.requires_grad_(), True)),
    )


@each_fused_form
def test_opcheck_forward(
    target: Target, spec: LossSpec, columns: int | None, reduction: str
) -> None:
    p = problem(spec, target.device, rows=5, columns=columns, reduction=reduction, labels="ignored")
    arguments = _operator_arguments(p, target.backend)
    torch.library.opcheck(torch.ops.unitsface.similarity_loss.default, arguments)


@each_fused_form
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


@each_fused_class_call
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


@each_compiled_form
def test_compile(target: Target, spec: LossSpec, columns: int | None, reduction: str) -> None:
    p = problem(spec, target.device, rows=9, columns=columns, reduction=reduction, labels="ignored")
    _check_compiled(p, target.backend, "aot_eager")


@each_guarded_call
def test_compile_of_any_batch_size(target: Target, spec: LossSpec) -> None:
    """One graph for every N, without a recompilation that specializes."""
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


@each_guarded_call
def test_compile_of_changing_numbers(target: Target, spec: LossSpec) -> None:
    """A schedule of a parameter or of a fixed threshold makes them symbolic when recompiled."""
    if not spec.parameters:
        pytest.skip("no number")
    # Whatever the first parameter of the loss is.
    parameter = spec.parameters[0].name
    p = problem(spec, target.device, rows=5)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def step(value: float, b: float) -> Tensor:
        changes = {} if spec.threshold == "none" else {"b": b}
        return p.loss(target.backend, values={parameter: value}, **changes)

    for value, b in ((8.0, 1.5), (9.0, 2.5), (10.5, -1.0)):
        want = p.loss(target.backend, values={parameter: value}, b=b)
        check_same("loss", step(value, b), want, SAME_LOSS)


@pytest.mark.parametrize("target", [t for t in FUSED if not t.interpreted], ids=str)
@pytest.mark.parametrize(
    ("spec", "compiler"),
    [
        # What Inductor compiles but its kernels, whose compilation takes half a minute.
        pytest.param(REGISTRY["uss"], "aot_eager_decomp_partition", id="without kernels"),
        *(
            pytest.param(spec, "inductor", id=spec.name, marks=pytest.mark.extended)
            for spec in representatives(REGISTRY.values())
        ),
    ],
)
def test_compile_with_inductor(target: Target, spec: LossSpec, compiler: str) -> None:
    p = problem(spec, target.device, rows=9, columns=6)
    _check_compiled(p, target.backend, compiler)


# --- autocast -------------------------------------------------------------------------------------


@each_call
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


@each_fused_call
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
