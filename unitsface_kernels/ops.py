"""The fused operators: schema, fake implementation and autograd, once for all backends.

They are what ``torch.compile`` and dispatch modes see; plain eager calls take the shorter way of
``autograd.py``. ``unitsface::similarity_loss`` computes the loss and whatever gradients its
reduction yields in the same pass; ``unitsface::similarity_loss_backward`` scales those or computes
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import passes, validate
from .backends.streaming import Call, CallConfig, CallTensors, Gradients, make_call, state_rows
from .losses import find

_GRADIENTS = len(Gradients._fields)
# Fields of a configuration that are arguments as they are; a graph does not depend on labels.
_STATIC = [f.name for f in fields(CallConfig) if f.name not in ("spec", "params", "label_range")]
_ARGUMENTS = """
    Tensor rows, Tensor row_labels, Tensor? columns, Tensor? column_labels, Tensor? column_index,
    SymInt? self_offset, Tensor? threshold, str loss, float[] params, str reduction, str backend,
    ScalarType compute_dtype, float skip_tolerance,
    bool need_rows, bool need_columns, bool need_threshold,
    Tensor? variables=None, bool need_variables=False, bool both=False
"""


class Arguments(NamedTuple):
    """A call flattened for the schema above: operators take neither tuples nor objects.

    ``backend`` is "native" or "triton"; the others are those of :class:`CallTensors` and
    :class:`CallConfig`.
    """

    rows: Tensor
    row_labels: Tensor
    columns: Tensor | None
    column_labels: Tensor | None
    column_index: Tensor | None
    self_offset: int | None
    threshold: Tensor | None
    loss: str
    params: list[float]
    reduction: str
    backend: str
    compute_dtype: torch.dtype
    skip_tolerance: float
    need_rows: bool
    need_columns: bool
    need_threshold: bool
    variables: Tensor | None = None
    need_variables: bool = False
    both: bool = False

    @classmethod
    def of(cls, config: CallConfig, tensors: CallTensors) -> Arguments:
        static = {name: getattr(config, name) for name in _STATIC}
        loss, params = config.spec.name, list(config.params)
        return cls(loss=loss, params=params, **tensors._asdict(), **static)

    @property
    def tensors(self) -> CallTensors:
        return CallTensors(*(getattr(self, name) for name in CallTensors._fields))

    @property
    def config(self) -> CallConfig:
        static = {name: getattr(self, name) for name in _STATIC}
        return CallConfig(find(self.loss), tuple(self.params), **static)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return passes.differentiable(self.tensors)

    @property
    def needs(self) -> tuple[bool, ...]:
        return self.need_rows, self.need_columns, self.need_threshold, self.need_variables

    def needed(self, gradients: Sequence[Tensor]) -> Gradients:
        """Gradients, None in place of what is not needed."""
        pairs = zip(gradients, self.needs, strict=True)
        return Gradients(*(gradient if needed else None for gradient, needed in pairs))

    @property
    def num_losses(self) -> int:
        """The number of losses of the call."""
        columns = 0 if self.columns is None else self.columns.shape[0]
        return self.rows.shape[0] + (columns if self.both else 0)

    @property
    def gradient_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes for rows, for the columns that take part, for threshold and variables."""
        taken = self.columns if self.column_index is None else self.column_index
        width = self.rows.shape[1:] if self.columns is None else self.columns.shape[1:]
        return (
            (self.rows.shape[0], self.rows.shape[1]),
            (0 if taken is None else taken.shape[0], *width),
            (0 if self.threshold is None else self.threshold.numel(),),
            (0 if self.variables is None else self.variables.numel(),),
        )

    def call(self) -> Call:
        """The call, whose shapes are checked: it may come from no public function."""
        call = make_call(self.config, self.tensors)
        validate.centers(call.centers)
        validate.packed("params", call.params, len(call.spec.parameters))
        validate.operands(
            call.rows,
            call.row_labels,
            call.columns,
            call.column_labels,
            call.column_index,
            call.threshold,
            call.num_columns if call.spec.threshold == "per_column" else 1,
        )
        size = call.spec.variables_size(call.rows.shape[0], call.num_columns)
        validate.packed("variables", () if call.variables is None else call.variables, size)
        return call


def _or_empty(like: Tensor, *optional: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns no None: an empty tensor, each its own, stands for it."""
    return tuple(like.new_empty(0, dtype=torch.float32) if t is None else t for t in optional)


@torch.library.custom_op(
    "unitsface::similarity_loss",
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def similarity_loss(*flat) -> tuple[Tensor, ...]:
    """Loss, state for the backward pass, and gradients, empty where not needed or not known yet."""
    given = Arguments(*flat)
    validate.call_labels(
        find(given.loss),
        given.row_labels,
        given.columns,
        given.column_labels,
        given.column_index,
        lowest=-2,
    )
    result, _ = passes.forward_with_known(given.call())
    return result.loss, *_or_empty(given.rows, result.state, *Gradients(*result.gradients))


@similarity_loss.register_fake
def _(*flat):
    given = Arguments(*flat)
    config, rows = given.config, given.rows

    def float32(*shape):
        return rows.new_empty(shape, dtype=torch.float32)

    known = config.gradients_known(given.columns)
    kept = state_rows(config.spec, config.params)
    return (
        float32(given.num_losses) if given.reduction == "none" else float32(),
        float32(kept, given.num_losses) if kept else float32(0),
        *(
            float32(*shape) if known and needed else float32(0)
            for shape, needed in zip(given.gradient_shapes, given.needs, strict=True)
        ),
    )


@torch.library.custom_op(
    "unitsface::similarity_loss_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_loss, Tensor state, Tensor d_rows, Tensor d_columns, Tensor d_threshold, "
        f"Tensor d_variables, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def similarity_loss_backward(grad_loss: Tensor, state: Tensor, *flat) -> tuple[Tensor, ...]:
    """Gradients of all tensors, in the dtype of each, empty where not needed."""
    known, given = flat[:_GRADIENTS], Arguments(*flat[_GRADIENTS:])
    # Gradients that the forward pass did not know are empty vectors.
    some = known[0].dim() == 2 or known[-1].numel() > 0
    if given.config.forward_has_gradients or some:
        gradients = passes.times(given.needed(known), grad_loss)
    else:
        gradients = passes.backward_of_loss(given.call(), state, grad_loss)
    return tuple(
        given.rows.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, given.differentiable, strict=True)
    )


@similarity_loss_backward.register_fake
def _(grad_loss, state, *flat):
    given = Arguments(*flat[_GRADIENTS:])
    return tuple(
        like.new_empty(shape) if needed and like is not None else given.rows.new_empty(0)
        for like, shape, needed in zip(
            given.differentiable, given.gradient_shapes, given.needs, strict=True
        )
    )


def _setup_context(ctx, inputs, output):
    given = Arguments(*inputs)
    _, *results = output
    known = given.config.gradients_known(given.columns)
    saved = passes.tensors_to_save(given.config, given.tensors, known)
    ctx.save_for_backward(*results, *saved)
    ctx.config = given.config
    ctx.mark_non_differentiable(*results)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return _by_argument(Gradients())
    state, *rest = ctx.saved_tensors
    tensors = CallTensors(*rest[_GRADIENTS:])
    given = Arguments.of(ctx.config, tensors)
    found = similarity_loss_backward(grad_loss, state, *rest[:_GRADIENTS], *given)
    return _by_argument(passes.of_inputs(tensors, *given.needed(found)))


def _by_argument(gradients: Gradients) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the operator's arguments; the others have none."""
    found = gradients._asdict()
    return tuple(found.get(name) for name in Arguments._fields)


similarity_loss.register_autograd(_backward, setup_context=_setup_context)
similarity_loss_backward.register_autograd(passes.no_second_derivative)


def loss(config: CallConfig, *tensors: Any) -> Tensor:
    """Loss of a call by the operator."""
    return similarity_loss(*Arguments.of(config, CallTensors(*tensors)))[0]
