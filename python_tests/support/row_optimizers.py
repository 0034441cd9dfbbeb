"""Parameters, gradients of rows and the rules that the tests of row optimizers compare."""

from __future__ import annotations

import pytest
import torch
from support.helpers import DEVICES
from torch import Tensor, nn

from unitsface_kernels import SampledAdamW, SampledSGD, dispatch

CLASSES = 23
SAMPLED = {torch.optim.SGD: SampledSGD, torch.optim.AdamW: SampledAdamW}
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")

OPTIONS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.03}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.03}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.03, "nesterov": True},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.02}),
    "adamw-decay": (
        torch.optim.AdamW,
        {"lr": 0.02, "weight_decay": 0.3, "betas": (0.6, 0.95), "eps": 1e-3},
    ),
}
each_rule = pytest.mark.parametrize("name", OPTIONS)
each_device = pytest.mark.parametrize("device", DEVICES)
each_shape = pytest.mark.parametrize("shape", [(CLASSES,), (CLASSES, 37), (CLASSES, 64)], ids=str)


def parameter(*shape: int, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, device=device))


def twin(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p.detach().clone())


def sparse(index: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """A gradient of rows, which ascend."""
    return torch.sparse_coo_tensor(
        index[None], values, like.shape, is_coalesced=True, check_invariants=True
    )


def some_rows(count: int = 9, device: str = "cpu") -> Tensor:
    return torch.randperm(CLASSES)[:count].sort().values.to(device)


def states_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    return {k: v for k, v in optimizer.state[p].items() if k in STATES and v is not None}


def use_kernels(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are stepped by the extension's kernel, or by what runs without it."""
    if which == "torch":
        monkeypatch.setattr(dispatch, "row_kernels", lambda device: None)
    else:
        assert all(dispatch.row_kernels(torch.device(device)) for device in DEVICES)
