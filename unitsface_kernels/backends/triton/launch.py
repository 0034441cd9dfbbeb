"""Launching kernels: the one place through which every kernel of this backend runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
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


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches within are on the tensor's device, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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


# Compiled kernels and the rest of their arguments, by all that Triton's specialization looks at.
_ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
# What launches pass beside tensors, and beside functions as constants.
_VALUES = frozenset((int, bool, float, str, tuple, type(None)))
# By kernel: positions of the integers that are not specialized on their value.
_numbers: dict[int, tuple[int, ...]] = {}


def _key(kernel: KernelInterface, args: tuple[Any, ...], options: dict[str, Any]) -> tuple | None:
    """What the specialization of a kernel sees of a launch; None for one with unaligned pointers.

    Kernels exist as long as their module, and are cheaper to hash by their id.
    """
    addresses = 0
    for argument in args:
        if type(argument) not in _VALUES:
            addresses |= argument.data_ptr()
    if addresses & 15:
        return None
    # A tuple has hyper-parameters, which are floats.
    aspects = [
        a.dtype if (kind := type(a)) not in _VALUES else len(a) if kind is tuple else a
        for a in args
    ]
    numbers = _numbers.get(id(kernel))
    if numbers is None:
        free = [i for i, parameter in enumerate(kernel.params) if parameter.do_not_specialize]
        numbers = _numbers[id(kernel)] = tuple(free)
    for position in numbers:
        # 32 bits or 64.
        aspects[position] = -(2**31) <= args[position] < 2**31
    constants = [
        v if type(v) in _VALUES or not isinstance(v, KernelInterface) else id(v)
        for v in options.values()
    ]
    return id(kernel), driver.active.get_current_device(), *aspects, *options, *constants


def run(kernel: KernelInterface, programs: int, *args: Any, **options: Any) -> Any:
    """``kernel`` with a one-dimensional grid; none at all for no programs.

    Triton's own way to a kernel that it has compiled before binds, specializes and looks up
    arguments anew: a second dictionary takes less than half of the time.

    Returns:
        What was compiled; None for no programs, and from the interpreter.
    """
    if programs <= 0:
        return None
    if INTERPRETED:
        return kernel[(programs,)](*args, **options)
    key = _key(kernel, args, options)
    found = _ready.get(key) if key is not None else None
    if found is None:
        # Fusing multiplications with additions is meant; its default is about to change.
        compiled = kernel[(programs,)](*args, enable_fp_fusion=True, **options)
        if key is not None:
            _ready[key] = compiled, tuple(options[n] for n in kernel.arg_names[len(args) :])
        return compiled
    compiled, rest = found
    compiled[programs, 1, 1](*args, *rest)
    return compiled


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
