"""Numbers that the published implementations gave on fixed inputs (float32, CPU)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import TARGETS, Target
from support.tolerances import REFERENCE_GRADIENT, REFERENCE_LOSS, check_same
from torch import Tensor

import unitsface_kernels
from unitsface_kernels.losses import REGISTRY

DATA = Path(__file__).resolve().parents[1] / "data"

# File -> keyword of the function -> name in the file, or a value.
PAIR = {
    "s2s_uss_s16_m0.1": {"scale": "s", "margin": "m"},
    "s2s_uss_s64_m0.1": {"scale": "s", "margin": "m"},
    "s2s_uss_bias_init_s64": {"scale": "s", "margin": "m"},
}
PAIR_BCE = {
    "s2s_bce_s16_m0.1": {"scale": "s", "margin": "m"},
    "s2s_bce_s64_m0.1": {"scale": "s", "margin": "m"},
}
PAIR_SOFTMAX = {
    "s2s_softmax_s16_m0.1": {"scale": "s", "margin": "m"},
    "s2s_softmax_s64_m0.1": {"scale": "s", "margin": "m"},
}
# File -> value.
THRESHOLD_INIT = {"s2s_uss_bias_init_s64": "bias_after_init"}
DETACHED = {"margin_gradient": "detached"}
CLASS = {
    "cosface_s64_m0.4": {"scale": "s", "m3": "m"},
    "insightface_cosface": {"scale": "s", "m1": "m1", "m2": "m2", "m3": "m3"},
    "insightface_arcface": {"scale": "s", "m1": "m1", "m2": "m2", "m3": "m3"} | DETACHED,
    "sphereface_r": {"scale": "s", "m1": "m", "m3": 0.0} | DETACHED,
}
UCE = {"uce_s16_m0.4": {"scale": "s", "margin": "m"}}
CLASS_BCE = {"bce_class_bias_s16_m0.4": {"scale": "s", "margin": "m"}}
SPHEREFACE2 = {
    "sphereface2_c": {"scale": "r", "margin": "m", "t": "t", "alpha": "alpha", "loss_weight": "lw"}
}
EPL = {
    "epl_cosface": {"base": "cosface", "scale": "s", "margin": "m", "k": "k"},
    "epl_uniface": {"base": "uce", "scale": "s", "margin": "m", "k": "k"},
}
RUNS = [(target, torch.float32) for target in TARGETS]
RUNS += [(target, torch.float64) for target in TARGETS if target.runs(torch.float64)]
each_run = pytest.mark.parametrize(
    ("target", "dtype"), RUNS, ids=lambda v: str(v).removeprefix("torch.")
)


class Stored:
    """One file: tensors on a target's device, keyword values, and the comparison."""

    def __init__(self, name: str, target: Target, dtype: torch.dtype) -> None:
        with np.load(DATA / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.target, self.dtype = target, dtype

    def tensor(self, name: str) -> Tensor:
        tensor = torch.from_numpy(np.asarray(self.arrays[name])).to(self.target.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def leaf(self, name: str) -> Tensor:
        return self.tensor(name).requires_grad_()

    def values(self, keywords: dict) -> dict:
        return {
            name: self.arrays[source].item()
            if isinstance(source, str) and source in self.arrays
            else source
            for name, source in keywords.items()
        }

    def check(self, loss: Tensor, **gradients: Tensor | None) -> None:
        check_same("loss", loss.detach(), self.tensor("loss"), REFERENCE_LOSS)
        for name, gradient in gradients.items():
            assert gradient is not None
            want = self.tensor(f"grad_{name}")
            check_same(name, gradient.reshape(want.shape), want, REFERENCE_GRADIENT)


@each_run
@pytest.mark.parametrize("name", PAIR)
def test_uss(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    learned = "bias" in stored.arrays
    feats = stored.leaf("x")
    b = stored.leaf("bias") if learned else stored.arrays["bias_after_init"].item()
    memory = stored.tensor("memory")
    loss = unitsface_kernels.fused_uss_loss(
        feats,
        stored.tensor("labels"),
        b,
        memory=memory,
        memory_labels=torch.arange(len(memory), device=memory.device),
        backend=target.backend,
        **stored.values(PAIR[name]),
    )
    loss.backward()
    stored.check(loss, x=feats.grad, **({"bias": b.grad} if isinstance(b, Tensor) else {}))


@each_run
@pytest.mark.parametrize("name", PAIR_BCE)
def test_pair_bce(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    feats, b, memory = stored.leaf("x"), stored.leaf("bias"), stored.tensor("memory")
    loss = unitsface_kernels.fused_pair_bce_loss(
        feats,
        stored.tensor("labels"),
        b.flatten(),
        memory=memory,
        memory_labels=torch.arange(len(memory), device=memory.device),
        backend=target.backend,
        **stored.values(PAIR_BCE[name]),
    )
    loss.backward()
    stored.check(loss, x=feats.grad, bias=b.grad)


def _with_jacobian(stored: Stored) -> None:
    """The stored gradient is that of unit weights: the normalization's Jacobian is ours."""
    unit = stored.tensor("weight")
    norms = unit.norm(dim=1, keepdim=True)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    gradient = stored.tensor("grad_weight")
    along = (gradient * unit).sum(dim=1, keepdim=True) * unit
    stored.arrays["grad_weight"] = (gradient - along).cpu().numpy()


@each_run
@pytest.mark.parametrize("name", CLASS)
def test_margin_softmax(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    feats, weight = stored.leaf("x"), stored.leaf("weight")
    if name == "sphereface_r":
        _with_jacobian(stored)
    loss = unitsface_kernels.fused_margin_softmax_loss(
        feats,
        weight,
        stored.tensor("labels"),
        backend=target.backend,
        **stored.values(CLASS[name]),
    )
    loss.backward()
    stored.check(loss, x=feats.grad, weight=weight.grad)


@each_run
@pytest.mark.parametrize("name", [*UCE, *CLASS_BCE])
def test_uce(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    feats, weight, b = stored.leaf("x"), stored.leaf("weight"), stored.leaf("bias")
    loss = unitsface_kernels.fused_uce_loss(
        feats,
        weight,
        stored.tensor("labels"),
        b.flatten(),
        backend=target.backend,
        **stored.values({**UCE, **CLASS_BCE}[name]),
    )
    loss.backward()
    stored.check(loss, x=feats.grad, weight=weight.grad, bias=b.grad)


@each_run
@pytest.mark.parametrize("name", SPHEREFACE2)
def test_sphereface2(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    feats, weight, b = stored.leaf("x"), stored.leaf("weight"), stored.leaf("bias")
    _with_jacobian(stored)
    loss = unitsface_kernels.fused_sphereface2_loss(
        feats,
        weight,
        stored.tensor("labels"),
        b,
        backend=target.backend,
        **stored.values(SPHEREFACE2[name]),
    )
    loss.backward()
    stored.check(loss, x=feats.grad, weight=weight.grad, bias=b.grad)


@each_run
@pytest.mark.parametrize("name", PAIR_SOFTMAX)
def test_pair_softmax(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    feats, memory = stored.leaf("x"), stored.tensor("memory")
    loss = unitsface_kernels.fused_pair_softmax_loss(
        feats,
        stored.tensor("labels"),
        memory=memory,
        memory_labels=torch.arange(len(memory), device=memory.device),
        backend=target.backend,
        **stored.values(PAIR_SOFTMAX[name]),
    )
    loss.backward()
    stored.check(loss, x=feats.grad)


@each_run
@pytest.mark.parametrize("name", THRESHOLD_INIT)
def test_threshold_init(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    memory = stored.tensor("memory")
    b = unitsface_kernels.uss_threshold_init(
        stored.leaf("x"),
        stored.tensor("labels"),
        memory=memory,
        memory_labels=torch.arange(len(memory), device=memory.device),
        scale=stored.arrays["s"].item(),
        backend=target.backend,
    )
    assert b.shape == ()
    assert b.dtype == dtype
    assert not b.requires_grad
    want = stored.tensor(THRESHOLD_INIT[name]).reshape(())
    check_same("b", b, want, REFERENCE_LOSS)


@each_run
@pytest.mark.parametrize("name", EPL)
def test_epl(name: str, target: Target, dtype: torch.dtype) -> None:
    stored = Stored(name, target, dtype)
    module = unitsface_kernels.EPLLoss(
        64, 50, **stored.values(EPL[name]), start_epoch=0, backend=target.backend
    ).to(target.device, dtype)
    with torch.no_grad():
        module.head.weight.copy_(stored.tensor("weight"))
        module.prototypes.copy_(stored.tensor("prototypes_before"))
        if "bias" in stored.arrays:
            module.head.threshold.copy_(stored.tensor("bias").squeeze())
    feats = stored.leaf("x")
    loss = module(feats, stored.tensor("labels"))
    loss.backward()
    gradients = {"x": feats.grad, "weight": module.head.weight.grad}
    if "bias" in stored.arrays:
        gradients["bias"] = module.head.threshold.grad
    stored.check(loss, **gradients)
    check_same(
        "prototypes", module.prototypes, stored.tensor("prototypes_after"), REFERENCE_GRADIENT
    )


def test_every_loss_has_reference_values() -> None:
    of_losses = {
        "uss": PAIR,
        "pair_bce": PAIR_BCE,
        "pair_softmax": PAIR_SOFTMAX,
        "pair_logsumexp": THRESHOLD_INIT,
        "margin_softmax": CLASS,
        "uce": UCE,
        "class_bce": CLASS_BCE,
        "sphereface2": SPHEREFACE2,
    }
    # No values of these were available.
    without = {"npt", "circle", "multi_similarity", "curricularface", "mv_softmax", "adacos"}
    without |= {"filtered_margin_softmax", "contrastive", "proxy_nca", "batch_hard"}
    assert of_losses.keys() | without == REGISTRY.keys()
    assert {name for names in of_losses.values() for name in names} == {
        path.stem for path in DATA.glob("*.npz")
    } - {"backbone_outputs", *EPL}
