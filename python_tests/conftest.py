"""Set-up that has to precede every import of Torch and Triton, and one seed per test."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads that wait must not keep them from one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at import whether its kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite names backends itself.
os.environ.pop("UNITSFACE_BACKEND", None)


# Triton's interpreter is NumPy: it warns where a kernel computes lanes that it then masks.
IGNORED_WARNINGS = (
    "ignore::RuntimeWarning:triton.runtime.interpreter",
    "ignore:.torch.jit:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in IGNORED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run when asked for with -m."""
    if config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> str:
    from helpers import TARGETS

    return "targets: " + ", ".join(str(target) for target in TARGETS)
