"""Scalar functions of the policies in C++ and Triton: a few units in the last place, NaN stays."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from support.helpers import ROOT
from support.triton_tiles import DEVICE
from torch import Tensor

from unitsface_kernels.backends.triton.losses import math as functions
from unitsface_kernels.policy.operations import OPERATIONS

COMPILER = shutil.which("c++") or shutil.which("g++")


@dataclass(frozen=True)
class Function:
    """``cpp`` and ``triton`` are spellings with x; errors are relative, but absolute below
    ``floor``."""

    operation: str
    cpp: str
    triton: Callable[[Tensor], Tensor] | None
    low: float
    high: float
    others: tuple[float, ...] = ()
    floor: float = 0.0
    tolerance: float = 4e-7

    def wanted(self, x: Tensor) -> Tensor:
        others = (torch.tensor(other).double() for other in self.others)
        return OPERATIONS[self.operation].eager(x.double(), *others)


@triton.jit
def _exp(x):
    return functions.exp(x)


@triton.jit
def _log(x):
    return functions.log(x)


@triton.jit
def _tanh(x):
    return functions.tanh(x)


@triton.jit
def _sin(x):
    return functions.sin_cos(x)[0]


@triton.jit
def _cos(x):
    return functions.sin_cos(x)[1]


@triton.jit
def _sine(x):
    return functions.sine_of_cosine(x)


@triton.jit
def _acos(x):
    return functions.angle_of_cosine(x)


@triton.jit
def _cubed(x):
    return functions.pow_positive(x, 3.0)


@triton.jit
def _root(x):
    return functions.pow_positive(x, 0.5)


@triton.jit
def _margin(x):
    return functions.cosine_margin(x, 1.0, 0.5)[0]


@triton.jit
def _angular_margin(x):
    return functions.cosine_margin(x, 2.0, 0.3)[0]


@triton.jit
def _margin_slope(x):
    return functions.cosine_margin(x, 1.0, 0.5)[1]


@triton.jit
def _softplus(x):
    return functions.softplus_and_sigmoid(x)[0]


@triton.jit
def _sigmoid_slope(x):
    return functions.sigmoid_slope(x)


FUNCTIONS = {
    "exp": Function("exp", "exp_clamped(x)", _exp, -60.0, 60.0, tolerance=4e-6),
    "log": Function("log", "log_positive(x)", _log, 1e-3, 30.0, floor=0.1),
    "log_tiny": Function("log", "log_positive(x)", _log, 2e-38, 1e-30),
    "tanh": Function("tanh", "tanh_bounded(x)", _tanh, -9.0, 9.0),
    "tanh_near_0": Function("tanh", "tanh_bounded(x)", _tanh, 1e-9, 1e-4),
    "sin": Function("sin", "sin_cos(x).sine", _sin, -40.0, 40.0, floor=1.0),
    "cos": Function("cos", "sin_cos(x).cosine", _cos, -40.0, 40.0, floor=1.0),
    "sine": Function("sine", "sine_of_cosine(x)", _sine, -1.0, 1.0),
    "acos": Function("acos", "angle_of_cosine(x)", _acos, -1.0, 1.0),
    "cubed": Function("pow", "pow_positive(x, 3.0f)", _cubed, 1e-4, 2.0, (3.0,)),
    "root": Function("pow", "pow_positive(x, 0.5f)", _root, 1e-4, 2.0, (0.5,), tolerance=1e-6),
    "margin": Function(
        "margin", "cosine_margin(x, 1.0f, 0.5f).value", _margin, -1.0, 1.0, (1.0, 0.5), floor=1.0
    ),
    "angular_margin": Function(
        "margin", "cosine_margin(x, 2.0f, 0.3f).value", _angular_margin, -1.0, 1.0, (2.0, 0.3),
        floor=1.0, tolerance=1e-6,
    ),
    "margin_slope": Function(
        "margin_slope", "cosine_margin(x, 1.0f, 0.5f).slope", _margin_slope, -0.99, 0.99,
        (1.0, 0.5), floor=1.0, tolerance=1.5e-6,
    ),
    "softplus": Function("softplus", "softplus(x).value", _softplus, -60.0, 60.0, tolerance=4e-6),
    "sigmoid_slope": Function(
        "sigmoid_slope", "softplus(x).slope", _sigmoid_slope, -60.0, 60.0, tolerance=4e-6
    ),
}  # fmt: skip


def _check(function: Function, run: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(function.low, function.high, 4096, dtype=torch.float64).float()
    want = function.wanted(x)
    error = (run(x).double() - want).abs() / want.abs().clamp_min(function.floor or 1e-300)
    assert float(error[want != 0.0].max()) <= function.tolerance
    assert bool(run(torch.full((4096,), torch.nan)).isnan().all())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("functions")
    entries = "".join(
        f'extern "C" void run_{name}(const float* in, float* out, int n) {{\n'
        f"  for (int i = 0; i < n; ++i) {{ const float x = in[i]; out[i] = {f.cpp}; }}\n}}\n"
        for name, f in FUNCTIONS.items()
    )
    head = '#include "unitsface/scalar_math.h"\nusing namespace unitsface;\n'
    (folder / "functions.cpp").write_text(head + entries)
    flags = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
    done = subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc/include'}", str(folder / "functions.cpp"),
         "-o", str(folder / "functions.so")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "functions.so"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_cpp(name: str, library: ctypes.CDLL) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        entry = getattr(library, f"run_{name}")
        entry(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), len(x))
        return out

    _check(FUNCTIONS[name], run)


@triton.jit
def _kernel(x, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, FUNCTION(tl.load(x + i)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_triton(name: str) -> None:
    def run(x: Tensor) -> Tensor:
        out = torch.empty_like(x, device=DEVICE)
        _kernel[(1,)](x.to(DEVICE), out, FUNCTIONS[name].triton, len(x))
        return out.cpu()

    _check(FUNCTIONS[name], run)
