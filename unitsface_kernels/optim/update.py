"""A step of an optimizer on some rows of a parameter, in place: the extension's kernel or Torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .. import dispatch
from ..backends.dense import dense, is_dense


class RowUpdate(Protocol):
    """One step on a parameter, taken block by block."""

    def __call__(
        self, rows: slice, gradient: Tensor, index: Tensor | None, scale: Tensor | None
    ) -> None:
        """Updates rows ``index[rows]``, or the rows ``rows`` themselves without an index.

        Each row at most once in a step. Blocks give the same bits as all rows at once.

        Args:
            rows: start and stop, m rows.
            gradient: (m, ...) of these rows; may be overwritten.
            index: (K,) int64 rows of the step.
            scale: () float32 factor of the gradient, read on its device; None: 1.
        """


@dataclass(frozen=True)
class Rule:
    """Hyper-parameters of a step, by their names in ``row_update.h``."""

    step_size: float

    #: RowRule of ``row_update.h``.
    code: ClassVar[int]

    def step(self, weight: Tensor, gradient: Tensor, states: tuple[Tensor, ...]) -> None:
        """A step on whole tensors, in place; ``gradient`` may be overwritten."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGDRule(Rule):
    """One state, the momentum buffer, or none."""

    weight_decay: float
    momentum: float
    nesterov: bool

    code: ClassVar[int] = 0

    def step(self, weight: Tensor, gradient: Tensor, states: tuple[Tensor, ...]) -> None:
        gradient.add_(weight, alpha=self.weight_decay)
        for buffer in states:
            buffer.mul_(self.momentum).add_(gradient)
            gradient = gradient.add_(buffer, alpha=self.momentum) if self.nesterov else buffer
        weight.add_(gradient, alpha=-self.step_size)


@dataclass(frozen=True)
class AdamWRule(Rule):
    """Two states, the moments; bias is corrected for the parameter's number of steps."""

    kept: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    second_correction: float
    eps: float

    code: ClassVar[int] = 1

    def step(self, weight: Tensor, gradient: Tensor, states: tuple[Tensor, ...]) -> None:
        mean, square = states
        mean.lerp_(gradient, self.one_minus_beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=self.one_minus_beta2)
        root = (square.sqrt() / self.second_correction).add_(self.eps)
        weight.mul_(self.kept).addcdiv_(mean, root, value=-self.step_size)


@dataclass(frozen=True)
class Update:
    """A :class:`RowUpdate` of ``weight`` and its ``states``, which have the weight's shape."""

    weight: Tensor
    states: tuple[Tensor, ...]
    rule: Rule

    @property
    def for_kernels(self) -> bool:
        """Whether kernels can make the step: they read raw float32 memory."""
        tensors = (self.weight, *self.states)
        return all(t.dtype == torch.float32 and is_dense(t) for t in tensors)

    @torch.no_grad()
    def __call__(
        self, rows: slice, gradient: Tensor, index: Tensor | None, scale: Tensor | None
    ) -> None:
        assert gradient.shape == (rows.stop - rows.start, *self.weight.shape[1:])
        if index is not None:
            assert index.dtype == torch.int64
            index = dense(index[rows])
        tensors = (self.weight, *self.states)
        kernels = dispatch.row_kernels(self.weight.device)
        if kernels is not None and self.for_kernels:
            kernels.update_rows(
                self.rule.code,
                self.weight,
                dense(gradient.to(torch.float32)),
                index,
                rows.start,
                None if scale is None else dense(scale.to(torch.float32)),
                self.states,
                vars(self.rule),
            )
            # Autograd reports a graph that needs the old values.
            torch.autograd.graph.increment_version(tensors)
        else:
            self._step(rows, gradient, index, scale)

    def _step(
        self, rows: slice, gradient: Tensor, index: Tensor | None, scale: Tensor | None
    ) -> None:
        """The step in Torch; half precision is computed in float32 and rounded once."""
        tensors = (self.weight, *self.states)
        which: slice | Tensor = rows if index is None else index
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        # Copies: rows by index always are, the gradient is the caller's.
        blocks = [t[which].to(wide, copy=True) for t in tensors]
        gradient = gradient.to(wide, copy=True)
        if scale is not None:
            gradient.mul_(scale)
        self.rule.step(blocks[0], gradient, tuple(blocks[1:]))
        for whole, block in zip(tensors, blocks, strict=True):
            whole[which] = block.to(whole.dtype)
