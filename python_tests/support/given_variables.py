"""Values of the tensors that a loss's formula reads beside its threshold: its variables."""

from __future__ import annotations

import torch
from torch import Tensor

from unitsface_kernels.losses import LossSpec

#: Of samples: more than any problem has.
IDENTITIES = 512


def draw_variables(
    spec: LossSpec, rows: int, columns: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Values in [0.3, 1.3) by name, the same every time; empty for most losses.

    Args:
        columns: of the call: classes, samples of a memory, or the rows of the batch.
    """
    generator = torch.Generator().manual_seed(77)
    identities = columns if spec.topology == "class" else IDENTITIES
    sizes = {"scalar": 1, "row": rows, "column": columns, "identity": identities}
    given = (variable for variable in spec.variables if variable.given)
    return {
        v.name: (0.3 + torch.rand(sizes[v.kind], generator=generator)).to(device) for v in given
    }


def streams(spec: LossSpec) -> bool:
    """Whether the tiles of a loss read variables: CUDA C++ and hand-made tiles have none."""
    return any(variable.streamed for variable in spec.variables)
