"""C++ structs of random formulas, compiled in one translation unit and called in a loop."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.formulas import (
    PARAMS,
    Rounding,
    bindings,
    choose_by,
    close,
    cosines,
    policy_of,
    tree,
    without_threshold,
)
from support.helpers import ROOT
from torch import Tensor

from unitsface_kernels import policy
from unitsface_kernels.policy.cpp import cpp_struct
from unitsface_kernels.policy.derive import derivative
from unitsface_kernels.policy.expression import Expression
from unitsface_kernels.policy.form import kernel_form, term_of
from unitsface_kernels.policy.formula import COSINE, THRESHOLD, Formula

COMPILER = shutil.which("c++") or shutil.which("g++")
if COMPILER is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC")
ISAS = {"baseline": (), "avx2": ("-mavx2", "-mfma")}
VERSION = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
#: GCC reports which loops it vectorizes.
VECTORIZED = ("-fopt-info-vec-optimized",) if "Free Software Foundation" in VERSION else ()
#: Formulas that a translation unit has.
COUNT = 30

HEAD = """
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"
namespace unitsface {
inline namespace UF_ISA {
"""
TERMS = """
extern "C" void run_{name}(const float* p, const float* __restrict cosine, float threshold,
                           const int* __restrict labels, float* __restrict value,
                           float* __restrict dcosine, float* __restrict dthreshold, int count) {{
  const unitsface::{name} policy(p);
#pragma omp simd
  for (int i = 0; i < count; ++i) {{
    const unitsface::Term term = policy.evaluate(cosine[i], threshold, labels[i] == 1);
    value[i] = term.value;
    dcosine[i] = term.dcosine;
    dthreshold[i] = term.dthreshold;
  }}
}}
"""
LOGITS = """
extern "C" void run_{name}_{side}(const float* p, const float* __restrict cosine,
                                  float* __restrict value, float* __restrict dcosine, int count) {{
  const unitsface::{name} policy(p);
#pragma omp simd
  for (int i = 0; i < count; ++i) {{
    const unitsface::Logit logit = policy.{side}(cosine[i]);
    value[i] = logit.value;
    dcosine[i] = logit.dcosine;
  }}
}}
"""


def _drawn(count: int, seed: int) -> dict[str, Formula]:
    """Formulas of all combinations by the names of their structs."""
    choose = choose_by(random.Random(seed))
    formulas = {}
    for place in range(count):
        combine = ("sum", "softplus", "softplus", "logsumexp")[place % 4]
        sides = [tree(choose, 3) for _ in range(2)]
        if combine == "logsumexp":
            sides = [without_threshold(side) for side in sides]
        elif place % 8 < 4:
            sides = [("sub", side, ("leaf", "threshold")) for side in sides]
        if place % 10 == 9:
            sides[0] = None  # type: ignore[call-overload]
        formulas[f"Drawn{place}"] = policy_of(*sides, combine).formula  # type: ignore[arg-type]
    return formulas


def _source(formulas: dict[str, Formula]) -> str:
    structs = "\n".join(cpp_struct(formula, name) for name, formula in formulas.items())
    entries = []
    for name, formula in formulas.items():
        form = kernel_form(formula)
        if form.term is not None:
            entries.append(TERMS.format(name=name))
        for side in ("positive", "negative"):
            if getattr(form, side) is not None:
                entries.append(LOGITS.format(name=name, side=side))
    return f"{HEAD}{structs}}}\n}}\n{''.join(entries)}"


def _compiled(source: str, folder: Path, isa: str, *flags: str) -> tuple[ctypes.CDLL, str]:
    """The library, and the output of the compiler."""
    path, library = folder / "drawn.cpp", folder / f"drawn_{isa}.so"
    path.write_text(source)
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, *FLAGS, *ISAS[isa], *flags, f"-I{ROOT / 'csrc/include'}", "-shared",
         *("-Wall", "-Wextra", "-Wno-unknown-pragmas"), str(path), "-o", str(library)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library)), done.stderr


def _call(library: ctypes.CDLL, name: str, constants: tuple[float, ...], cosine: Tensor,
          extra: tuple[object, ...], outputs: int) -> list[Tensor]:  # fmt: skip
    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    packed = torch.tensor(constants or (0.0,), dtype=torch.float32)
    single = cosine.float().contiguous()
    found = [torch.empty_like(single) for _ in range(outputs)]
    getattr(library, name)(
        pointer(packed), pointer(single), *extra, *map(pointer, found), len(single)
    )
    return found


def _wanted(formula: Formula, side: str) -> list[Expression]:
    if formula.combine == "logsumexp":
        value = getattr(formula, side)
        return [value, derivative(value, COSINE)]
    value = term_of(formula, side == "positive")
    return [value, derivative(value, COSINE), derivative(value, THRESHOLD)]


def _got(
    library: ctypes.CDLL, name: str, formula: Formula, params: tuple[float, ...], side: str,
    cosine: Tensor, threshold: float,
) -> list[Tensor]:  # fmt: skip
    constants = kernel_form(formula).constants(params)
    if formula.combine == "logsumexp":
        return _call(library, f"run_{name}_{side}", constants, cosine, (), 2)
    labels = torch.full(cosine.shape, int(side == "positive"), dtype=torch.int32)
    extra = (ctypes.c_float(threshold), ctypes.c_void_p(labels.data_ptr()))
    return _call(library, f"run_{name}", constants, cosine, extra, 3)


@dataclass(frozen=True)
class Library:
    loaded: ctypes.CDLL
    formulas: dict[str, Formula]
    isa: str
    said: str


@pytest.fixture(
    scope="module",
    params=[
        ("avx2", 7),
        pytest.param(("baseline", 7), marks=pytest.mark.extended),
        *(pytest.param(("avx2", seed), marks=pytest.mark.extended) for seed in range(20, 24)),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    isa, seed = request.param
    if isa == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    formulas = _drawn(COUNT, seed)
    folder = tmp_path_factory.mktemp(isa)
    loaded, said = _compiled(_source(formulas), folder, isa, *VECTORIZED)
    return Library(loaded, formulas, isa, said)


def test_structs_compile_without_warnings(library: Library) -> None:
    assert "warning" not in library.said


def test_most_loops_vectorize(library: Library) -> None:
    """GCC leaves a few: comparisons with results of functions that select within."""
    if library.isa == "baseline":
        pytest.skip("SSE2 has no instruction for selections")
    if not VECTORIZED:
        pytest.skip("only GCC says what it vectorizes")
    text = (Path(library.loaded._name).parent / "drawn.cpp").read_text().splitlines()
    lines = {int(n) for n in re.findall(r"drawn\.cpp:(\d+):\d+: optimized: loop vec", library.said)}
    loops = [n for n, line in enumerate(text, 1) if line.startswith("  for (int i = 0")]
    # A message names one of the loop's lines.
    done = [n for n in loops if lines & set(range(n, n + 5))]
    assert len(done) >= 0.8 * len(loops)


def test_structs_compute_their_formulas(library: Library) -> None:
    loaded, formulas = library.loaded, library.formulas
    for name, formula in formulas.items():
        for params in PARAMS:
            for side in ("positive", "negative"):
                if getattr(formula, side) is None and formula.combine == "logsumexp":
                    continue
                wanted = _wanted(formula, side)
                rounding = Rounding(wanted, bindings(formula, params, cosines(), 0.6))
                got = _got(loaded, name, formula, params, side, cosines(), 0.6)
                for found, want in zip(got, wanted, strict=True):
                    agrees = close(found, rounding, want)
                    assert bool(agrees.all()), (
                        f"{name} {side} {params} at {cosines()[~agrees.expand(61)][:3]}\n"
                        + cpp_struct(formula, name)
                    )


def test_structs_keep_nan(library: Library) -> None:
    loaded, formulas = library.loaded, library.formulas
    nan = torch.full((9,), torch.nan, dtype=torch.float64)
    seen = 0
    for name, formula in formulas.items():
        for side in ("positive", "negative"):
            value = getattr(formula, side)
            if value is not None and "cosine" in value.reads:
                got = _got(loaded, name, formula, PARAMS[0], side, nan, 0.6)
                assert bool(got[0].isnan().all()), cpp_struct(formula, name)
                seen += 1
    assert seen > COUNT


class Everything(policy.Pair):
    """Each operation of the vocabulary, once."""

    combine = "softplus"
    margin: policy.Number = 0.4
    t: policy.Number = 2.5
    b: policy.Threshold

    def positive(self, c):
        x = policy.exp(c) + policy.log(2 + c) + policy.sqrt(2 + c) + policy.tanh(c)
        x = x + policy.sin(3 * c) * policy.cos(2 * c) + policy.acos(c) * policy.sine(c)
        return x + policy.pow(0.5 + 0.5 * c, self.t) + policy.sigmoid(c) - self.b

    def negative(self, c):
        x = policy.cosine_margin(c, 1, self.margin) / (policy.softplus(c) + 1)
        return policy.where(c < 0, policy.abs(c), policy.maximum(c - self.margin, 0)) + x - self.b


def test_all_functions_vectorize_and_call_no_library(tmp_path: Path) -> None:
    source = _source({"Everything": Everything.formula})
    _, said = _compiled(source, tmp_path, "avx2", *VECTORIZED)
    assert not VECTORIZED or "optimized: loop vectorized using 32 byte vectors" in said
    nm = subprocess.run(
        ["nm", "-D", "--undefined-only", str(tmp_path / "drawn_avx2.so")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    strong = [name for name in nm.stdout.split() if not name.startswith(("_", "w", "U"))]
    assert strong == []


CUDA = """
extern "C" __global__ void run(const float* p, const float* cosine, float threshold,
                               const int* labels, float* out) {
  const unitsface::Everything policy(p);
  const int i = threadIdx.x;
  const unitsface::Term term = policy.evaluate(cosine[i], threshold, labels[i] == 1);
  out[3 * i] = term.value;
  out[3 * i + 1] = term.dcosine;
  out[3 * i + 2] = term.dthreshold;
}
"""


@pytest.mark.extended
def test_all_functions_compile_for_gpus_without_stack(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source = tmp_path / "everything.cu"
    source.write_text(f"{HEAD}{cpp_struct(Everything.formula, 'Everything')}}}\n}}\n{CUDA}")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc/include'}",
         str(source), "-o", str(tmp_path / "everything.cubin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr


@pytest.mark.parametrize("name", ["double", "p", "exp_clamped", "x0", "größe", "a b; int evil"])
def test_names_of_users_cannot_break_a_struct(name: str, tmp_path: Path) -> None:
    """They may be words of C++, names of the struct's own, or no identifiers at all."""

    def negative(self: object, c: object) -> object:
        return c * getattr(self, name)  # type: ignore[operator]

    body = {"__annotations__": {name: policy.Number}, name: 3.0, "negative": negative}
    formula = type("Odd", (policy.Pair,), body).formula
    loaded, _ = _compiled(_source({"Odd": formula}), tmp_path, "baseline")
    got = _got(loaded, "Odd", formula, (3.0,), "negative", cosines(3), 0.0)
    torch.testing.assert_close(got[0], 3.0 * cosines(3).float())


class Uss(policy.Pair):
    combine = "softplus"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.1
    b: policy.Threshold

    def positive(self, c):
        return self.scale * (c - self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b


def test_one_softplus_serves_positives_negatives_and_derivatives() -> None:
    text = cpp_struct(Uss.formula, "Uss")
    assert text.count("softplus(") == 1
    # And two constants: the scale, and the margin in logit units.
    assert "kParameters = 2" in text
    assert kernel_form(Uss.formula).constants((64.0, 0.1)) == (64.0, 64.0 * 0.1)
