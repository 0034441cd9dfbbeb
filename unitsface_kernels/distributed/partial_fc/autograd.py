"""The loss of gathered rows against a shard, and its gradients for the rank's own rows.

The function's result is the loss of all ranks' rows, the same number on every rank. Its gradients
are those that data-parallel training expects: of the own rows the number of ranks times d loss /
d row, since averaging divides by it; of the shard, and of what all ranks share, d loss / d
parameter itself, complete on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from ... import dispatch, ops
from ...autograd import Final, scaled
from ...backends.streaming import Call, Gradients, Kept, Result, Shards, make_call
from ..collectives import (
    Group,
    own_rank,
    start_gather_rows,
    start_scatter_sums,
    sum_over_ranks,
    world_size,
)
from .fused import Fusion


@dataclass(frozen=True)
class Task:
    """One comparison of the rows with a matrix of class rows, tensors with gradients apart.

    Attributes:
        loss, params: name in the registry of losses, packed hyper-parameters.
        share: factor in the total.
        per_class: whether the threshold is one per class.
        sparse: whether the columns are a parameter, whose gradient is given for the sampled rows
            alone.
        fusion: updates the columns in place of returning their gradient, or None.
    """

    loss: str
    params: tuple[float, ...]
    share: float
    per_class: bool
    sparse: bool
    fusion: Fusion | None


@dataclass(frozen=True)
class Step:
    """What the tasks of a step have in common.

    Attributes:
        rows: (N, D) all ranks' rows.
        positions: (N,) targets among the columns that take part, -1 ignored, -2 elsewhere.
        index: (K,) rows of the shard that take part, ascending; None: all.
        counts: every rank's rows.
        need_rows: whether the rows want a gradient; the same on all ranks.
    """

    tasks: tuple[Task, ...]
    rows: Tensor
    positions: Tensor
    index: Tensor | None
    counts: list[int]
    group: Group
    reduction: str
    backend: str
    compute_dtype: torch.dtype
    skip_tolerance: float
    need_rows: bool

    @property
    def own_rows(self) -> slice:
        start = sum(self.counts[: own_rank(self.group)])
        return slice(start, start + self.counts[own_rank(self.group)])

    def call(
        self,
        task: Task,
        columns: Tensor,
        threshold: Tensor | None,
        needs: tuple[bool, bool, bool],
        kept: Kept | None = None,
    ) -> Call:
        if threshold is not None and task.per_class and self.index is not None:
            threshold = threshold.detach()[self.index]
        ranks = world_size(self.group)
        return make_call(
            self.rows,
            self.positions,
            columns,
            None,
            self.index,
            None,
            threshold,
            task.loss,
            task.params,
            self.reduction,
            self.compute_dtype,
            # Every rank may leave out its part.
            self.skip_tolerance / ranks,
            *needs,
            kept,
            Shards(self.group) if ranks > 1 else None,
        )


def sharded_loss(step: Step, feats: Tensor, pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """() loss, or with ``reduction="none"`` that of the own rows (n,).

    Args:
        feats: (n, D) own rows.
        pairs: class rows (m, D) and threshold of every task.
    """
    return _ShardedLoss.apply(step, feats, *(t for pair in pairs for t in pair))


class _ShardedLoss(Function):
    @staticmethod
    def forward(ctx, step: Step, feats: Tensor, *parameters):
        total, states = None, []
        ctx.known, ctx.kept = [], []
        for task, columns, threshold, needs in _each(ctx, step, parameters):
            kept = None if task.fusion is not None else Kept()
            known = task.fusion is None and any(needs)
            known = known and ops.forward_has_gradients(task.loss, step.reduction)
            result = _forward(step, task, columns, threshold, needs, kept, known)
            loss = task.share * result.loss if task.share != 1.0 else result.loss
            total = loss if total is None else total + loss
            states.append(result.state)
            ctx.known.append(result.gradients if known else None)
            ctx.kept.append(kept)
        ctx.step, ctx.dtype = step, feats.dtype
        # Of one rank, the rows are the features themselves; whoever writes on them is found out.
        guard = feats if world_size(step.group) == 1 else None
        ctx.save_for_backward(*parameters, *states, guard)
        ctx.set_materialize_grads(False)
        assert total is not None
        ctx.finite = torch.isfinite(total).all()
        return total[step.own_rows] if step.reduction == "none" else total

    @staticmethod
    def backward(ctx, grad_loss):
        step: Step = ctx.step
        count = 2 * len(step.tasks)
        if grad_loss is None:
            return (None,) * (2 + count)
        parameters, states = ctx.saved_tensors[:count], ctx.saved_tensors[count:-1]
        with torch.no_grad():
            if step.reduction == "none":
                # The objective is the mean over ranks of what each makes of its rows' losses.
                grad_loss = start_gather_rows(grad_loss, step.counts, step.group)()
                grad_loss = grad_loss / world_size(step.group)
            d_rows, found = None, []
            for number, (task, columns, threshold, needs) in enumerate(
                _each(ctx, step, parameters)
            ):
                known, ctx.known[number] = ctx.known[number], None
                gradients = _Gradients(step, task, columns, threshold, needs, ctx.kept[number])
                of_rows, *others = gradients.find(
                    states[number], known, grad_loss * task.share, ctx.finite
                )
                if of_rows is not None:
                    d_rows = of_rows if d_rows is None else d_rows.add_(of_rows)
                found += others
            finish = None
            if step.need_rows:
                assert d_rows is not None
                finish = start_scatter_sums(d_rows, step.counts, step.group)
            found = [
                g.to(p.dtype) if g is not None else None
                for g, p in zip(_shared(step, found), parameters, strict=True)
            ]
            own = None
            if finish is not None:
                own = (finish() * world_size(step.group)).to(ctx.dtype)
        if torch.is_grad_enabled():
            inputs = (grad_loss, *parameters)
            return (None, *Final.apply(*inputs, own, *found)[len(inputs) :])
        return None, own, *found


def _each(ctx, step: Step, parameters):
    """Tasks with their tensors and which gradients they need."""
    for number, task in enumerate(step.tasks):
        columns, threshold = parameters[2 * number : 2 * number + 2]
        of_columns, of_threshold = ctx.needs_input_grad[2 + 2 * number : 4 + 2 * number]
        yield task, columns, threshold, (step.need_rows, of_columns, of_threshold)


def _forward(step, task, columns, threshold, needs, kept, gradients: bool) -> Result:
    call = step.call(task, columns, threshold, needs, kept)
    return dispatch.load(step.backend).forward(call, gradients=gradients)


@dataclass
class _Gradients:
    step: Step
    task: Task
    columns: Tensor
    threshold: Tensor | None
    needs: tuple[bool, bool, bool]
    kept: Kept | None

    def find(
        self, state: Tensor, known: Gradients | None, grad_loss: Tensor, finite: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of all ranks' rows, the columns and the threshold, from this rank's shard."""
        step, task = self.step, self.task
        d_columns: Tensor | None
        if task.fusion is not None:
            d_rows, d_columns, d_threshold = self._fused(state, grad_loss, finite)
        else:
            if known is None and ops.forward_has_gradients(task.loss, step.reduction):
                # A retained graph, whose gradients the first backward pass has given away.
                known = _forward(
                    step, task, self.columns, self.threshold, self.needs, None, True
                ).gradients
            if known is None:
                call = step.call(task, self.columns, self.threshold, self.needs, self.kept)
                known = ops.computed_gradients(call, step.backend, state, grad_loss)
            else:
                known = scaled(known, grad_loss)
            d_rows, d_columns, d_threshold = known
            d_columns = self._of_shard(d_columns, self.columns, task.sparse)
        if d_threshold is not None and self.threshold is not None:
            if task.per_class:
                d_threshold = self._of_shard(d_threshold, self.threshold, True)
            else:
                d_threshold = d_threshold.reshape(self.threshold.shape)
        return d_rows, d_columns, d_threshold

    def _of_shard(self, gradient: Tensor | None, whole: Tensor, sparse: bool) -> Tensor | None:
        """A gradient of the rows that took part as one of all rows of the shard."""
        index = self.step.index
        if gradient is None or index is None:
            return gradient
        if sparse:
            return torch.sparse_coo_tensor(
                index[None],
                gradient,
                whole.shape,
                is_coalesced=True,
                check_invariants=False,
            )
        return torch.zeros_like(whole).index_add(0, index, gradient.to(whole.dtype))

    def _fused(self, state: Tensor, grad_loss: Tensor, finite: Tensor):
        step, fusion = self.step, self.task.fusion
        assert fusion is not None
        of_rows, _, of_threshold = self.needs
        now = fusion.when == "backward"
        call = step.call(
            self.task, self.columns, self.threshold, (of_rows, now, of_threshold), None
        )
        weights = ops.row_weights(call, grad_loss)
        sink = fusion.update(step.index) if now else None
        d_rows, _, d_threshold = fusion.run(call, step.backend, state, weights, sink)
        if now:
            return d_rows, None, d_threshold
        finite = finite & torch.isfinite(weights).all()
        if d_rows is not None:
            finite = finite & torch.isfinite(d_rows).all()
        return d_rows, fusion.hold(call, step.backend, state, weights, finite), d_threshold


def _shared(step: Step, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of columns and thresholds by turns; of what every rank has, those of all ranks."""
    result = list(gradients)
    for number, task in enumerate(step.tasks):
        gradient = result[2 * number + 1]
        if gradient is not None and not task.per_class:
            result[2 * number + 1] = sum_over_ranks(gradient, step.group)
    return result
