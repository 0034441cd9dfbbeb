"""From a public function to the backend that runs it; the same for every loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import autograd, dispatch, ops, validate
from ..backends import reference
from ..losses import LossSpec


def pair_loss(
    spec: LossSpec,
    values: dict[str, float | str],
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor | None,
    memory: Tensor | None,
    memory_labels: Tensor | None,
    batch_offset: int | None,
    reduction: str,
    backend: str,
    skip_tolerance: float = 0.0,
) -> Tensor:
    identities = check_pairs(spec, feats, labels, b, memory, memory_labels, batch_offset)
    columns = (memory, memory_labels, None, batch_offset if memory is not None else 0)
    return _similarity_loss(
        spec,
        values,
        feats,
        labels,
        columns,
        b,
        identities,
        reduction,
        backend,
        skip_tolerance,
    )


def check_pairs(
    spec: LossSpec,
    feats: Tensor,
    labels: Tensor,
    b: float | Tensor | None,
    memory: Tensor | None,
    memory_labels: Tensor | None,
    batch_offset: int | None,
) -> int | None:
    """How many identities have a threshold of their own; None: their number does not matter."""
    validate.features("feats", feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    validate.memory_pair(memory, memory_labels, batch_offset)
    if memory is not None and memory_labels is not None:
        validate.features("memory", memory, like=feats)
        validate.labels("memory_labels", memory_labels, memory.shape[0], feats, counted="memory")
    if spec.threshold != "per_column":
        return None
    validate.threshold("b", b, feats, per="identity")
    return b.shape[0] if isinstance(b, Tensor) else None


def class_loss(
    spec: LossSpec,
    values: dict[str, float | str],
    feats: Tensor,
    weight: Tensor,
    labels: Tensor,
    b: float | Tensor | None,
    class_index: Tensor | None,
    reduction: str,
    backend: str,
    skip_tolerance: float = 0.0,
) -> Tensor:
    validate.features("feats", feats)
    validate.features("weight", weight, like=feats)
    validate.labels("labels", labels, feats.shape[0], feats)
    if class_index is not None:
        validate.class_index("class_index", class_index, weight)
    if spec.threshold == "per_column":
        validate.threshold("b", b, feats, per="class", size=weight.shape[0])
    columns = (weight, None, class_index, None)
    return _similarity_loss(
        spec, values, feats, labels, columns, b, None, reduction, backend, skip_tolerance
    )


def _similarity_loss(
    spec, values, feats, labels, column_arguments, b, identities, reduction, backend, skip_tolerance
) -> Tensor:
    columns, column_labels, column_index, self_offset = column_arguments
    backend, params = check_settings(spec, values, feats, b, reduction, backend, skip_tolerance)
    # torch.compile cannot branch on data; there the operator itself guards its memory accesses.
    if not torch.compiler.is_compiling():
        validate.call_labels(spec, labels, columns, column_labels, column_index, identities)
    threshold = threshold_of_columns(spec, b, feats, labels, columns, column_labels, column_index)
    if backend == "reference":
        return reference.similarity_loss(
            spec,
            params,
            feats,
            labels,
            columns,
            column_labels,
            column_index,
            self_offset,
            threshold,
            reduction,
        )
    refuse_transforms(feats, columns, threshold)
    differentiable = torch.is_grad_enabled()

    def needed(tensor: Tensor | None) -> bool:
        return differentiable and tensor is not None and tensor.requires_grad

    arguments = (
        feats,
        labels,
        columns,
        column_labels,
        column_index,
        self_offset,
        threshold,
        spec.name,
        list(params),
        reduction,
        backend,
        product_dtype(feats),
        float(skip_tolerance),
        needed(feats),
        needed(columns),
        needed(threshold),
    )
    if autograd.applies(feats, columns, threshold):
        return autograd.similarity_loss(*arguments)
    return ops.similarity_loss(*arguments)[0]


def check_settings(
    spec: LossSpec,
    values: dict[str, float | str],
    feats: Tensor,
    b: float | Tensor | None,
    reduction: str,
    backend: str,
    skip_tolerance: float,
) -> tuple[str, tuple[float, ...]]:
    """The backend that runs a call, and the parameters as kernels receive them."""
    validate.parameters(spec, values)
    validate.choice("reduction", reduction, validate.REDUCTIONS)
    validate.number("skip_tolerance", skip_tolerance, at_least=0.0)
    if spec.threshold == "scalar":
        validate.threshold("b", b, feats)
    return dispatch.resolve(backend, feats.device, feats.dtype), spec.pack(values)


def product_dtype(feats: Tensor) -> torch.dtype:
    """Of the operands of matrix products."""
    device_type = feats.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return feats.dtype


def threshold_of_columns(
    spec: LossSpec,
    b: float | Tensor | None,
    feats: Tensor,
    labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
) -> Tensor | None:
    """The threshold as operators take it: one number, or one per column."""
    if b is None:
        return None
    if spec.threshold == "scalar":
        if isinstance(b, Tensor):
            # Of any rank: what it is broadcast against must keep its own.
            return b.reshape(())
        return torch.full((), float(b), dtype=torch.float32, device=feats.device)
    if not isinstance(b, Tensor):
        # Without columns these are the batch, whose labels may be those of all ranks.
        identity = labels if column_labels is None else column_labels
        count = (identity if columns is None else columns).shape[0]
        if column_index is not None:
            count = column_index.shape[0]
        return torch.full((count,), float(b), dtype=torch.float32, device=feats.device)
    # Indexing, whose backward pass is deterministic on every device.
    if spec.topology == "class":
        return b if column_index is None else b[column_index.to(torch.int64)]
    identity = labels if column_labels is None else column_labels
    # The backward pass adds up an identity's samples: not in half precision.
    wide = b.to(torch.promote_types(b.dtype, torch.float32))
    if wide.shape[0] == 0:
        # No identity: every label is -1.
        wide = torch.cat([wide, wide.new_zeros(1)])
    # Also where the error for a label out of range comes later, see ``validate.in_range``.
    return wide[identity.to(torch.int64).clamp(0, wide.shape[0] - 1)]


def refuse_transforms(*tensors: Tensor | None) -> None:
    """torch.func and forward-mode tangents would be dropped silently by the operator."""
    if torch.compiler.is_compiling():
        return
    dual = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "fused losses run neither under torch.func transforms (grad, vmap, jvp, ...) nor "
            'with forward-mode differentiation; use backend="reference" for those'
        )
