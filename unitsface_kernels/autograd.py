"""The fused loss as eager mode runs it: an autograd function without an operator around it.

Beside the operators' overhead (most of the time of a small call) this saves what an operator may
not do: hand a workspace from the forward to the backward pass and give it away there. Gradients
that the forward pass computes are scaled in place, and cosines lie in the memory of the gradient to
come.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch, passes
from .backends.streaming import (
    CallConfig,
    CallTensors,
    ForwardCache,
    Gradients,
    driver,
    make_call,
)


def loss_alone(config: CallConfig, *tensors: Any) -> Tensor:
    """Loss of a call that needs no gradient."""
    return passes.forward(make_call(config, CallTensors(*tensors)), gradients=False).loss


def applies(tensors: CallTensors) -> bool:
    """Whether only autograd is active: no tracing, no dispatch mode, no tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(
            t is None or type(t) in (Tensor, torch.nn.Parameter)
            for t in passes.differentiable(tensors)
        )
    )


class FusedLoss(Function):
    """Loss of a call whose arguments have been checked: ``apply(config, *tensors)``."""

    @staticmethod
    def forward(ctx, config: CallConfig, *inputs: Any) -> Tensor:
        tensors = CallTensors(*inputs)
        ctx.cache = ForwardCache()
        call = make_call(config, tensors, ctx.cache)
        known = config.gradients_known(tensors.columns)
        # As ``passes.forward``, without its frame.
        backend = dispatch.load(config.backend)
        run = partial(driver(config.spec).forward, call, gradients=known)
        with backend.context(call):
            result = run(passes.make_engine(backend, call, "forward", known, run))
        ctx.known = passes.complete(call, result).gradients if known else None
        # Gradients of the rows alone are small: kept, so that nothing else need be.
        ctx.keeps = known and config.rows_alone(tensors.columns)
        ctx.config, ctx.in_forward = config, known
        state = None if known else result.state
        ctx.save_for_backward(*passes.tensors_to_save(config, tensors, known), state)
        ctx.set_materialize_grads(False)
        return result.loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, state = ctx.saved_tensors
        tensors = CallTensors(*saved)
        with torch.no_grad():
            known = ctx.known
            if not ctx.keeps:
                ctx.known = None
            if known is None:
                gradients = _computed(ctx, tensors, state, grad_loss)
            elif ctx.keeps:
                gradients = passes.times(known, grad_loss)
            else:
                gradients = passes.scaled(known, grad_loss, tensors)
            gradients = passes.of_inputs(tensors, *gradients)
        return passes.by_input(tensors, grad_loss, gradients)


def _computed(ctx, tensors: CallTensors, state: Tensor | None, grad_loss: Tensor) -> Gradients:
    call = make_call(ctx.config, tensors, ctx.cache)
    if not ctx.in_forward:
        return passes.backward_of_loss(call, state, grad_loss)
    # A retained graph, whose gradients the first backward pass has given away.
    known = passes.forward(call, gradients=True).gradients
    return passes.scaled(known, grad_loss)
