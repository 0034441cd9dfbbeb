"""Training steps of named workloads, for tapes and host times: a builder of (rows, columns, D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.workloads import Workload, step
from unitsface_kernels import CLASS_LOSSES, PartialFC, SampledAdamW, SampledSGD

#: Makes inputs of (rows, columns, features) on "cuda" and returns a step; columns may be 0.
Build = Callable[[int, int, int], Callable[[], object]]


def loss_step(workload: Workload, backend: str, dtype: torch.dtype = torch.bfloat16) -> Build:
    """Forward and backward of a workload's loss, from gradients of None."""

    def build(rows: int, columns: int, size: int) -> Callable[[], object]:
        def features(count: int) -> Tensor:
            return torch.ones(count, size, dtype=dtype, device="cuda")

        inputs: dict[str, Tensor] = {
            "feats": features(rows).requires_grad_(),
            "labels": torch.zeros(rows, dtype=torch.int64, device="cuda"),
        }
        if workload.topology == "class":
            inputs["weight"] = features(columns).requires_grad_()
        elif workload.topology == "memory":
            inputs["memory"] = features(columns)
            inputs["memory_labels"] = torch.zeros(columns, dtype=torch.int64, device="cuda")
        if workload.loss != "margin_softmax":
            inputs["b"] = torch.zeros((), device="cuda").requires_grad_()
        loss = workload.fused(backend)
        return lambda: step(loss, inputs)

    return build


def module_step(loss: str, backend: str) -> Build:
    """Forward and backward of a loss over classes by its module, in bfloat16 by autocast."""

    def build(rows: int, columns: int, size: int) -> Callable[[], object]:
        # Values of weights are not needed.
        unset = mock.patch.object(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor)
        with unset, torch.device("cuda"):
            module = CLASS_LOSSES[loss](size, columns, backend=backend)
        feats = torch.ones(rows, size, device="cuda", requires_grad=True)
        labels = torch.zeros(rows, dtype=torch.int64, device="cuda")

        def run() -> None:
            feats.grad = module.weight.grad = None
            with torch.autocast("cuda", torch.bfloat16):
                loss = module(feats, labels)
            loss.backward()

        return run

    return build


@dataclass(frozen=True)
class HeadStep:
    """A step of :class:`PartialFC` on one rank.

    Attributes:
        loss: name of the head's loss.
        sample_rate: of its classes.
        optimizer: "sgd", with momentum, "adamw", or "none".
        when: of :meth:`PartialFC.fuse`; "": the gradient is stored.
        options: of the loss.
    """

    loss: str = "cosface"
    sample_rate: float = 1.0
    optimizer: str = "sgd"
    when: str = ""
    options: Mapping[str, object] = field(default_factory=dict)

    def build(self, backend: str) -> Build:
        """Forward, backward and the optimizer's step."""

        def build(rows: int, columns: int, size: int) -> Callable[[], object]:
            # Initial weights are drawn on the host, block by block: a step needs none.
            with (
                mock.patch.object(PartialFC, "reset_parameters"),
                mock.patch.object(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor),
            ):
                head = PartialFC(
                    self.loss,
                    size,
                    columns,
                    sample_rate=self.sample_rate,
                    device="cuda",
                    backend=backend,
                    **self.options,
                )
            optimizer = self._optimizer(head)
            if self.when:
                head.fuse(optimizer, self.when)
            feats = torch.ones(rows, size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            labels = torch.zeros(rows, dtype=torch.int64, device="cuda")

            def run() -> None:
                feats.grad = None
                head(feats, labels).backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()

            return run

        return build

    def _optimizer(self, head: PartialFC) -> Any:
        if self.optimizer == "none":
            return None
        if self.optimizer == "adamw":
            return SampledAdamW(head.parameters(), lr=0.1)
        return SampledSGD(head.parameters(), lr=0.1, momentum=0.9)
