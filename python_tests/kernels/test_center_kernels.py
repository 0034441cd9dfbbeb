"""The CPU's kernels of classes with several centers, and the operator's check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import run_python
from torch import Tensor

import unitsface_kernels  # noqa: F401
from unitsface_kernels.backends import native
from unitsface_kernels.backends.streaming.centers import CenterTiles, Largest


def _largest(products: Tensor, centers: int, engine: Any) -> Largest:
    n, m = len(products), products.shape[1] // centers
    out = Largest(torch.empty(n, m), torch.empty(n, m, dtype=torch.uint8))
    engine._take_largest(products, out)
    return out


def check_kernels(counts: list[int]) -> None:
    """The CPU's kernels against operations of Torch: largest, ties, NaN, and back."""
    from unitsface_kernels.backends.native.cpu_engine import CpuEngine

    generator = torch.Generator().manual_seed(0)
    torch_tiles = CenterTiles()
    kernels = CpuEngine(None, torch.device("cpu"))
    for centers in counts:
        kernels.centers = torch_tiles.centers = centers
        for n, m in ((1, 1), (5, 63), (3, 64), (2, 131), (0, 4)):
            # Few values: ties are common.
            products = torch.randint(-3, 3, (n, m * centers), generator=generator).float()
            products[torch.rand(products.shape, generator=generator) < 0.05] = torch.nan
            products[torch.rand(products.shape, generator=generator) < 0.05] = -torch.inf
            got, want = (_largest(products, centers, tiles) for tiles in (kernels, torch_tiles))
            assert torch.equal(got.which, want.which), (centers, n, m)
            assert torch.equal(got.cosine.nan_to_num(9.0), want.cosine.nan_to_num(9.0))
            for dtype in (torch.float32, torch.bfloat16):
                gradient = torch.randn(n, m, generator=generator).to(dtype)
                both = []
                for tiles in (kernels, torch_tiles):
                    out = torch.full((n, m * centers), torch.nan, dtype=dtype)
                    tiles._spread(gradient, want.which, out)
                    both.append(out)
                assert torch.equal(*both)


def test_kernels() -> None:
    check_kernels([1, 2, 3, 4, 5, 256])


@pytest.mark.extended
@pytest.mark.parametrize("isa", native.loader.extension().cpu.usable_isas())
def test_kernels_of_an_instruction_set(isa: str) -> None:
    code = (
        "import sys; sys.path.insert(0, 'python_tests'); sys.path.insert(0, 'python_tests/kernels')"
        "; from test_center_kernels import check_kernels; check_kernels([2, 3, 4, 7])"
    )
    done = run_python("-c", code, UNITSFACE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_operator_refuses_too_many() -> None:
    with pytest.raises(ValueError, match="centers must be <= 256"):
        torch.ops.unitsface.similarity_loss(
            torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 257, 4), None,
            None, None, None, "npt", [0.5, 1.0, 0.0], "mean", "native", torch.float32, 0.0,
            True, True, False,
        )  # fmt: skip
