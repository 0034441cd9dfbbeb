"""Seeded fuzzing: ``python -m python_tests.fuzz --help``.

A module ``target_<name>.py`` here is a target. Its ``run_one(seed: int) -> str | None`` is one run,
the same for the same seed. It returns a line that describes a failure, or None. Raising is a
failure, too.

Targets are imported before the runs fork: what they load at import is shared by all runs, which may
not depend on one another.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

# Threads of several runs share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Triton decides at import whether its kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("UNITSFACE_BACKEND", None)
# Threads that an import starts are missing in the forked runs, which would wait for them.
torch.set_num_threads(1)
# Warnings of Torch and Triton about deliberate draws; every process would repeat them.
warnings.filterwarnings("ignore", module=r"torch\.|triton\.|python_tests\.fuzz|fuzz\.")

# The tests import their helpers by name.
_TESTS = str(Path(__file__).resolve().parents[1])
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
