"""Launching kernels: the one place through which every kernel of this backend runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime.jit import KernelInterface

from .configs import TileConfig

#: Whether kernels run in the interpreter; their decorators read the same variable, at import.
INTERPRETED: bool = triton.knobs.runtime.interpret


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, such as 90; 0 for the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Compiled tile kernels as they are launched, recorded during a search.
_launched: list[Any] | None = None


@contextmanager
def observed() -> Iterator[list[Any]]:
    """Collects the compiled tile kernels that are launched inside, for their resources."""
    global _launched
    found: list[Any] = []
    _launched = found
    try:
        yield found
    finally:
        _launched = None


def run(kernel: KernelInterface, programs: int, *args: Any, **options: Any) -> Any:
    """``kernel`` with a one-dimensional grid; none at all for no programs.

    Returns:
        What was compiled; None for no programs, and from the interpreter.
    """
    if programs > 0:
        # Fusing multiplications with additions is meant; its default is about to change.
        return kernel[(programs,)](*args, enable_fp_fusion=True, **options)
    return None


def run_tile(
    kernel: KernelInterface, config: TileConfig, programs: int, *args: Any, **options: Any
) -> None:
    """A tile kernel with the blocks and resources of its configuration."""
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    compiled = run(
        kernel,
        programs,
        *args,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    if _launched is not None and compiled is not None:
        _launched.append(compiled)
