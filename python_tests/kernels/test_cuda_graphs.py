"""A training step in a CUDA graph: one loss per driver, replayed on other data than it captured.

Without a device: what a step launches does not depend on its data, which is what makes a replay
right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import problem
from support.grid import extended_if, representatives
from support.helpers import FUSED, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels import validate
from unitsface_kernels.backends.streaming import logsumexp_pairs
from unitsface_kernels.losses import REGISTRY, LossSpec

ON_CUDA = [target for target in FUSED if target.device == "cuda"]
INTERPRETED = [target for target in FUSED if target.interpreted]
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


def _described(value: Any) -> Any:
    """What a graph keeps of a tensor: shape, dtype and strides, not values."""
    return (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, id=s.name, marks=extended_if(s.name != "margin_softmax"))
        for s in representatives(REGISTRY.values())
    ],
)
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_launches_do_not_depend_on_the_data(
    spec: LossSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unitsface_kernels.backends.triton import launch

    # On a CUDA device no label is read to find tiles without positives.
    monkeypatch.setattr(
        logsumexp_pairs, "_possible_positives", lambda call, engine, operands: (operands, None)
    )
    run, launches = launch.run, []

    def recorded(kernel: Any, programs: int, *args: Any, **options: Any) -> Any:
        scalars = [_described(argument) for argument in args]
        launches.append((kernel.fn.__name__, programs, scalars, options))
        return run(kernel, programs, *args, **options)

    monkeypatch.setattr(launch, "run", recorded)
    # Several tiles.
    given = problem(
        spec,
        rows=290,
        dim=8,
        columns=600 if spec.topology == "class" else None,
        column_gradient=True,
    )
    others = given.labels.flip(0).clone()
    others[::5] = -1
    other = replace(given, rows=given.rows.flip(0) + 0.1, labels=others)
    sequences = []
    for one in (given, other):
        launches.clear()
        leaves = one.leaves()
        one.loss("triton", **leaves).backward()
        sequences.append(list(launches))
    assert len(sequences[0]) >= 2
    assert sequences[0] == sequences[1]


def test_labels_of_a_capture_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check leaves an event behind that a later call queries; neither may be captured."""

    class OnCuda(Tensor):
        is_cuda = property(lambda self: True)
        device = property(lambda self: torch.device("cuda", 0))

    class Device:
        def __init__(self, device: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", None)
    validate.in_range("labels", torch.tensor([7]).as_subclass(OnCuda), -1, 5)


@needs_cuda
@pytest.mark.parametrize("spec", representatives(REGISTRY.values()), ids=lambda spec: spec.name)
@pytest.mark.parametrize("target", ON_CUDA, ids=str)
def test_a_captured_step_replays(
    target: Target, spec: LossSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a search would do (it waits for the device) ends a capture.
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", str(tmp_path))
    given = problem(spec, target.device, rows=37, columns=41 if spec.topology == "class" else None)
    leaves = given.leaves()

    def step() -> torch.Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        loss = given.loss(target.backend, **leaves)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    # The warm-up searched for none; here a search would start.
    monkeypatch.setenv("UNITSFACE_AUTOTUNE", "1")
    with torch.cuda.graph(graph):
        captured = step()
    monkeypatch.setenv("UNITSFACE_AUTOTUNE", "0")
    assert list(tmp_path.iterdir()) == []

    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    with torch.no_grad():
        leaves["rows"].copy_(leaves["rows"].flip(0) + 0.1)
    graph.replay()
    replayed = captured.clone(), {name: g.clone() for name, g in gradients.items() if g is not None}
    want = step()
    check_same("loss", replayed[0], want, SAME_LOSS)
    for name, gradient in replayed[1].items():
        expected = leaves[name].grad
        assert expected is not None
        check_same(name, gradient, expected, SAME_GRADIENT)


@needs_cuda
@pytest.mark.parametrize("target", ON_CUDA, ids=str)
def test_a_whole_step_replays_as_in_docs_gpu(target: Target) -> None:
    """Forward, backward and optimizer, a learning rate that changes, and other batches."""
    rows, size, classes = 96, 64, 300
    spec = REGISTRY["margin_softmax"]
    batches = [
        problem(spec, target.device, rows=rows, columns=classes, dim=size, norm=norm)
        for norm in (1.0, 2.0, 3.0)
    ]

    def trained(captured: bool) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(size, size, device=target.device)
        weight = torch.nn.Parameter(batches[0].columns.clone())
        lr = torch.tensor(1e-2, device=target.device)
        optimizer = torch.optim.AdamW([*model.parameters(), weight], lr=lr, capturable=True)
        feats, labels = batches[0].rows.clone(), batches[0].labels.clone()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            replace(batches[0], labels=labels).loss(
                target.backend, rows=model(feats), columns=weight
            ).backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for number, batch in enumerate(batches):
            feats.copy_(batch.rows)
            labels.copy_(batch.labels)
            lr.fill_(1e-2 / (number + 1))
            if captured:
                graph.replay()
            else:
                step()
        return weight.detach()

    check_same("weights", trained(captured=True), trained(captured=False), SAME_GRADIENT)
