"""What is not finite in a run that diverges, and the steps that a gradient scaler skips."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from train.distributed import DistributedEnv
from train.errors import DivergedError

# From the first scale of 65536, this many halvings leave 1; one step in 2000 is usual.
SKIPS_IN_A_ROW = 16
LOWEST_SCALE = 1.0
TERMS = ("loss", "class loss", "pair loss")
UNKNOWN = "losses and layers are finite, gradients overflow"
ADVICE = (
    "try train.amp=bf16, which needs no scale, a smaller train.lr, train.warmup_epochs, or a loss "
    "of a smaller scale"
)


class ScaleWatch:
    """Counts the steps that a gradient scaler skips; all processes skip the same ones.

    :data:`SKIPS_IN_A_ROW` of them are an error, and a scale below :data:`LOWEST_SCALE` is a
    warning, once. Both name what is not finite.
    """

    def __init__(self, scaler: torch.amp.GradScaler, world: DistributedEnv) -> None:
        self._scaler, self._world = scaler, world
        self.in_a_row = 0
        self.skipped = 0  # since the last log line
        self.gradient = ""  # the first one that is not finite, where it is known
        self.found = ""  # what is not finite in a step whose loss is not
        self._course: list[str] = []  # scales after the last skipped steps
        self._warned = False

    @property
    def suspicious(self) -> bool:
        """True where the next skipped step may have to be explained."""
        return self.in_a_row > 0

    def after(self, step: int, stepped: bool, terms: Tensor, find: Callable[[], str]) -> None:
        """``terms``: losses of the step; ``find()`` names what is not finite in its forward pass.

        The scaler has waited for the device, so that reading values of a skipped step is free.

        Raises:
            DivergedError: on all processes.
        """
        if stepped:
            self.in_a_row, self.gradient = 0, ""
            return
        self.skipped += 1
        self.in_a_row += 1
        scale = self._scaler.get_scale()
        self._course = [*self._course[1 - SKIPS_IN_A_ROW :], f"{scale:g} at step {step}"]
        if not self.found and not torch.isfinite(terms).all():
            self.found = f"at step {step} {find()}"
        stuck = self.in_a_row >= SKIPS_IN_A_ROW
        if not stuck and (scale >= LOWEST_SCALE or self._warned):
            return
        self._warned = True
        scales = self._course
        course = ", ".join(scales if len(scales) < 5 else [scales[0], "...", *scales[-3:]])
        what = f"the scale of gradients sinks below {LOWEST_SCALE:g}, where small ones are lost: "
        if stuck:
            what = f"the last {self.in_a_row} steps were skipped, the scale of gradients halved: "
        said = f"train.amp=fp16: {what}{course}; {self.not_finite(find) or UNKNOWN}; {ADVICE}"
        if stuck:
            raise DivergedError(said)
        self._world.print(f"warning: {said}", file=sys.stderr)

    def not_finite(self, find: Callable[[], str] | None = None) -> str:
        """What is not finite, on the first process that has it; every process calls."""
        own = self.found or (find() if find else "") or self.gradient
        every = self._world.gather_objects(own)
        rank = next((rank for rank, text in enumerate(every) if text), None)
        if rank is None:
            return ""
        where = f" (process {rank})" if self._world.size > 1 else ""
        return f"first not finite{where}: {every[rank]}"

    def take(self) -> dict[str, float]:
        """Values for the metrics since the last call, where there is a scale."""
        if not self._scaler.is_enabled():
            return {}
        skipped, self.skipped = self.skipped, 0
        return {"grad_scale": self._scaler.get_scale(), "skipped_steps": skipped}


@torch.no_grad()
def first_not_finite(
    backbone: nn.Module,
    parts: Iterable[Tensor],
    terms: Tensor,
    autocast: Callable[[], AbstractContextManager[object]],
) -> str:
    """The first weight, layer or loss of a step that is not finite; empty if its forward pass is.

    The backbone runs once more on the ``parts`` of the batch; its statistics stay as they are.
    """
    for name, parameter in backbone.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weight backbone.{name}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def check(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            # Layers of other packages may take and return anything.
            if found or not isinstance(output, Tensor) or torch.isfinite(output).all():
                return
            inputs = [x for x in given if isinstance(x, Tensor) and x.numel()]
            reach = f"; its input reaches {float(inputs[0].abs().max()):.3g}" if inputs else ""
            dtype = str(output.dtype).removeprefix("torch.")
            found.append(f"the output of backbone.{name} ({type(module).__name__}, {dtype}{reach})")

        return check

    leaves = [(n, m) for n, m in backbone.named_modules() if not [*m.children()]]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    buffers = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
    try:
        for part in parts:
            with autocast():
                backbone.forward(part)  # of the modules themselves, compiled or not
            if found:
                return found[0]
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    losses = zip(TERMS, terms.tolist(), strict=False)
    bad = {name: value for name, value in losses if not torch.isfinite(torch.tensor(value))}
    # The sum is the consequence of one of its terms.
    name = next((n for n in reversed(TERMS) if n in bad), "")
    return f"the {name} ({bad[name]}), of finite features" if name else ""


@torch.no_grad()
def first_bad_gradient(modules: Iterable[nn.Module | None]) -> str:
    """The first gradient that is not finite, in the order of the backward pass; empty: none.

    Of the modules the last comes first, as do their parameters.
    """
    named = [(n, p) for m in modules if m is not None for n, p in m.named_parameters()]
    for name, parameter in reversed(named):
        grad = parameter.grad
        if grad is not None:
            values = grad._values() if grad.is_sparse else grad
            if not torch.isfinite(values).all():
                return f"the gradient of {name}"
    return ""
