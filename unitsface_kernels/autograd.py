"""The fused loss as eager mode runs it: an autograd function without an operator around it.

Beside the operators' overhead (most of the time of a small call) this saves what an operator may
not do: hand a buffer from the forward to the backward pass and give it away there. Gradients that
the forward pass knows are scaled in place, and cosines lie in the memory of the gradient to come.
Arguments are those of ``ops.similarity_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch, ops
from .backends.streaming import Gradients, Kept, make_call


def similarity_loss(*arguments) -> Tensor:
    """Loss of a call whose labels have been checked."""
    if any(arguments[-3:]):
        return _SimilarityLoss.apply(*arguments)
    call = make_call(*arguments[:10], *arguments[11:])
    return dispatch.load(arguments[10]).forward(call, gradients=False).loss


def applies(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd watches: no tracing, no dispatch mode, no tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


class _SimilarityLoss(Function):
    @staticmethod
    def forward(ctx, *arguments):
        rows, row_labels, columns, column_labels, column_index, _, threshold, *_ = arguments
        ctx.kept = Kept()
        call = make_call(*arguments[:10], *arguments[11:], ctx.kept)
        result, known = ops.forward(call, arguments[10])
        ctx.in_forward, ctx.known = known, result.gradients if known else None
        # Of the rows alone they are small: kept, so that nothing else need be.
        ctx.keeps = known and ops.rows_alone(columns, call.need_columns)
        columns, column_labels = ops.saved_columns(
            known, call.spec.name, columns, column_labels, call.need_columns
        )
        state = None if known else result.state
        ctx.static = arguments[7:]
        ctx.self_offset = arguments[5]
        ctx.save_for_backward(
            rows, row_labels, columns, column_labels, column_index, threshold, state
        )
        ctx.set_materialize_grads(False)
        return result.loss

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 16
        *tensors, threshold, state = ctx.saved_tensors
        inputs = (tensors[0], tensors[2], threshold)
        with torch.no_grad():
            known = ctx.known
            if not ctx.keeps:
                ctx.known = None
            if known is None:
                gradients = _computed(ctx, tensors, threshold, state, grad_loss)
            elif ctx.keeps:
                gradients = tuple(None if g is None else ops.times(g, grad_loss) for g in known)
            else:
                gradients = scaled(known, grad_loss)
            finished = [
                None if g is None or t is None else g.to(t.dtype)
                for g, t in zip(gradients, inputs, strict=True)
            ]
            found = ops.of_inputs(*finished, tensors[2], tensors[4], threshold)
        if torch.is_grad_enabled():
            return Final.apply(grad_loss, *inputs, *found)[4:]
        return found


def _computed(ctx, tensors, threshold, state, grad_loss) -> Sequence[Tensor | None]:
    static, backend = ctx.static, ctx.static[3]
    arguments = (*tensors, ctx.self_offset, threshold, *static[:3], *static[4:], ctx.kept)
    call = make_call(*arguments)
    if not ctx.in_forward:
        return ops.computed_gradients(call, backend, state, grad_loss)
    # A retained graph, whose gradients the first backward pass has given away.
    known = dispatch.load(backend).forward(call, gradients=True).gradients
    return scaled(known, grad_loss)


def scaled(gradients: Gradients, grad_loss: Tensor) -> Gradients:
    """In place: C x D gradients are not copied, and on the CPU a factor of one costs nothing."""
    if not grad_loss.is_cuda and grad_loss.item() == 1.0:
        return gradients
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(grad_loss)
    return gradients


class Final(Function):
    """Gradients that depend on the inputs in a way that nothing differentiates."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors)

    backward = staticmethod(ops.no_second_derivative)
