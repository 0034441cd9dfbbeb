"""Interfaces of modules and functions: signatures, texts, attributes, saved names.

``python python_tests/kernels/test_module_interfaces.py`` (from the root, after an intended change)
writes data/interfaces.json anew.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unitsface_kernels as uk


class Pairs(uk.policy.Pair):
    margin: uk.policy.Number = 0.5

    def negative(self, c):
        return c - self.margin


class Classes(uk.policy.Class):
    def negative(self, c):
        return c


RECORDED = Path(__file__).resolve().parent.parent / "data" / "interfaces.json"
MODULES = {
    **{name: getattr(uk, name) for name in uk.__all__ if name.endswith("Loss")},
    "FeatureMemory": uk.FeatureMemory,
    "PartialFC": uk.PartialFC,
}
FUNCTIONS = {
    name: getattr(uk, name) for name in uk.__all__ if name.startswith("fused_") or "_init" in name
}
REQUIRED = {
    "embedding_size": 6,
    "num_classes": 5,
    "num_identities": 4,
    "dim": 6,
    "loss": "cosface",
}
# What the presets of margin softmax pass on.
PASSED_ON = {
    "margin_gradient": "detached",
    "reduction": "sum",
    "backend": "reference",
    "skip_tolerance": 0.25,
    "adaptive_margin": 0.5,
    "init_std": 0.25,
    "interclass_filtering_threshold": 0.5,
}
# Words for which another one is legal; every other option changes with its type.
OTHER_WORDS = {
    "mean": "sum",
    "auto": "reference",
    "exact": "detached",
    "detached": "exact",
    "cosface": "arcface",
    "arcface": "cosface",
    "softsign": "sigmoid",
    "C": "A",
    "euclidean": "cosine",
    "squared": "euclidean",
    "hard": "soft",
    "negatives": "all",
    "arc": "cos",
    "cos": "arc",
    "easy": "hard",
    "random": "sorted",
    "am": "arc",
    "adaptive": "fixed",
    "acute": "all",
}


def signature(function: Any) -> str:
    words = []
    for p in inspect.signature(function).parameters.values():
        default = "" if p.default is p.empty else f" = {p.default!r}"
        words.append(f"{p.kind.name.lower()} {p.name}: {p.annotation}{default}")
    return "; ".join(words)


def required(cls: type[nn.Module]) -> dict[str, Any]:
    if cls is uk.UniTSFaceLoss:
        return {"class_loss": uk.CosFaceLoss(6, 5), "pair_loss": uk.USSLoss()}
    if cls is uk.PairLoss:
        return {"policy": Pairs()}
    names = inspect.signature(cls).parameters
    return {
        name: value
        for name, value in {**REQUIRED, "policy": Classes()}.items()
        if name in names and names[name].default is inspect.Parameter.empty
    }


def another(value: Any, name: str) -> Any:
    """A legal value of an option that is not its default."""
    if isinstance(value, str):
        return OTHER_WORDS[value] if name != "exchange" else "ring"
    if value is None:
        others = {"group": None, "device": "cpu", "num_identities": 4, "max_scale": 200.0}
        return torch.ones(5) if name == "counts" else others.get(name, 0.25)
    if name == "sample_rate":
        return 0.5
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 + 0.125


def changed(cls: type[nn.Module]) -> dict[str, Any]:
    """Every option of a module with another value."""
    found = dict(PASSED_ON) if issubclass(cls, uk.MarginSoftmaxLoss) else {}
    for name, p in inspect.signature(cls).parameters.items():
        if p.default is not p.empty and name != "thresholds":  # of policies that have some
            found[name] = another(p.default, name)
    if "negative_weight" in found and "base" in found:
        found["base"] = "uce"  # which alone has it
    return found


def described(module: nn.Module) -> dict[str, Any]:
    own = {name for name in (*vars(module), *dir(type(module))) if not name.startswith("_")}
    own -= {*vars(nn.Module()), *dir(nn.Module)}
    values = {name: getattr(module, name) for name in sorted(own - {"per_class", "shard"})}
    state = module.state_dict().items()
    return {
        "repr": repr(module),
        "methods": [name for name, value in values.items() if callable(value)],
        "values": {
            name: repr(value)
            for name, value in values.items()
            if isinstance(value, (str, int, float, tuple, dict, type(None)))
        },
        "state": {name: list(t.shape) for name, t in state if torch.is_tensor(t)},
        "parameters": [name for name, _ in module.named_parameters()],
    }


def interface(cls: type[nn.Module]) -> dict[str, Any]:
    given = required(cls)
    return {
        "signature": signature(cls),
        "constructor": signature(cls.__init__),
        "forward": signature(cls.forward),
        "default": described(cls(**given)),
        "changed": described(cls(**given, **changed(cls))),
    }


def interfaces() -> dict[str, Any]:
    return {
        "functions": {name: signature(function) for name, function in FUNCTIONS.items()},
        "modules": {name: interface(cls) for name, cls in MODULES.items()},
    }


def written(found: dict[str, Any]) -> str:
    """JSON with a line per name."""
    rooms = []
    for room, entries in found.items():
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        rooms.append(f"{json.dumps(room)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(rooms) + "\n}\n"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def test_every_name_is_recorded(recorded: dict[str, Any]) -> None:
    assert recorded["functions"].keys() == FUNCTIONS.keys()
    assert recorded["modules"].keys() == MODULES.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_their_signatures(name: str, recorded: dict[str, Any]) -> None:
    assert signature(FUNCTIONS[name]) == recorded["functions"][name]


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_their_interfaces(name: str, recorded: dict[str, Any]) -> None:
    found, expected = interface(MODULES[name]), recorded["modules"][name]
    for state in ("default", "changed"):
        # New names break nothing.
        methods = set(found[state].pop("methods"))
        assert methods >= set(expected[state].pop("methods"))
        values, wanted = found[state].pop("values"), expected[state].pop("values")
        assert {key: values.get(key) for key in wanted} == wanted
    assert found == expected


@pytest.mark.parametrize("name", MODULES)
def test_values_survive_copies_and_pickles(name: str) -> None:
    cls = MODULES[name]
    module = cls(**required(cls), **changed(cls))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert described(other) == described(module)


if __name__ == "__main__":
    RECORDED.write_text(written(interfaces()))
