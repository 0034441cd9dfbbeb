"""One engine of the Triton backend, for tests of single tiles; needs Triton."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from unitsface_kernels.backends import triton as backend
from unitsface_kernels.backends.streaming import Call
from unitsface_kernels.losses import REGISTRY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = backend.unavailable(DEVICE, torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from unitsface_kernels.backends.triton import workspace  # noqa: E402

# For one tile: matmuls in the dtype, everything else in float32.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every buffer, so that an element that nothing wrote shows."""
    allocate = workspace.Workspace.empty

    def poisoned(self: workspace.Workspace, *args: object, **kwargs: object) -> Tensor:
        tensor = allocate(self, *args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    monkeypatch.setattr(workspace.Workspace, "empty", poisoned)


def make_call(
    loss: str,
    rows: Tensor,
    columns: Tensor | None = None,
    per_column: bool = False,
    **values: float | str,
) -> Call:
    spec = REGISTRY[loss]
    if per_column:
        spec = dataclasses.replace(spec, threshold="per_column")
    labels = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    params = spec.pack(spec.defaults() | values)
    static = (spec, params, "sum", "triton", rows.dtype, None, 0.0, True, True, True)
    return Call(*static, rows=rows, row_labels=labels, columns=columns)


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
