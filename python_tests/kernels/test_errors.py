"""Every user mistake: its type, and the argument, expectation and given value in its message."""

from __future__ import annotations

import math
import re
from unittest import mock

import pytest
import torch
from support.given_variables import draw_variables
from support.helpers import DEVICES, run_python

import unitsface_kernels as uk
from unitsface_kernels import dispatch, ops
from unitsface_kernels.backends import reference
from unitsface_kernels.losses import REGISTRY, LossSpec

N, M, D = 4, 5, 3
PAIR = {
    "feats": torch.zeros(N, D),
    "labels": torch.zeros(N, dtype=torch.int64),
    "memory": torch.zeros(M, D),
    "memory_labels": torch.zeros(M, dtype=torch.int64),
}
CLASS = {
    "feats": torch.zeros(N, D),
    "weight": torch.zeros(M, D),
    "labels": torch.zeros(N, dtype=torch.int64),
}


def _features(name: str) -> list[tuple]:
    """Mistakes with a matrix of features: (changes, exception, parts of the message)."""
    zeros = torch.zeros
    return [
        ({name: None}, TypeError, [name, "torch.Tensor", "NoneType"]),
        ({name: [[0.0]]}, TypeError, [name, "torch.Tensor", "list"]),
        ({name: zeros(D)}, ValueError, [name, "(rows, D)", f"({D},)"]),
        ({name: zeros(1, 2, 3)}, ValueError, [name, "(rows, D)", "(1, 2, 3)"]),
        ({name: zeros(N, 0)}, ValueError, [name, "D ", f"({N}, 0)"]),
        ({name: zeros(N, D, dtype=torch.int64)}, TypeError, [name, "float32", "torch.int64"]),
        ({name: zeros(N, D, dtype=torch.complex64)}, TypeError, [name, "float32", "complex64"]),
        ({name: zeros(N, D).to_sparse()}, TypeError, [name, "dense", "sparse"]),
    ]


def _like_feats(name: str) -> list[tuple]:
    zeros = torch.zeros
    return [
        ({name: zeros(M, D + 1)}, ValueError, [name, f"D = {D}", f"({M}, {D + 1})"]),
        ({name: zeros(M, D, device="meta")}, ValueError, [name, "device", "cpu", "meta"]),
        (
            {name: zeros(M, D, dtype=torch.float64)},
            TypeError,
            [name, "float64", "float32"],
        ),
    ]


def _labels(name: str, count: int, high: int | None) -> list[tuple]:
    def full(value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype)

    bad = [-2, -100, torch.iinfo(torch.int64).min]
    bad += [] if high is None else [high, high + 7, torch.iinfo(torch.int64).max]
    top = "inf" if high is None else str(high)
    return [
        ({name: [0] * count}, TypeError, [name, "torch.Tensor", "list"]),
        ({name: torch.zeros(count)}, TypeError, [name, "integer", "float32"]),
        ({name: full(0, torch.bool)}, TypeError, [name, "integer", "bool"]),
        ({name: full(0)[:-1]}, ValueError, [name, f"({count},)", f"({count - 1},)"]),
        ({name: full(0)[:, None]}, ValueError, [name, f"({count},)", f"({count}, 1)"]),
        ({name: full(0).to("meta")}, ValueError, [name, "device", "cpu", "meta"]),
        *(({name: full(v)}, ValueError, [name, f"[-1, {top})", f"got {v}"]) for v in bad),
    ]


def _numbers(spec_name: str) -> list[tuple]:
    """From the registry: a new parameter is covered by being declared."""
    found: list[tuple] = []
    for parameter in REGISTRY[spec_name].parameters:
        name = parameter.name
        if parameter.choices:
            found += [({name: "other"}, ValueError, [name, *parameter.choices, "'other'"])]
            found += [({name: 1}, ValueError, [name, *parameter.choices, "1"])]
            continue
        kind, step = ("int", 1) if parameter.integer else ("float", 1.0)
        found += [
            ({name: "1"}, TypeError, [name, kind, "str"]),
            ({name: True}, TypeError, [name, kind, "bool"]),
            ({name: None}, TypeError, [name, kind, "NoneType"]),
        ]
        if parameter.integer:
            found += [({name: 2.0}, TypeError, [name, kind, "float"])]
            found += [({name: torch.ones(())}, TypeError, [name, kind, "Tensor"])]
        else:
            found += [
                ({name: math.nan}, ValueError, [name, "finite", "nan"]),
                ({name: math.inf}, ValueError, [name, "finite", "inf"]),
                ({name: -math.inf}, ValueError, [name, "finite", "-inf"]),
                ({name: torch.tensor(math.nan)}, ValueError, [name, "finite", "nan"]),
                # A margin of margin softmax may be one per row.
                ({name: torch.ones(2)}, ValueError, [name, "must have ", "one ", "(2,)"]),
                ({name: torch.tensor(1)}, TypeError, [name, "floating", "int64"]),
            ]
        if parameter.maximum is not None:
            high = parameter.maximum + step
            bound = f"<= {parameter.maximum:g}"
            found += [({name: high}, ValueError, [name, bound, f"got {high}"])]
        if parameter.minimum is not None:
            low = parameter.minimum
            found += [
                ({name: low}, ValueError, [name, f"> {low:g}", f"got {low}"]),
                ({name: low - step}, ValueError, [name, f"> {low:g}", f"got {low - step}"]),
            ]
    return found


COMMON = [
    ({"reduction": "average"}, ValueError, ["reduction", "mean, sum, none", "'average'"]),
    ({"reduction": None}, ValueError, ["reduction", "mean, sum, none", "None"]),
    ({"backend": "cuda"}, ValueError, ["backend", "auto, reference, native, triton", "'cuda'"]),
    ({"backend": None}, ValueError, ["backend", "auto, reference, native, triton", "None"]),
]
BATCH_OFFSET = [
    ({"batch_offset": 1.0}, TypeError, ["batch_offset", "int", "float"]),
    ({"batch_offset": True}, TypeError, ["batch_offset", "int", "bool"]),
    (
        {"batch_offset": 0, "memory": None, "memory_labels": None},
        ValueError,
        ["batch_offset", "memory", "None"],
    ),
]
CLASS_INDEX = [
    ({"class_index": [0]}, TypeError, ["class_index", "torch.Tensor", "list"]),
    ({"class_index": torch.zeros(2)}, TypeError, ["class_index", "integer", "float32"]),
    ({"class_index": torch.tensor([[0]])}, ValueError, ["class_index", "(K,)", "(1, 1)"]),
    ({"class_index": torch.tensor([0, M])}, ValueError, ["class_index", f"[0, {M})", f"got {M}"]),
    ({"class_index": torch.tensor([-1])}, ValueError, ["class_index", f"[0, {M})", "got -1"]),
    (
        {"class_index": torch.tensor([3, 1]), "labels": torch.tensor([0, 1, 2, 0])},
        ValueError,
        ["labels", "[-1, 2)", "got 2"],
    ),
]
ANY_THRESHOLD = [
    ({"b": None}, TypeError, ["b ", "float", "NoneType"]),
    ({"b": "0"}, TypeError, ["b ", "float", "str"]),
    ({"b": True}, TypeError, ["b ", "float", "bool"]),
    ({"b": torch.zeros((), dtype=torch.int64)}, TypeError, ["b ", "floating", "int64"]),
    ({"b": math.nan}, ValueError, ["b ", "finite", "nan"]),
    ({"b": -math.inf}, ValueError, ["b ", "finite", "-inf"]),
]
NO_NUMBERS = [(None, "NoneType"), ("0", "str"), (torch.zeros(1, dtype=torch.int64), "int64")]
ONE_THRESHOLD = [
    ({"b": torch.zeros(2)}, ValueError, ["b ", "one element", "(2,)"]),
    ({"b": torch.zeros(0)}, ValueError, ["b ", "one element", "(0,)"]),
]


def _base(spec: LossSpec) -> dict:
    """Legal arguments."""
    if spec.threshold == "none":
        b = {}
    else:
        b = {"b": torch.zeros(() if spec.threshold == "scalar" else M)}
    b |= draw_variables(spec, N, M)
    if spec.topology == "class":
        return CLASS | b
    # Some negatives and some positives.
    return PAIR | {"memory_labels": torch.arange(M)} | b


def _mistakes(spec: LossSpec) -> list[tuple]:
    if spec.topology == "class":
        found = [*_features("weight"), *_like_feats("weight"), *_labels("labels", N, M)]
        found += CLASS_INDEX
    else:
        high = M if spec.threshold == "per_column" else None
        found = [
            *_features("memory")[1:],
            *_like_feats("memory"),
            *_labels("labels", N, high),
            *_labels("memory_labels", M, high),
            ({"memory_labels": None}, ValueError, ["memory_labels", "memory", "None"]),
            ({"memory": None}, ValueError, ["memory", "memory_labels", "None"]),
            *BATCH_OFFSET,
        ]
    if spec.threshold != "none":
        # A function that takes one threshold or several calls a wrong number one of several.
        either = sum(other.function == spec.function for other in REGISTRY.values()) > 1
        several = ["b ", "per class" if spec.topology == "class" else "per identity", "(2, 2)"]
        shapes = [({"b": torch.zeros(2, 2)}, ValueError, several)]
        elsewhere = _base(spec)["b"].to("meta")
        found += [({"b": elsewhere}, ValueError, ["b ", "device", "cpu", "meta"]), *ANY_THRESHOLD]
        found += ONE_THRESHOLD if spec.threshold == "scalar" and not either else shapes
    for name in _base(spec).keys() & {variable.name for variable in spec.variables}:
        found += [({name: wrong}, TypeError, [name, "float", kind]) for wrong, kind in NO_NUMBERS]
    return [*_features("feats"), *found, *_numbers(spec.name), *COMMON]


CALLS = [
    pytest.param(spec, *mistake, id=f"{spec.name}-{i}-{next(iter(mistake[0]))}")
    for spec in REGISTRY.values()
    for i, mistake in enumerate(_mistakes(spec))
]


def _check(raised: BaseException, parts: list[str]) -> None:
    message = str(raised)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert "\n" not in message


@pytest.mark.parametrize(("spec", "changes", "error", "parts"), CALLS)
def test_mistakes(spec: LossSpec, changes: dict, error: type, parts: list[str]) -> None:
    """Raised before any work: neither the operator nor the reference is reached."""
    with (
        mock.patch.object(ops, "similarity_loss", side_effect=AssertionError("work began")),
        mock.patch.object(reference, "similarity_loss", side_effect=AssertionError("work began")),
        pytest.raises(error) as raised,
    ):
        getattr(uk, spec.function)(**(_base(spec) | changes))
    assert raised.type is error
    _check(raised.value, parts)


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_unchanged_arguments_are_legal(spec: LossSpec) -> None:
    assert float(getattr(uk, spec.function)(**_base(spec))) > 0


@pytest.mark.parametrize("cls", uk.CLASS_LOSSES.values(), ids=uk.CLASS_LOSSES)
def test_class_modules(cls: type) -> None:
    for arguments, error, parts in (
        ((0, 4), ValueError, ["embedding_size", ">= 1", "0"]),
        ((4, -1), ValueError, ["num_classes", ">= 1", "-1"]),
        ((4, 2.0), TypeError, ["num_classes", "int", "float"]),
        ((True, 2), TypeError, ["embedding_size", "int", "bool"]),
    ):
        with pytest.raises(error) as raised:
            cls(*arguments)
        _check(raised.value, parts)


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_a_named_backend_does_not_fall_back(name: str) -> None:
    """The error has the reason and the backends that can run."""
    others = [other for other in dispatch.BACKENDS if other != name]
    module = dispatch.load(name)
    with (
        mock.patch.object(module, "unavailable", return_value="it is broken"),
        pytest.raises(ValueError, match="it is broken") as raised,
    ):
        uk.fused_uss_loss(b=0.0, **PAIR, backend=name)
    _check(raised.value, [f"backend '{name}'", "float32", "cpu", "available here: "])
    listed = str(raised.value).split("available here: ")[1].split(", ")
    with mock.patch.object(module, "unavailable", return_value="it is broken"):
        assert listed == dispatch.available("cpu")
        assert set(listed) <= set(others)
        # "auto" goes on without it.
        assert float(uk.fused_uss_loss(b=0.0, **PAIR)) > 0


@pytest.mark.parametrize("name", ["native", "triton"])
def test_float64_is_for_the_reference(name: str) -> None:
    double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in PAIR.items()
    }
    with pytest.raises(ValueError, match="float64") as raised:
        uk.fused_uss_loss(b=0.0, **double, backend=name)
    _check(raised.value, [f"backend '{name}'", "available here: reference"])


def test_the_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    run = reference.similarity_loss

    def spy(*arguments):
        called.append(1)
        return run(*arguments)

    monkeypatch.setattr(reference, "similarity_loss", spy)
    first = dispatch.available("cpu")[0]
    assert first != "reference"
    monkeypatch.setenv("UNITSFACE_BACKEND", "reference")
    uk.fused_uss_loss(b=0.0, **PAIR)
    assert len(called) == 1
    uk.fused_uss_loss(b=0.0, **PAIR, backend=first)
    assert len(called) == 1
    monkeypatch.setenv("UNITSFACE_BACKEND", "auto")
    uk.fused_uss_loss(b=0.0, **PAIR)
    assert len(called) == 1
    monkeypatch.setenv("UNITSFACE_BACKEND", "fastest")
    with pytest.raises(ValueError, match="UNITSFACE_BACKEND") as raised:
        uk.fused_uss_loss(b=0.0, **PAIR)
    _check(raised.value, ["auto, reference, native, triton", "'fastest'"])
    uk.fused_uss_loss(b=0.0, **PAIR, backend="reference")


def test_a_broken_extension_is_reported_not_raised_on_import() -> None:
    """Importing works; "auto" goes on; requested by name, the error gives the reason."""
    code = """
import sys, torch
sys.modules["unitsface_kernels._native"] = None
import unitsface_kernels as uk
x, labels = torch.randn(3, 4), torch.tensor([0, 0, 1])
print(uk.fused_uss_loss(x, labels, 0.0).item() > 0)
try:
    uk.fused_uss_loss(x, labels, 0.0, backend="native")
except ValueError as error:
    print(error)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    works, message = done.stdout.strip().splitlines()
    assert works == "True"
    for part in ("backend 'native'", "cannot be imported", "pip install", "reference"):
        assert part in message


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
def test_label_ranges_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found on the device and reported by a later call, or at once with UNITSFACE_CHECK=1."""
    arguments = {k: v.cuda() for k, v in CLASS.items()}
    wrong = torch.full((N,), M, device="cuda")
    uk.fused_margin_softmax_loss(**{**arguments, "labels": wrong})
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="labels must be in"):
        uk.fused_margin_softmax_loss(**arguments)
    uk.fused_margin_softmax_loss(**arguments)
    monkeypatch.setenv("UNITSFACE_CHECK", "1")
    with pytest.raises(ValueError, match="labels must be in"):
        uk.fused_margin_softmax_loss(**{**arguments, "labels": wrong})


def test_a_compiled_call_checks_labels_in_the_operator() -> None:
    """torch.compile cannot branch on data: the error comes from the operator, not as a crash."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(labels: torch.Tensor) -> torch.Tensor:
        return uk.fused_margin_softmax_loss(CLASS["feats"], CLASS["weight"], labels)

    assert float(step(torch.zeros(N, dtype=torch.int64))) > 0
    for bad in (M, -100):
        with pytest.raises(Exception, match=re.escape(f"got {bad}")):
            step(torch.full((N,), bad))
