"""The forward and the backward pass of a call on its backend, and what autograd needs of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch
from .backends.dense import as_dtype, dense
from .backends.streaming import Call, CallConfig, CallTensors, Engine, Gradients, Result, driver
from .backends.streaming.inner_products import for_call
from .backends.streaming.mixed_columns import with_mixing


def make_engine(
    backend: ModuleType,
    call: Call,
    stage: str,
    gradients: bool,
    run: Callable[[Engine], object],
    weights: Tensor | None = None,
) -> Engine:
    """The engine of a pass, which may depend on what a trial ``run`` of the pass takes.

    With ``UNITSFACE_CHECK=1`` operands (``weights``: upstream gradients) and tiles are checked.
    """
    trial = run
    as_it_is = call.spec.normalize and call.mixing is None
    if not as_it_is:
        trial = lambda engine: run(_for_call(engine, call))  # noqa: E731
    engine = backend.make_engine(call, stage, gradients, trial)
    if not as_it_is:
        engine = _for_call(engine, call)
    if os.environ.get("UNITSFACE_CHECK") != "1":
        return engine
    from .backends.streaming.checked import checked

    return checked(engine, call, weights)


def _for_call(engine: Engine, call: Call) -> Engine:
    return with_mixing(for_call(engine, call), call)


def forward(call: Call, gradients: bool) -> Result:
    """Loss and state; with ``gradients`` also those that the tiles of this pass yield."""
    backend = dispatch.load(call.backend)
    run = partial(driver(call.spec).forward, call, gradients=gradients)
    with backend.context(call):
        return run(make_engine(backend, call, "forward", gradients, run))


def backward(call: Call, state: Tensor | None, weights: Tensor) -> Gradients:
    """Gradients for (num_losses,) float32 upstream gradients."""
    backend = dispatch.load(call.backend)
    state = None if state is None else dense(state)
    weights = dense(weights)
    run = partial(driver(call.spec).backward, call, state=state, weights=weights)
    with backend.context(call):
        return Gradients(*run(make_engine(backend, call, "backward", True, run, weights)))


def backward_of_loss(call: Call, state: Tensor | None, grad_loss: Tensor) -> Gradients:
    """Gradients for the upstream gradient of the loss."""
    return backward(call, state, row_weights(call, grad_loss))


def row_weights(call: Call, grad_loss: Tensor) -> Tensor:
    """(num_losses,) float32 upstream gradients, from that of the loss."""
    weights = as_dtype(grad_loss, torch.float32).expand(call.num_losses)
    if call.reduction == "mean":
        weights = weights / call.num_valid_rows()
    return weights.contiguous()


def complete(call: Call, result: Result) -> Result:
    """Computes gradients that the forward pass can know but did not yield, as with respect to the
    rows alone; they are those for an upstream gradient of ones.
    """
    if call.spec.reduction != "sum":
        ones = torch.ones_like(result.loss)
        result.gradients = backward_of_loss(call, result.state, ones)
    return result


def forward_with_known(call: Call) -> tuple[Result, bool]:
    """A result, and whether it holds the gradients, for an upstream gradient of ones."""
    known = call.gradients_known(call.columns)
    result = forward(call, gradients=known)
    return (complete(call, result) if known else result), known


def tensors_to_save(config: CallConfig, tensors: CallTensors, known: bool) -> CallTensors:
    """Tensors as the backward pass gets them, safe from updates of a memory.

    Args:
        config, tensors: of the call.
        known: whether the forward pass has the gradients.
    """
    columns, column_labels = tensors.columns, tensors.column_labels
    if columns is None or config.need_columns:
        return tensors
    if known:
        return tensors._replace(columns=None, column_labels=None)
    if config.spec.topology == "class":
        return tensors
    labels = None if column_labels is None else column_labels.clone()
    return tensors._replace(columns=columns.clone(), column_labels=labels)


def times(gradients: Gradients, grad_loss: Tensor) -> Gradients:
    """Gradients for the upstream gradient () or, of the rows alone, (N,) of the loss."""
    factor = grad_loss if grad_loss.dim() == 0 else grad_loss[:, None]
    return Gradients(*(None if g is None else g * factor for g in gradients))


def scaled(
    gradients: Gradients, grad_loss: Tensor, tensors: CallTensors | None = None
) -> Gradients:
    """Scales gradients in place: no copy of C x D, and a factor of one costs nothing on the CPU.

    Of ``tensors`` with another dtype into that, in one pass over the gradient.
    """
    if not grad_loss.is_cuda and grad_loss.item() == 1.0:
        return gradients
    inputs = (None,) * 4 if tensors is None else differentiable(tensors)
    pairs = zip(gradients, inputs, strict=True)
    return Gradients(*[None if g is None else _scaled(g, grad_loss, like) for g, like in pairs])


def differentiable(tensors: CallTensors) -> tuple[Tensor | None, ...]:
    """The tensors that may have a gradient, in the order of :class:`Gradients`."""
    return tensors.rows, tensors.columns, tensors.threshold, tensors.variables


def _scaled(gradient: Tensor, factor: Tensor, like: Tensor | None) -> Tensor:
    if like is None or like.dtype == gradient.dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=like.dtype))


def of_inputs(
    tensors: CallTensors,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    d_threshold: Tensor | None,
    d_variables: Tensor | None = None,
) -> Gradients:
    """Gradients in the dtype and the shape of the tensors."""
    rows, columns, threshold = tensors.rows, tensors.columns, tensors.threshold
    if d_rows is not None:
        d_rows = as_dtype(d_rows, rows.dtype)
    if d_columns is not None and columns is not None:
        d_columns = as_dtype(d_columns, columns.dtype)
        if tensors.column_index is not None:
            index = tensors.column_index.long()
            d_columns = torch.zeros_like(columns).index_add(0, index, d_columns)
    if d_threshold is not None and threshold is not None:
        d_threshold = as_dtype(d_threshold, threshold.dtype).reshape(threshold.shape)
    if d_variables is not None and tensors.variables is not None:
        d_variables = as_dtype(d_variables, tensors.variables.dtype)
    return Gradients(d_rows, d_columns, d_threshold, d_variables)


def no_second_derivative(ctx, *_):
    raise RuntimeError(
        "fused losses are differentiable once: their backward pass has no derivative; "
        'use backend="reference" for second derivatives'
    )


class Final(Function):
    """Gradients that depend on the inputs, but have no derivative by them."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    backward = staticmethod(no_second_derivative)


def final(tensors: CallTensors, grad_loss: Tensor, gradients: Gradients) -> Gradients:
    """Gradients that depend on the call's tensors, see :class:`Final`."""
    inputs = (grad_loss, *differentiable(tensors))
    return Gradients(*Final.apply(*inputs, *gradients)[len(inputs) :])


def by_input(gradients: Gradients) -> tuple:
    """Gradients in the order of an autograd function's inputs ``(config, *tensors)``."""
    d_rows, d_columns, d_threshold, d_variables = gradients
    return None, d_rows, None, d_columns, None, None, d_threshold, d_variables
