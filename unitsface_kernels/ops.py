"""The fused operator: schema, fake implementation and autograd, once for all backends.

It is what ``torch.compile`` and dispatch modes see; plain eager calls take the shorter way of
``autograd.py``. ``unitsface::similarity_loss`` computes the loss and whatever gradients its
reduction yields in the same pass; ``unitsface::similarity_loss_backward`` scales those or computes
the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, validate
from .backends import streaming
from .backends.streaming import Call, Gradients, Result, make_call
from .losses import REGISTRY


def forward_has_gradients(loss: str, reduction: str) -> bool:
    """A pair's gradient in a ``sum`` loss needs only that pair, so the forward pass yields it.

    With ``reduction="none"`` the rows' weights are known in the backward pass only.
    """
    return REGISTRY[loss].reduction == "sum" and reduction != "none"


def rows_alone(columns: Tensor | None, need_columns: bool) -> bool:
    """Whether the rows are the only features with a gradient: against a memory, most of all.

    A row's gradient is then that of its own loss, which an upstream gradient scales, and the
    forward pass can compute it. So nothing of the columns is kept for the backward pass, and they
    may change before it.
    """
    return columns is not None and not need_columns


def forward_knows(
    loss: str, reduction: str, columns: Tensor | None, need_columns: bool, need_threshold: bool
) -> bool:
    """Whether every gradient is known after the forward pass, but for its scale."""
    if not rows_alone(columns, need_columns):
        return forward_has_gradients(loss, reduction)
    # One threshold for all rows would need every row's share.
    return reduction != "none" or not need_threshold


def forward(call: Call, backend: str) -> tuple[Result, bool]:
    """A result, and whether it holds the gradients, for an upstream gradient of ones."""
    known = call.need_any and forward_knows(
        call.spec.name, call.reduction, call.columns, call.need_columns, call.need_threshold
    )
    at_once = known and call.spec.reduction == "sum"
    result = dispatch.load(backend).forward(call, gradients=at_once)
    if known and not at_once:
        assert result.state is not None
        ones = torch.ones_like(result.loss)
        result.gradients = computed_gradients(call, backend, result.state, ones)
    return result, known


def saved_columns(
    known: bool,
    loss: str,
    columns: Tensor | None,
    column_labels: Tensor | None,
    need_columns: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Columns and their labels as the backward pass gets them, safe from updates of a memory."""
    if columns is None or need_columns:
        return columns, column_labels
    if known:
        return None, None
    if REGISTRY[loss].topology == "class":
        return columns, column_labels
    return columns.clone(), None if column_labels is None else column_labels.clone()


def times(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """A gradient of the rows or the threshold for the upstream gradient () or (N,) of the loss."""
    return gradient * (grad_loss if grad_loss.dim() == 0 else grad_loss[:, None])


def computed_gradients(call: Call, backend: str, state: Tensor, grad_loss: Tensor) -> Gradients:
    """Gradients that the forward pass did not know, for the upstream gradient of the loss."""
    return dispatch.load(backend).backward(call, state, row_weights(call, grad_loss))


def row_weights(call: Call, grad_loss: Tensor) -> Tensor:
    """(N,) float32 upstream gradients of the rows' losses, from that of the loss."""
    weights = grad_loss.to(torch.float32).expand(call.rows.shape[0])
    if call.reduction == "mean":
        weights = weights / call.counted()
    return weights.contiguous()


@torch.library.custom_op("unitsface::similarity_loss", mutates_args=())
def similarity_loss(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
    self_offset: int | None,
    threshold: Tensor | None,
    loss: str,
    params: list[float],
    reduction: str,
    backend: str,
    compute_dtype: torch.dtype,
    skip_tolerance: float,
    need_rows: bool,
    need_columns: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, state for the backward pass, and gradients (empty where not needed or not yet known).

    The arguments are those of :class:`Call`; ``backend`` is "native" or "triton".
    """
    validate.call_labels(
        REGISTRY[loss], row_labels, columns, column_labels, column_index, lowest=-2
    )
    result, _ = forward(
        make_call(
            rows,
            row_labels,
            columns,
            column_labels,
            column_index,
            self_offset,
            threshold,
            loss,
            params,
            reduction,
            compute_dtype,
            skip_tolerance,
            need_rows,
            need_columns,
            need_threshold,
        ),
        backend,
    )
    state, d_rows, d_columns, d_threshold = _tensors(rows, result.state, *result.gradients)
    return result.loss, state, d_rows, d_columns, d_threshold


def _tensors(like: Tensor, *optional: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns no None: an empty tensor, each its own, stands for it."""
    return tuple(like.new_empty(0, dtype=torch.float32) if t is None else t for t in optional)


@similarity_loss.register_fake
def _(
    rows,
    row_labels,
    columns,
    column_labels,
    column_index,
    self_offset,
    threshold,
    loss,
    params,
    reduction,
    backend,
    compute_dtype,
    skip_tolerance,
    need_rows,
    need_columns,
    need_threshold,
):
    def f32(*shape):
        return rows.new_empty(shape, dtype=torch.float32)

    with_gradients = forward_knows(loss, reduction, columns, need_columns, need_threshold)
    value = f32(rows.shape[0]) if reduction == "none" else f32()
    kept = streaming.state_rows(REGISTRY[loss], tuple(params))
    state = f32(kept, rows.shape[0]) if kept else f32(0)
    d_rows, d_columns, d_threshold = _gradient_shapes(rows, columns, column_index, threshold)
    return (
        value,
        state,
        f32(*d_rows) if with_gradients and need_rows else f32(0),
        f32(*d_columns) if with_gradients and need_columns else f32(0),
        f32(*d_threshold) if with_gradients and need_threshold else f32(0),
    )


def _gradient_shapes(rows, columns, column_index, threshold):
    count = 0 if columns is None else columns.shape[0]
    if column_index is not None:
        count = column_index.shape[0]
    return (
        (rows.shape[0], rows.shape[1]),
        (count, rows.shape[1]),
        (0,) if threshold is None else (threshold.numel(),),
    )


@torch.library.custom_op("unitsface::similarity_loss_backward", mutates_args=())
def similarity_loss_backward(
    grad_loss: Tensor,
    state: Tensor,
    d_rows: Tensor,
    d_columns: Tensor,
    d_threshold: Tensor,
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    column_index: Tensor | None,
    self_offset: int | None,
    threshold: Tensor | None,
    loss: str,
    params: list[float],
    reduction: str,
    backend: str,
    compute_dtype: torch.dtype,
    skip_tolerance: float,
    need_rows: bool,
    need_columns: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, columns and threshold, in the dtype of each, empty where not needed."""

    # Gradients that the forward pass did not know are empty vectors.
    if forward_has_gradients(loss, reduction) or d_rows.dim() == 2:
        gradients: tuple[Tensor | None, ...] = tuple(
            times(g, grad_loss) if needed else None
            for g, needed in (
                (d_rows, need_rows),
                (d_columns, need_columns),
                (d_threshold, need_threshold),
            )
        )
    else:
        call = make_call(
            rows,
            row_labels,
            columns,
            column_labels,
            column_index,
            self_offset,
            threshold,
            loss,
            params,
            reduction,
            compute_dtype,
            skip_tolerance,
            need_rows,
            need_columns,
            need_threshold,
        )
        gradients = computed_gradients(call, backend, state, grad_loss)

    def finished(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        if gradient is None or like is None:
            return rows.new_empty(0)
        return gradient.to(like.dtype)

    return (
        finished(gradients[0], rows),
        finished(gradients[1], columns),
        finished(gradients[2], threshold),
    )


@similarity_loss_backward.register_fake
def _(
    grad_loss,
    state,
    d_rows,
    d_columns,
    d_threshold,
    rows,
    row_labels,
    columns,
    column_labels,
    column_index,
    self_offset,
    threshold,
    loss,
    params,
    reduction,
    backend,
    compute_dtype,
    skip_tolerance,
    need_rows,
    need_columns,
    need_threshold,
):
    shapes = _gradient_shapes(rows, columns, column_index, threshold)
    needs = (need_rows, need_columns, need_threshold)
    return tuple(
        like.new_empty(shape) if needed and like is not None else rows.new_empty(0)
        for like, shape, needed in zip((rows, columns, threshold), shapes, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    (rows, row_labels, columns, column_labels, column_index, self_offset, threshold, *static) = (
        inputs
    )
    _, state, d_rows, d_columns, d_threshold = output
    loss, _, reduction, *_, need_columns, need_threshold = static
    known = forward_knows(loss, reduction, columns, need_columns, need_threshold)
    columns, column_labels = saved_columns(known, loss, columns, column_labels, need_columns)
    ctx.save_for_backward(
        state,
        d_rows,
        d_columns,
        d_threshold,
        rows,
        row_labels,
        columns,
        column_labels,
        column_index,
        threshold,
    )
    ctx.self_offset, ctx.static = self_offset, static
    ctx.mark_non_differentiable(state, d_rows, d_columns, d_threshold)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 16
    *saved, threshold = ctx.saved_tensors
    columns, column_index = saved[6], saved[8]
    need_rows, need_columns, need_threshold = ctx.static[-3:]
    d_rows, d_columns, d_threshold = similarity_loss_backward(
        grad_loss, *saved, ctx.self_offset, threshold, *ctx.static
    )
    return of_inputs(
        d_rows if need_rows else None,
        d_columns if need_columns else None,
        d_threshold if need_threshold else None,
        columns,
        column_index,
        threshold,
    )


def of_inputs(
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    d_threshold: Tensor | None,
    columns: Tensor | None,
    column_index: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients as autograd wants them: of every argument of the operator, in its shape."""
    if d_columns is not None and column_index is not None:
        assert columns is not None
        d_columns = torch.zeros_like(columns).index_add(0, column_index.long(), d_columns)
    if d_threshold is not None:
        assert threshold is not None
        d_threshold = d_threshold.reshape(threshold.shape)
    return (d_rows, None, d_columns, None, None, None, d_threshold, *(None,) * 9)


similarity_loss.register_autograd(_backward, setup_context=_setup_context)


def no_second_derivative(ctx, *_):
    raise RuntimeError(
        "fused losses are differentiable once: their backward pass has no derivative; "
        'use backend="reference" for second derivatives'
    )


similarity_loss_backward.register_autograd(no_second_derivative)
