"""Launches of compiled kernels, with a driver that only names its target and launches nothing.

``python python_tests/kernels/test_launch.py`` is what the test runs in a process of its own: here
Triton may be its interpreter, which is decided at import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Of Python and of C functions for a launch of a kernel over rows that has been compiled.
MOST_CALLS = 33


def test_a_cached_launch_is_tritons_own(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from support.helpers import run_python  # not there for the process that it runs

    done = run_python(__file__, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["7", "kernels"]


def _run() -> None:
    import torch
    from torch import Tensor
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from bench.fake_device.calls import counted
    from unitsface_kernels.backends.triton import launch
    from unitsface_kernels.backends.triton.kernels import rows

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    launched: list[tuple[int, tuple[Any, ...]]] = []

    def launcher(self: Any) -> Callable[..., None]:
        # After the grid: stream, function, two of metadata and two hooks.
        return lambda x, y, z, *rest: launched.append((x, rest[6:]))

    CompiledKernel._init_handles = lambda self: setattr(self, "function", 0)
    CompiledKernel.run = property(launcher)

    kernel, memory = rows.normalize_rows_kernel, torch.zeros(4096)
    options = {"ROWS": 4, "BLOCK": 512, "num_warps": 4}

    def arguments(source: Tensor, width: int = 512, start: int = 0, labels: Any = None) -> tuple:
        return source, None, start, memory, 512, memory, 3, width, labels

    half = torch.zeros(4096, dtype=torch.bfloat16)
    cases = [
        arguments(memory),
        arguments(half),
        # One element further: no vector loads.
        arguments(half[1:]),
        arguments(memory, width=500),
        arguments(memory, width=1),
        arguments(memory, start=2**31),
        arguments(memory, labels=torch.zeros(8, dtype=torch.int64)),
    ]
    hashes = []
    for programs in (1, 2, 3):
        for args in cases:
            compiled = launch.run(kernel, programs, *args, **options)
            own = kernel.warmup(*args, grid=(1,), enable_fp_fusion=True, **options)
            assert compiled.hash == own.hash
            hashes.append(own.hash)
            number, passed = launched.pop()
            assert number == programs
            # The same as Triton's first launch passed, whose case a later one is.
            everything = (*args, options["ROWS"], options["BLOCK"])
            assert len(passed) == len(everything)
            assert all(a is b or a == b for a, b in zip(passed, everything, strict=True))
    # A start is not specialized on its value, but on whether it fits 32 bits.
    launch.run(kernel, 1, *arguments(memory, start=5), **options)
    assert len(launch._ready) == len(cases) - 1
    assert launch.run(kernel, 0, *cases[0], **options) is None
    # The way from the package to the driver: Triton's part of it, too.
    found = counted(lambda: launch.run(kernel, 1, *cases[0], **options))
    assert found.python + found.c <= MOST_CALLS, found
    print(len(set(hashes)), "kernels")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    _run()
