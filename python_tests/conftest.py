"""Set-up that has to precede every import of Triton, and one seed per test."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at import whether its kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite names backends itself.
os.environ.pop("UNITSFACE_BACKEND", None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> str:
    from helpers import TARGETS

    return "targets: " + ", ".join(str(target) for target in TARGETS)
