"""A Python as on a bare machine with a GPU, for processes with this folder on PYTHONPATH.

Packages that such a machine lacks cannot be imported, and where ``UNITSFACE_SIMULATED`` is set,
there is a device whose kernels, events and graphs are recorded instead of run. Installers,
compilers and pytest only print their arguments.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

MISSING = ("omegaconf", "hypothesis", "xdist", "pytest_benchmark")
DRIVERS = ("bench.gpu_check", "run_default.py", "bench.gpu_check.device_tests")
STAND_INS = ("pip", "setup.py", "pytest")


class _Bare(PathFinder):
    """Finds what is installed, but for the missing packages."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            return None
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        """Their versions, too, are unknown."""
        for found in super().find_distributions(*context):
            if found.metadata["Name"].replace("-", "_") not in (*MISSING, "pytest_xdist"):
                yield found


_entered = []


def _simulate() -> None:
    from simulation import simulated

    # Kept to the end of the process.
    _entered.append(simulated(os.environ["UNITSFACE_SIMULATED"]))
    _entered[0].__enter__()


sys.meta_path[sys.meta_path.index(PathFinder)] = _Bare
if os.environ.get("UNITSFACE_SIMULATED"):
    arguments = sys.orig_argv[1:]
    called = next((name for name in STAND_INS if name in arguments[:3]), None)
    if called is not None:
        print("called", *arguments, os.environ.get("UNITSFACE_CUDA_ARCHS", ""), flush=True)
        if called == "pytest":
            print(
                "FAILED python_tests/test_a.py::test_b - AssertionError\n1 failed, 2 passed in 0.1s"
            )
        os._exit(1 if called == "pytest" else 0)
    # The driver itself needs no Torch; programs and their workers do.
    if not any(name.endswith(DRIVERS) for name in arguments):
        _simulate()
