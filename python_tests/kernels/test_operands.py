"""Operands of kernels: dense memory of the length that is read, for tensors of any layout."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature

import pytest
import torch
from support.cases import problem
from support.grid import calls
from support.helpers import TARGETS, Target
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels.backends.native import loader
from unitsface_kernels.backends.streaming import filtering, logsumexp
from unitsface_kernels.losses import REGISTRY, LossSpec


def _stepped(x: Tensor) -> Tensor:
    held = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77, dtype=x.dtype, device=x.device)
    held[..., ::2] = x
    return held[..., ::2]


def _negated(x: Tensor) -> Tensor:
    """As the imaginary part of a conjugate is: negative in memory."""
    return torch._neg_view(-x) if x.is_floating_point() else x


def _from_bytes(x: Tensor) -> Tensor:
    """Not aligned to its elements, as behind a header of odd length."""
    values = x.contiguous().view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(b"\x77") + values.tobytes(), dtype=x.dtype, offset=1).view(
        x.shape
    )


LAYOUTS = {"stepped": _stepped, "negated": _negated, "from bytes": _from_bytes}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "spec"), calls(TARGETS, of_operator=True))
def test_layouts_do_not_matter(target: Target, spec: LossSpec, layout: str) -> None:
    """Bit for bit: what is not dense is copied, every tensor of a call."""
    if layout == "from bytes" and target.device != "cpu":
        pytest.skip("memory of the host")
    lay = LAYOUTS[layout]
    p = problem(spec, target.device, rows=9, columns=13, dim=20)
    p.index = torch.randperm(13, device=target.device)[:11] if spec.topology == "class" else None
    p.labels = p.labels % 11
    loss, gradients = p.evaluate(target.backend)
    moved = replace(p)
    for name in ("rows", "labels", "columns", "column_labels", "index", "b"):
        value = getattr(p, name)
        if isinstance(value, Tensor) and value.dim():
            setattr(moved, name, lay(value))

    # Leaves keep the layout, where Problem.leaves copies the threshold.
    leaves = {n: getattr(moved, n).detach().requires_grad_() for n in gradients}
    again = moved.loss(target.backend, **leaves)
    again.backward(p.upstream.to(again.dtype))
    assert torch.equal(again.detach(), loss)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, gradients[name]), name


@pytest.mark.parametrize("backend", sorted({t.backend for t in TARGETS}))
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
def test_one_threshold_of_any_rank(backend: str, shape: tuple[int, ...]) -> None:
    x, w, y = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 1, 2, -1])
    want = uk.fused_uce_loss(x, w, y, torch.tensor(5.0), backend=backend)
    b = torch.full(shape, 5.0, requires_grad=True)
    got = uk.fused_uce_loss(x, w, y, b, backend=backend)
    got.backward()
    assert torch.equal(got, want)
    assert b.grad is not None
    assert b.grad.shape == shape


# --- empty dimensions -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("target", "spec"), calls(TARGETS, of_operator=True))
def test_nothing_to_compare_with(
    target: Target, spec: LossSpec, reduction: str, dtype: torch.dtype
) -> None:
    """Without columns or rows, whatever is left out by tolerance or by place."""
    if target.interpreted and (dtype, reduction) != (torch.float32, "mean"):
        pytest.skip("milliseconds per launch")
    for rows, columns in ((5, 0), (0, 0), (0, 6)):
        p = problem(
            spec, target.device, rows=rows, columns=columns, labels="all ignored", dim=20,
            reduction=reduction,
        )  # fmt: skip
        if spec.topology == "pair":
            p.labels = torch.zeros_like(p.labels)
        p = p.converted(dtype)
        if isinstance(p.b, Tensor) and p.b.dim() and spec.topology == "class":
            p.b = p.b[:columns]
        more = [{}]
        function = getattr(uk, spec.function)
        if spec.reduction != "nearest" and "skip_tolerance" in signature(function).parameters:
            more.append({"skip_tolerance": 1e-4})
        if spec.topology == "pair":
            offsets = (0, 2**63 - 1) if target.interpreted else (0, -3, 2**63 - 1, -(2**63))
            more += [{"batch_offset": offset} for offset in offsets]
        for values in more:
            q = replace(p, values={**p.values, **values})
            loss, gradients = q.evaluate(target.backend)
            want, wanted = replace(q, rows=q.rows.float(), columns=q.columns.float()).evaluate(
                "reference"
            )
            assert torch.equal(loss, want), (values, loss, want)
            for name, gradient in gradients.items():
                assert torch.equal(gradient.float(), wanted[name].float()), (values, name)


def test_no_class_is_sampled() -> None:
    x, y = torch.randn(5, 8, requires_grad=True), torch.full((5,), -1)
    w = torch.randn(5, 8, requires_grad=True)
    for backend in {t.backend for t in TARGETS if t.device == "cpu"}:
        loss = uk.fused_uce_loss(
            x, w, y, 5.0, class_index=y[:0], skip_tolerance=1e-4, backend=backend
        )
        loss.backward()
        assert not w.grad.any()


def test_no_identity_has_a_threshold() -> None:
    x, y = torch.randn(5, 8, requires_grad=True), torch.full((5,), -1)
    for backend in ("native", "reference"):
        b = torch.zeros(0, requires_grad=True)
        loss = uk.fused_pair_bce_loss(x, y, b, backend=backend)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert b.grad.shape == (0,)


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.skipif(not [t for t in TARGETS if t.backend == "triton"], reason="needs Triton")
def test_chosen_rows_keep_their_padding() -> None:
    """A second pass over few rows; Triton's matmuls read each up to a multiple of 64."""
    for width in (20, 64, 100):
        w, y = torch.randn(24, width), torch.arange(8)
        x = torch.randn(8, width)
        x[1:] = 50 * w[1:8]  # learned: only row 0 is left
        seen = []

        def spied(needed: Tensor, seen=seen):
            seen.extend(needed.sum(dim=1).tolist())
            return filtering.selections(needed)

        x.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logsumexp, "selections", spied)
            loss = uk.fused_margin_softmax_loss(
                x, w, y, scale=30.0, m3=0.0, backend="triton", skip_tolerance=1e-3
            )
            loss.backward()
        assert seen == [1]
        assert bool(x.grad.isfinite().all())


def _vectors() -> dict[str, dict[str, Tensor]]:
    """Operands of a tile of 3 x 5, or of 3 rows of 5, by argument type."""
    n, m, labels = 3, 5, torch.int32
    tile = {"cosines": torch.zeros(n, m)}
    sides = {"a_labels": torch.zeros(n, dtype=labels), "b_labels": torch.zeros(m, dtype=labels)}

    def both(*names: str) -> dict[str, Tensor]:
        sizes = {"a": n, "b": m}
        return {f"{s}_{name}": torch.zeros(k) for s, k in sizes.items() for name in names}

    def double(**given: int) -> dict[str, Tensor]:
        return {name: torch.zeros(k, dtype=torch.float64) for name, k in given.items()}

    sums = double(a_loss=n, b_loss=m)
    gradient = {"gradient": torch.zeros(n, m)}
    targets = {"targets": torch.zeros(n, dtype=torch.int64)}
    rows = {name: torch.zeros(n) for name in ("maximum", "total", "target_cosine")}
    weights = ("log_negatives", "negative_weight", "target_gradient")
    matrix, index = torch.zeros(4, m), torch.zeros(n, dtype=torch.int64)
    return {
        "CpuSumTile": tile | sides | sums | gradient | both("weights")
        | {"b_threshold": torch.zeros(1)} | double(b_dthreshold=1),
        "CpuSumTile per column": tile | sides | sums | gradient | both("threshold")
        | double(a_dthreshold=n, b_dthreshold=m),
        "LogsumexpTile": tile | targets | rows,
        "LogsumexpGradientTile": tile | targets | gradient
        | {name: torch.zeros(n) for name in weights},
        "NearestTile": tile | targets | {"target_cosine": torch.zeros(n)}
        | {"best": torch.zeros(n, 2), "position": torch.zeros(n, 2, dtype=torch.int32)},
        "CpuHistogramTile": tile | sides | {"counts": torch.zeros(2, 4 + 3, dtype=torch.int64)},
        "CpuPairNegatives": tile | sides | both("maximum", "total"),
        "CpuPairPositives": tile | sides | both("log_negatives", "loss", "negative_prob"),
        "CpuPairGradient": tile | sides | gradient
        | both("log_negatives", "negative_weight", "positive_weight"),
        "NormalizeRows": {"source": matrix, "index": index, "unit": torch.zeros(n, m)}
        | {"inverse_norms": torch.zeros(n)},
        "NormalizeRowsBackward": {"source": matrix, "index": index, "d_unit": torch.zeros(n, m)}
        | {"inverse_norms": torch.zeros(n), "out": torch.zeros(n, m), "scale": torch.zeros(1)},
        "UpdateRows": {"weight": matrix, "gradient": torch.zeros(n, m), "index": index}
        | {"gradient_scale": torch.zeros(1), "first": matrix, "second": matrix},
        "Permuted": {"classes": index, "positives": index, "out": index},
    }  # fmt: skip


@pytest.mark.parametrize("name", _vectors() if loader.failure() is None else [])
def test_the_extension_refuses_short_vectors(name: str) -> None:
    vectors = _vectors()[name]
    kind = name.split()[0]
    sizes = {"n": 3, "d": 5, "rows": 4} if "Rows" in kind else {"n": 3, "m": 5, "stride": 5}
    if kind == "Permuted":
        sizes = {"n": 3, "m": 3, "size": 9, "key": 1}
    if kind == "NearestTile":
        sizes["k"] = 2
    if kind == "CpuHistogramTile":
        sizes |= {"bins": 4, "slots": 7}
    if name.endswith("per column"):
        sizes["per_column"] = True
    make = getattr(loader.extension(), kind)
    make(**sizes, **vectors)
    spans = {field: (tensor.data_ptr(), tensor.nbytes) for field, tensor in vectors.items()}
    make(**sizes, **spans)
    for field, (where, size) in spans.items():
        with pytest.raises(ValueError, match=f"^{field} has {size - 1} bytes of {size}$"):
            make(**sizes, **spans | {field: (where, size - 1)})
        short = vectors[field].flatten()[:-1]
        if len(short):  # an empty one is none
            with pytest.raises(ValueError, match=f"^{field} has {short.nbytes} bytes of {size}$"):
                make(**sizes, **vectors | {field: short})
        sparse = torch.zeros(size, 2)[:, 0]
        with pytest.raises(ValueError, match="not dense"):
            make(**sizes, **vectors | {field: sparse})
        with pytest.raises(TypeError, match="a tensor, or an address and a size"):
            make(**sizes, **vectors | {field: where})
    with pytest.raises(TypeError, match="no field"):
        make(**sizes, **spans, other=1)


def test_the_extension_refuses_rows_that_are_none() -> None:
    native = loader.extension()
    matrix, unit, norms = torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(2)
    held = {"source": matrix, "unit": unit, "inverse_norms": norms}
    for bad in (4, -1):
        index = torch.tensor([0, bad])
        rows = native.NormalizeRows(**held, index=index, n=2, d=5, rows=4)
        with pytest.raises(ValueError, match=f"index must be in .0, 4., got {bad}"):
            native.cpu.normalize_rows(rows, 1)
    with pytest.raises(ValueError, match="outside the source"):
        native.NormalizeRows(**held, start=3, n=2, d=5, rows=4)


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_the_operator_refuses_shapes_that_do_not_fit(spec: LossSpec) -> None:
    """It can be called by its name, without the functions' checks."""
    p = problem(spec, rows=6, columns=7)
    params = list(spec.pack(spec.defaults()))
    index = torch.arange(7) if spec.topology == "class" else None
    b = p.b
    if spec.threshold == "per_column":
        b = torch.zeros(7)
    tensors = [p.rows, p.labels, p.columns, p.column_labels, index, None, b]
    given = torch.cat(list(p.variables.values())) if p.variables else None
    static = (spec.name, params, "mean", "native", torch.float32, 0.0, False, False, False, given)
    torch.ops.unitsface.similarity_loss(*tensors, *static)
    with pytest.raises(ValueError, match="params must have"):
        torch.ops.unitsface.similarity_loss(*tensors, spec.name, [*params, 1.0], *static[2:])
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or place == 4:
            continue
        for wrong in (torch.cat([tensor.reshape(-1)] * 2), tensor[None]):
            if tensor is b and wrong.numel() == b.numel():
                continue  # of any rank
            changed = [*tensors[:place], wrong, *tensors[place + 1 :]]
            with pytest.raises(ValueError, match="must"):
                torch.ops.unitsface.similarity_loss(*changed, *static)
