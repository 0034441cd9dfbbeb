"""Set-up that has to precede every import of Torch and Triton, and one seed per test."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

if "UNITSFACE_CACHE_DIR" not in os.environ:
    # Nothing of the user's cache is used, and nothing is left there. Workers share this one.
    os.environ["UNITSFACE_CACHE_DIR"] = tempfile.mkdtemp(prefix="unitsface_kernels-tests-")
    atexit.register(shutil.rmtree, os.environ["UNITSFACE_CACHE_DIR"], ignore_errors=True)

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

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):
        from support.interpreter import prepare_once
        from triton.runtime import interpreter

        prepare_once(interpreter)


# Triton's interpreter is NumPy: it warns where a kernel computes lanes that it then masks.
IGNORED_WARNINGS = (
    "ignore::RuntimeWarning:triton.runtime.interpreter",
    "ignore:.torch.jit:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in IGNORED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is collected stays: the garbage collector would visit it every time, in seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Extension modules look for what was not freed."""
    gc.unfreeze()


# Each keeps a worker busy for most of a minute: the others fill up what these leave of the time.
LONGEST = (
    "test_cuda_codegen",
    "test_fake_device",
    "test_parity",
    "test_policy_eager_tiles",
    "test_policy_variables",
    "test_properties",
    "test_train_partial_fc",
    "test_transforms",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Every torch.empty is full of NaN, or of large integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_report_header() -> str:
    from support.helpers import TARGETS

    return "targets: " + ", ".join(str(target) for target in TARGETS)
