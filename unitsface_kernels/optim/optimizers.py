"""Optimizers whose steps may touch some rows of a parameter and leave all others as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import dispatch
from ..backends.dense import is_dense
from .update import AdamWRule, RowUpdate, Rule, SGDRule, Update

AtStep = Callable[[Tensor | None], None]

# Elements of a matrix beyond which the base class's step, which copies a gradient with weight
# decay, is the memory that counts.
LARGE = 1 << 22


class RowOptimizer(torch.optim.Optimizer):
    """Steps on rows, which :class:`SampledSGD` and :class:`SampledAdamW` add to Torch's.

    The base class updates parameters with a dense gradient, except large float32 matrices, whose
    step gives the same result without a copy of the gradient. A sparse gradient with one sparse
    dimension, (1, K) indices and (K, ...) values, is a step on K rows: no other row changes,
    neither by momentum nor by weight decay, and its states do not decay.

    A parameter may also be stepped outside :meth:`step`, while its gradient is computed
    (:meth:`begin_row_update`, :meth:`fuse`).

    Attributes:
        fused: parameters that :meth:`step` leaves alone.
    """

    #: Options that a step on rows cannot have.
    _refused: tuple[str, ...]

    fused: set[Tensor]
    _at_step: dict[Tensor, AtStep]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused, self._at_step = set(), {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy or an unpickled optimizer has other parameters. Loading a state calls this, too.
        self.__dict__.setdefault("fused", set())
        self.__dict__.setdefault("_at_step", {})

    def fuse(self, parameter: Tensor, at_step: AtStep | None = None) -> None:
        """Leaves the steps of ``parameter`` to the caller, see :meth:`begin_row_update`.

        Args:
            parameter: one of the optimizer's.
            at_step: called once by every :meth:`step`, with the factor by which gradients were
                scaled since the backward pass, a () tensor, or None without a backward pass. It
                is the value of the parameter's gradient, which has to be a sparse tensor of
                sparse dimensions alone and at most one value.

        Raises:
            ValueError: not one of the optimizer's parameters, or an option that a step on rows
                cannot have.
        """
        self._check_options(self._group_of(parameter))
        self.fused.add(parameter)
        self._at_step.pop(parameter, None)
        if at_step is not None:
            self._at_step[parameter] = at_step

    def begin_row_update(self, parameter: Tensor) -> RowUpdate:
        """Begins a step on rows of ``parameter``, with its group's hyper-parameters of now.

        Args:
            parameter: one of the optimizer's, with or without a gradient.

        Returns:
            A function that updates rows from their gradient, in any number of blocks.

        Raises:
            ValueError: not one of the optimizer's parameters, or an option that a step on rows
                cannot have.
        """
        group = self._group_of(parameter)
        self._check_options(group)
        rule, states = self._begin(parameter, group)
        return Update(parameter, states, rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = {
            p: p.grad
            for p in self._parameters()
            if p in self.fused or _has_rows(p.grad) or self._is_large(p)
        }
        for parameter, gradient in own.items():
            self._check(parameter, gradient)
        try:
            for parameter in own:
                parameter.grad = None
            # Without a gradient it would change nothing.
            if any(p.grad is not None for p in self._parameters()):
                self._base_step()
        finally:
            for parameter, gradient in own.items():
                parameter.grad = gradient
        for parameter, gradient in own.items():
            if parameter in self.fused:
                self._run_hook(parameter, gradient)
            elif gradient is not None and not gradient.is_sparse:
                self.begin_row_update(parameter)(slice(0, len(gradient)), gradient, None, None)
            elif gradient is not None:
                gradient = gradient.coalesce()
                rows = slice(0, gradient._values().shape[0])
                update = self.begin_row_update(parameter)
                update(rows, gradient._values(), gradient._indices()[0], None)
        return loss

    def _is_large(self, parameter: Tensor) -> bool:
        gradient = parameter.grad
        return (
            gradient is not None
            and not gradient.is_sparse
            and parameter.dim() >= 2
            and parameter.numel() >= LARGE
            and parameter.dtype == gradient.dtype == torch.float32
            and is_dense(parameter)
            and dispatch.row_kernels(parameter.device) is not None
            and not any(self._group_of(parameter).get(name) for name in self._refused)
        )

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Rule, tuple[Tensor, ...]]:
        """Counts the step; its rule and the states, allocated if need be."""
        raise NotImplementedError

    def _base_step(self) -> None:
        # Step hooks run around this class's step. The base class's step is wrapped, too, once that
        # class has instances.
        step = super().step
        if getattr(step, "hooked", False):
            step.__wrapped__(self)  # type: ignore[attr-defined]
        else:
            cast(Callable[[], Any], step)()

    def _check(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if parameter not in self.fused:
            self._check_options(self._group_of(parameter))
        elif parameter in self._at_step and gradient is not None:
            marker = gradient.is_sparse and gradient.sparse_dim() == parameter.dim()
            if not marker or gradient._values().numel() > 1:
                raise ValueError(
                    "the gradient of a fused parameter must come from one backward pass of its "
                    f"loss alone, got one of shape {tuple(gradient.shape)} and layout "
                    f"{gradient.layout} from elsewhere or added up"
                )

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in self._refused:
            if group.get(name):
                raise ValueError(
                    f"{name} must be {'0' if name == 'dampening' else 'False'} for a parameter "
                    f"that is updated by rows, got {group[name]}"
                )

    def _run_hook(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if parameter in self._at_step:
            values = None if gradient is None else gradient._values()
            factor = values.reshape(()) if values is not None and values.numel() else None
            self._at_step[parameter](factor)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(p is parameter for p in group["params"]):
                return group
        raise ValueError("parameter must be one of the optimizer's parameters, got another")


def _has_rows(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.is_sparse and gradient.sparse_dim() == 1


class SampledSGD(RowOptimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD` that updates single rows where the gradient is sparse.

    Arguments and states are those of the base class, dense, and states can be exchanged with it.
    See :class:`RowOptimizer`; a step on rows does without ``maximize``, ``differentiable``,
    ``fused`` and ``dampening``, whose first step differs. A learning rate in a CUDA tensor
    synchronizes with the device.
    """

    _refused = ("dampening", "maximize", "differentiable", "fused")

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Rule, tuple[Tensor, ...]]:
        states: tuple[Tensor, ...] = ()
        momentum = float(group["momentum"])
        if momentum:
            state = self.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            states = (state["momentum_buffer"],)
        rule = SGDRule(
            step_size=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            momentum=momentum,
            nesterov=bool(group["nesterov"]),
        )
        return rule, states


class SampledAdamW(RowOptimizer, torch.optim.AdamW):
    """:class:`torch.optim.AdamW` that updates single rows where the gradient is sparse.

    Arguments and states are those of the base class, dense, and states can be exchanged with it.
    See :class:`RowOptimizer`; a step on rows does without ``amsgrad``, ``maximize``,
    ``differentiable``, ``capturable`` and ``fused``. ``step`` counts the steps of the parameter:
    the bias of the moments is corrected as if every row had been there each time, while they decay
    in steps that their row takes part in.
    """

    _refused = ("amsgrad", "maximize", "differentiable", "capturable", "fused")

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Rule, tuple[Tensor, ...]]:
        state = self.state[parameter]
        if not state:
            # On the CPU, as in the base class.
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        state["step"] += 1
        steps, lr = float(state["step"]), float(group["lr"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        rule = AdamWRule(
            step_size=lr / (1.0 - beta1**steps),
            kept=1.0 - lr * float(group["weight_decay"]),
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            second_correction=(1.0 - beta2**steps) ** 0.5,
            eps=float(group["eps"]),
        )
        return rule, (state["exp_avg"], state["exp_avg_sq"])
