"""The loss of gathered rows against a shard, and its gradients for the rank's own rows.

The function's result is the loss of all ranks' rows, the same number on every rank. Its gradients
are those that data-parallel training expects: of the own rows the number of ranks times d loss /
d row, since averaging divides by it; of the shard, and of what all ranks share, d loss / d
parameter itself, complete on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Function

from ... import passes
from ...backends.streaming import (
    Call,
    CallConfig,
    CallTensors,
    ColumnSink,
    ForwardCache,
    Gradients,
    Mixing,
    Shards,
    make_call,
)
from ...losses import LossSpec
from ..collectives import (
    Group,
    ordered_sum,
    own_rank,
    start_gather_rows,
    start_scatter_sums,
    sum_over_ranks,
    world_size,
)
from .anchors import Anchors, by_role
from .fused import Fusion


@dataclass(frozen=True)
class Task:
    """One comparison of the rows with a matrix of class rows, tensors with gradients apart.

    Attributes:
        config: of the call; ``need_rows``, reduction and backend are those of every task.
        share: factor in the total.
        sparse: whether the columns are a parameter, whose gradient is given for the sampled rows
            alone.
        fusion: updates the columns in place of returning their gradient, or None.
        anchors: the classes, if they have the losses, over samples; None: samples have them.
        mixing: what is mixed into the columns, or None.
    """

    config: CallConfig
    share: float
    sparse: bool
    fusion: Fusion | None
    anchors: Anchors | None = None
    mixing: Mixing | None = None

    @property
    def per_class(self) -> bool:
        """Whether the threshold is one per class."""
        return self.config.spec.threshold == "per_column"


@dataclass(frozen=True)
class Step:
    """State shared by the tasks of a step.

    Attributes:
        rows: (N, D) all ranks' rows.
        positions: (N,) targets among the columns that take part, -1 ignored, -2 elsewhere.
        index: (K,) rows of the shard that take part, ascending; None: all.
        counts: every rank's rows.
    """

    tasks: tuple[Task, ...]
    rows: Tensor
    positions: Tensor
    index: Tensor | None
    counts: list[int]
    group: Group

    @property
    def reduction(self) -> str:
        return self.tasks[0].config.reduction

    @property
    def need_rows(self) -> bool:
        """Whether the rows need a gradient; the same on all ranks."""
        return self.tasks[0].config.need_rows

    @property
    def own_rows(self) -> slice:
        start = sum(self.counts[: own_rank(self.group)])
        return slice(start, start + self.counts[own_rank(self.group)])


def sharded_loss(
    step: Step, feats: Tensor, parameters: list[tuple[Tensor, Tensor | None, Tensor | None]]
) -> Tensor:
    """() loss, or with ``reduction="none"`` that of the own rows (n,).

    Args:
        feats: (n, D) own rows.
        parameters: class rows (m, D), threshold and ``CallTensors.variables`` of every task.
    """
    return _ShardedLoss.apply(step, feats, *(t for each in parameters for t in each))


#: Tensors of a task.
_EACH = 3


class _ShardedLoss(Function):
    @staticmethod
    def forward(ctx, step: Step, feats: Tensor, *parameters: Tensor | None) -> Tensor:
        total, states = None, []
        ctx.known, ctx.caches = [], []
        caches = [ForwardCache(streamed=task.fusion is not None) for task in step.tasks]
        for comparison in _comparisons(ctx, step, parameters, caches):
            task, call = comparison.task, comparison.call()
            known = task.fusion is None and call.need_any and call.forward_has_gradients
            result = passes.forward(call, gradients=known)
            loss = result.loss
            if task.anchors is not None:
                loss = ordered_sum(loss, step.group)
            loss = task.share * loss if task.share != 1.0 else loss
            total = loss if total is None else total + loss
            states.append(result.state)
            ctx.known.append(result.gradients if known else None)
        ctx.step, ctx.dtype, ctx.caches = step, feats.dtype, caches
        # On one rank, the rows are the features themselves: writes to them are to be detected.
        guard = feats if world_size(step.group) == 1 else None
        ctx.save_for_backward(*parameters, *states, guard)
        ctx.set_materialize_grads(False)
        assert total is not None
        # Read only by an optimizer that makes its step later.
        at_step = any(t.fusion is not None and t.fusion.when == "step" for t in step.tasks)
        ctx.finite = torch.isfinite(total).all() if at_step else None
        return total[step.own_rows] if step.reduction == "none" else total

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        step: Step = ctx.step
        count = _EACH * len(step.tasks)
        parameters, states = ctx.saved_tensors[:count], ctx.saved_tensors[count:-1]
        with torch.no_grad():
            if step.reduction == "none":
                # The objective is the mean over ranks of each rank's function of its losses.
                grad_loss = start_gather_rows(grad_loss, step.counts, step.group)()
                grad_loss = grad_loss / world_size(step.group)
            d_rows, found = None, []
            for number, comparison in enumerate(_comparisons(ctx, step, parameters, ctx.caches)):
                known, ctx.known[number] = ctx.known[number], None
                share = comparison.task.share
                upstream = grad_loss * share if share != 1.0 else grad_loss
                of_rows, *others = comparison.gradients(states[number], known, upstream, ctx.finite)
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
                own, ranks = finish(), world_size(step.group)
                own = (own * ranks if ranks > 1 else own).to(ctx.dtype)
        if torch.is_grad_enabled():
            inputs = (grad_loss, *parameters)
            return (None, *passes.Final.apply(*inputs, own, *found)[len(inputs) :])
        return None, own, *found


def _comparisons(
    ctx,
    step: Step,
    parameters: Sequence[Tensor | None],
    caches: Sequence[ForwardCache],
) -> Iterator[_Comparison]:
    for number, (task, cache) in enumerate(zip(step.tasks, caches, strict=True)):
        first = _EACH * number
        columns, threshold, variables = parameters[first : first + _EACH]
        needs = ctx.needs_input_grad[2 + first : 2 + first + _EACH]
        assert columns is not None
        needed = zip(("need_columns", "need_threshold", "need_variables"), needs, strict=True)
        config = replace(task.config, **dict(needed))
        yield _Comparison(step, task, config, columns, threshold, variables, cache)


@dataclass
class _Comparison:
    """A task with its tensors and the gradients that it needs."""

    step: Step
    task: Task
    config: CallConfig
    columns: Tensor
    threshold: Tensor | None
    variables: Tensor | None
    cache: ForwardCache

    def call(self, config: CallConfig | None = None, sink: ColumnSink | None = None) -> Call:
        step, threshold = self.step, self.threshold
        config = config or self.config
        if threshold is not None and self.task.per_class and step.index is not None:
            threshold = threshold.detach()[step.index]
        tensors = CallTensors(
            step.rows,
            step.positions,
            self.columns,
            threshold=threshold,
            variables=self.variables,
        )
        if self.task.anchors is not None:
            return self.task.anchors.call(config, tensors._replace(column_index=step.index))
        shards = Shards(step.group) if world_size(step.group) > 1 else None
        call = make_call(config, tensors, self.cache, shards)
        # Unlike a caller's index, it is in range by the way it was drawn.
        return replace(call, column_index=step.index, mixing=self.task.mixing, sink=sink)

    def gradients(
        self, state: Tensor, known: Gradients | None, grad_loss: Tensor, finite: Tensor | None
    ) -> Gradients:
        """Gradients of all ranks' rows and of the task's tensors, from this rank's shard."""
        task = self.task
        d_columns: Tensor | None
        if task.fusion is not None:
            d_rows, d_columns, d_threshold, d_variables = self._fused(
                task.fusion, state, grad_loss, finite
            )
        else:
            if known is None and self.config.forward_has_gradients:
                # A retained graph, whose gradients the first backward pass has given away.
                known = passes.forward(self.call(), gradients=True).gradients
            if known is None:
                known = passes.backward_of_loss(self.call(), state, grad_loss)
            else:
                known = passes.scaled(known, grad_loss)
            if task.anchors is not None:
                known = by_role(known)
            d_rows, d_columns, d_threshold, d_variables = known
            d_columns = self._of_shard(d_columns, self.columns, task.sparse)
        if d_threshold is not None and self.threshold is not None:
            if task.per_class:
                d_threshold = self._of_shard(d_threshold, self.threshold, True)
            else:
                d_threshold = d_threshold.reshape(self.threshold.shape)
        return Gradients(d_rows, d_columns, d_threshold, d_variables)

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

    def _fused(
        self, fusion: Fusion, state: Tensor, grad_loss: Tensor, finite: Tensor | None
    ) -> Gradients:
        now = fusion.when == "backward"
        sink = fusion.update(self.step.index) if now else None
        call = self.call(replace(self.config, need_columns=now), sink)
        weights = passes.row_weights(call, grad_loss)
        d_rows, _, d_threshold, d_variables = passes.backward(call, state, weights)
        if now:
            return Gradients(d_rows, None, d_threshold, d_variables)
        assert finite is not None
        finite = finite & torch.isfinite(weights).all()
        if d_rows is not None:
            finite = finite & torch.isfinite(d_rows).all()
        d_columns = fusion.hold(call, state, weights, finite)
        return Gradients(d_rows, d_columns, d_threshold, d_variables)


def _shared(step: Step, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the tasks' tensors by turns; of what every rank has, those of all ranks."""
    result = list(gradients)
    for number, task in enumerate(step.tasks):
        threshold, variables = (_EACH * number + k for k in (1, 2))
        gradient = result[threshold]
        if gradient is not None and not task.per_class:
            result[threshold] = sum_over_ranks(gradient, step.group)
        gradient = result[variables]
        if gradient is not None:
            result[variables] = _of_variables(step, task.config.spec, gradient)
    return result


def _of_variables(step: Step, spec: LossSpec, gradient: Tensor) -> Tensor:
    """Gradients of variables: of scalars, which all ranks have, the sum over ranks; of rows this
    rank's share, summed when it is scattered as those of features are; of classes the rank's own.
    """
    scalars, of_rows = (
        sum(v.side == side and v.given for v in spec.variables) for side in ("scalar", "row")
    )
    split = [scalars, scalars + of_rows * len(step.rows)]
    first, rows, classes = gradient.tensor_split(split)
    if scalars:
        first = sum_over_ranks(first, step.group)
    return torch.cat([first, rows * world_size(step.group), classes])
