"""A training step in a CUDA graph: one loss per driver, replayed on other data than it captured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.cases import problem
from support.grid import representatives
from support.helpers import FUSED, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same

from unitsface_kernels.losses import REGISTRY, LossSpec

ON_CUDA = [target for target in FUSED if target.device == "cuda"]
pytestmark = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


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
    # The search of the warm-up was not asked for; here it would be.
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
