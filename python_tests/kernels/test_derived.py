"""Functions and modules made from a spec, against those of the same losses written by hand."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from support.cases import problem
from torch import Tensor

import unitsface_kernels as uk
from unitsface_kernels import modules
from unitsface_kernels.functional.derived import public_function
from unitsface_kernels.losses import REGISTRY, LossSpec
from unitsface_kernels.modules.derived import module_of

SPECS = pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)


def _sizes(spec: LossSpec) -> tuple[int, ...]:
    """What the constructor of a derived module takes first."""
    if spec.topology == "class":
        return 7, 11
    return (512,) if spec.threshold == "per_column" else ()


@SPECS
def test_a_derived_function_is_the_one_written_by_hand(spec: LossSpec) -> None:
    derived, own = public_function(spec), getattr(uk, spec.function)
    known = inspect.signature(own).parameters
    made = inspect.signature(derived).parameters
    # npt has no tiles to leave out, and some functions take one center per class.
    assert made.keys() - known.keys() <= {"skip_tolerance", "centers"}
    others = [s.defaults().keys() for s in REGISTRY.values() if s.function == spec.function]
    assert known.keys() - made.keys() <= set().union(*others) - spec.defaults().keys()
    # ``b`` of a function for several losses stands where this loss has it.
    for name in known.keys() & made.keys():
        assert made[name].default == known[name].default, name
    p = problem(spec, rows=9, dim=7)
    arguments = {"feats": p.rows, "labels": p.labels}
    if spec.topology == "class":
        arguments["weight"] = p.columns
    if p.b is not None:
        arguments["b"] = p.b
    arguments |= p.variables
    assert torch.equal(derived(**arguments), own(**arguments))
    with pytest.raises(TypeError, match="unexpected keyword"):
        derived(**arguments, temperature=1.0)


@SPECS
def test_a_derived_module_computes_the_loss_and_trains(spec: LossSpec) -> None:
    made = module_of(spec)
    p = problem(spec, rows=9, dim=7)
    sizes = _sizes(spec)
    module = made(*sizes)
    assert all(bool((t == 0).all()) for n, t in module.named_parameters() if n == "threshold")
    feats = p.rows.detach().requires_grad_()
    loss = module(feats, p.labels, **p.variables)
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    arguments = {"feats": feats, "labels": p.labels, **p.variables}
    if "weight" in tensors:
        arguments["weight"] = tensors["weight"]
    if "threshold" in tensors:
        arguments["b"] = tensors["threshold"]
    assert torch.equal(loss, getattr(uk, spec.function)(**arguments))
    loss.sum().backward()
    assert all(t.grad is not None for t in (feats, *tensors.values()))
    assert torch.equal(copy.deepcopy(module)(feats, p.labels, **p.variables), loss)
    assert all(f"{name}=" in repr(module) for name in list(spec.defaults())[:1])


@SPECS
def test_a_derived_module_is_pickled_and_shows_its_arguments(
    spec: LossSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name in the package, where a loss without a module of its own has it."""
    made = module_of(spec)
    monkeypatch.setattr(modules, made.__name__, made, raising=False)
    sizes = _sizes(spec)
    module = pickle.loads(pickle.dumps(made(*sizes)))
    assert type(module) is made
    arguments = inspect.signature(made).parameters
    assert ["self", *arguments] == list(inspect.signature(made.__init__).parameters)
    assert spec.defaults().keys() <= arguments.keys()
    with pytest.raises(TypeError, match="temperature"):
        made(*sizes, temperature=1.0)
