"""An optimizer's step on the class weights, tile by tile as their gradient appears.

The gradient of the weights is never stored. The update is made either within the backward pass,
or by ``optimizer.step()``, which computes the gradient of each tile again: for whatever must be
known before any weight moves, such as a loss scale that overflowed or the norm of all gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ... import passes
from ...backends.dense import dense
from ...backends.streaming import Call, ColumnSink, RowStep
from ...optim.update import RowUpdate, Update


@dataclass(frozen=True)
class _Pending:
    """A backward pass whose gradient of the columns is still to be computed."""

    call: Call
    state: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Sink:
    """The step of ``update`` on rows ``index``, from their gradient times ``scale``."""

    update: RowUpdate
    index: Tensor | None
    scale: Tensor | None

    def __call__(self, rows: slice, gradient: Tensor) -> None:
        self.update(rows, gradient, self.index, self.scale)

    @cached_property
    def step(self) -> RowStep | None:
        """For kernels that make it; None: they cannot."""
        update, scale = self.update, self.scale
        if not isinstance(update, Update) or not update.for_kernels:
            return None
        scale = None if scale is None else dense(scale.to(torch.float32))
        rule = update.rule
        return RowStep(update.weight, update.states, rule.code, vars(rule), scale)


class Fusion:
    """Ties a parameter to the optimizer that owns its step.

    Attributes:
        parameter: (m, D) class weights of the shard.
        when: "backward" or "step".
    """

    def __init__(self, parameter: nn.Parameter, optimizer: Any, when: str) -> None:
        self.parameter = parameter
        self.when = when
        self._optimizer = optimizer
        self._pending: _Pending | None = None
        if when == "step":
            optimizer.fuse(parameter, at_step=self._step)
        else:
            optimizer.fuse(parameter)

    def update(self, index: Tensor | None, scale: Tensor | None = None) -> ColumnSink:
        """Begins a step of the optimizer; the result takes the gradient of one tile after another.

        Args:
            index: (K,) rows of the parameter that take part, or None.
            scale: () factor of the gradient.
        """
        return _Sink(self._optimizer.begin_row_update(self.parameter), index, scale)

    def hold(self, call: Call, state: Tensor, weights: Tensor, finite: Tensor) -> Tensor | None:
        """Leaves the update to the optimizer's step.

        Returns:
            What stands for the gradient until then: a sparse (m, D) tensor whose only entry is the
            factor of the gradient, NaN if it is not finite. What scales gradients scales it, and a
            gradient scaler that looks for overflows finds them there. None if m is 0.
        """
        if self._pending is not None and self.parameter.grad is not None:
            raise RuntimeError(
                "a fused optimizer takes one backward pass per step: call optimizer.step() and "
                "zero_grad() between them, or train without PartialFC.fuse to accumulate gradients"
            )
        columns_only = replace(
            call,
            # It may have its own step before this one.
            threshold=None if call.threshold is None else call.threshold.clone(),
            need_rows=False,
            need_columns=True,
            need_threshold=False,
            need_variables=False,
            # Until the step, columns need no memory.
            cache=None,
        )
        self._pending = _Pending(columns_only, state, weights)
        if self.parameter.numel() == 0:
            return None
        entry = torch.where(finite, 1.0, torch.nan).to(torch.float32).reshape(1)
        corner = torch.zeros(self.parameter.dim(), 1, dtype=torch.int64, device=entry.device)
        return torch.sparse_coo_tensor(
            corner, entry, self.parameter.shape, is_coalesced=True, check_invariants=False
        )

    def squared_norm(self) -> Tensor:
        """() float32 square of the norm of the gradient that waits for the optimizer's step."""
        total = torch.zeros((), device=self.parameter.device)
        pending = self._pending
        if pending is None or self.parameter.grad is None:
            return total

        def add(rows: slice, gradient: Tensor) -> None:
            total.add_(torch.linalg.vector_norm(gradient).square())

        self._run(pending, add)
        return total * self.parameter.grad._values().square().sum()

    def _step(self, factor: Tensor | None) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and (factor is not None or self.parameter.numel() == 0):
            self._run(pending, self.update(pending.call.column_index, factor))

    def _run(self, pending: _Pending, sink: ColumnSink) -> None:
        passes.backward(replace(pending.call, sink=sink), pending.state, pending.weights)
