"""The CUDA code, on machines without a GPU: what was compiled, and what its kernels compute.

The first part reads the built extension with cuobjdump. The second part compiles the kernels as
C++ and runs them thread by thread (csrc/cuda/emulation).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.emulation import SOURCES, build_program, require_tools

from bench.gpu_model.sass import find_cuobjdump

LARGEST_REGISTERS = 255

# Kernels, as they are named in mangled symbols: once per policy, per element type, or once.
SUM_KERNELS = ("sum_tile_kernel",)
LOGSUMEXP_KERNELS = ("logsumexp_tile_kernel", "logsumexp_gradient_kernel", "positive_rows_kernel")
PAIR_KERNELS = (
    "pair_negatives_rows_kernel",
    "pair_negatives_columns_kernel",
    "pair_gradient_kernel",
)
# Only of policies in which positives take part.
PAIR_POSITIVE_KERNELS = ("pair_positives_rows_kernel", "pair_positives_columns_kernel")
ROW_KERNELS = ("normalize_rows_kernel", "normalize_rows_backward_kernel")
OTHER_KERNELS = (
    "add_partials_kernel",
    "merge_partials_kernel",
    "fold_partials_kernel",
    "nearest_tile_kernel",
    "permuted_kernel",
)
#: Has kernels of its own, beside those of every architecture for the same devices.
HOPPER = "sm_90a"
HOPPER_KERNELS = (
    *("fused_total_sm90_kernel", "SumEpilogue", "StatisticsEpilogue", "16GradientEpilogue"),
    *("PairNegativesEpilogue", "PairPositivesEpilogue", "PairGradientEpilogue"),
)
# Fused kernels (csrc/cuda/fused) by macro: two blocks of 256 threads share a multiprocessor.
FUSED_KERNELS = {
    "UF_SUM_LOSS": ("fused_sum_kernel", "fused_total_kernel"),
    "UF_LOGSUMEXP_LOSS": ("fused_logsumexp_kernel", "fused_logsumexp_gradient_kernel"),
    "UF_PAIR_LOGSUMEXP_LOSS": ("fused_pair_negatives_kernel", "fused_pair_gradient_kernel"),
    "UF_PAIR_LOGSUMEXPS_LOSS": ("fused_pair_negatives_kernel", "fused_pair_gradient_kernel"),
}
FUSED_REGISTERS = 128
# With thresholds of both directions of a pair: one block.
SEPARATE = re.compile(r"fused_sum_kernel\w+ELb1E")
#: Whose emulated kernels are compared with loops.
LOSSES = {
    "sum_tile": ["uss"],
    "logsumexp_tile": ["margin_softmax"],
    "logsumexp_pairs_tile": ["pair_softmax", "pair_logsumexp", "circle", "multi_similarity"],
}
UPDATE_RULES = ("Sgd", "MomentumSgd", "AdamW")
ELEMENT_TYPES = ("f", "13__nv_bfloat16", "6__half")


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    local: int


def find_extension() -> Path | None:
    spec = importlib.util.find_spec("unitsface_kernels")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for folder in folders for path in sorted(Path(folder).glob("_native*.so"))]
    return found[0] if found else None


def parse_resource_usage(text: str) -> list[Kernel]:
    """Kernels of the output of ``cuobjdump -res-usage``, one list over all architectures."""
    kernels, arch, name = [], None, None
    for line in text.splitlines():
        if match := re.search(r"arch\s*=\s*(sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function\s+(\S+?):\s*$", line):
            name = match[1]
        elif name is not None and (usage := dict(re.findall(r"(\w+):(\d+)", line))):
            assert arch is not None, f"no architecture before {name}"
            kernels.append(
                Kernel(arch, name, int(usage["REG"]), int(usage["STACK"]), int(usage["LOCAL"]))
            )
            name = None
    return kernels


def wasteful(kernels: list[Kernel]) -> list[Kernel]:
    return [
        kernel
        for kernel in kernels
        if kernel.stack or kernel.local or kernel.registers > LARGEST_REGISTERS
    ]


def policies(macro: str) -> list[str]:
    """Policies of losses with CUDA kernels, none of which reads variables."""
    text = (SOURCES / "include" / "unitsface" / "loss_list.def").read_text()
    found = re.findall(rf"^{macro}\(\w+,\s*(\w+)\)", text, re.MULTILINE)
    return [policy for policy in found if "kScalars" not in struct(policy)]


def struct(policy: str) -> str:
    headers = (SOURCES / "include" / "unitsface" / "generated").glob("*.h")
    body = next(t for t in map(Path.read_text, headers) if f"struct {policy} " in t)
    return body.split(f"struct {policy} ")[1].split("\n};")[0]


def has_positives(policy: str) -> bool:
    return "kPositives = true" in struct(policy)


def expected_kernels() -> list[tuple[str, str]]:
    """(kernel, policy or element type) as both appear in a mangled name."""
    expected = [(name, "") for name in OTHER_KERNELS]
    for macro, names in (
        ("UF_SUM_LOSS", SUM_KERNELS),
        ("UF_LOGSUMEXP_LOSS", LOGSUMEXP_KERNELS),
        ("UF_PAIR_LOGSUMEXP_LOSS", PAIR_KERNELS),
        ("UF_PAIR_LOGSUMEXPS_LOSS", PAIR_KERNELS),
    ):
        expected += [(n, f"{len(policy)}{policy}E") for n in names for policy in policies(macro)]
    for macro, names in FUSED_KERNELS.items():
        expected += [(n, f"{len(policy)}{policy}E") for n in names for policy in policies(macro)]
    expected += [("histogram_tile_kernel", f"CountingE{k}E") for k in range(3)]
    expected += [
        ("update_rows_kernel", f"{len(rule)}{rule}ELi{group}E")
        for rule in UPDATE_RULES
        for group in (1, 4)
    ]
    expected += [
        (name, f"{len(policy)}{policy}E")
        for policy in policies("UF_PAIR_LOGSUMEXP_LOSS")
        if has_positives(policy)
        for name in PAIR_POSITIVE_KERNELS
    ]
    return expected + [(name, f"I{kind}L") for name in ROW_KERNELS for kind in ELEMENT_TYPES]


def missing(kernels: list[Kernel]) -> list[tuple[str, str, str]]:
    """(arch, kernel, policy) that are expected for every architecture of the build."""
    archs = sorted({kernel.arch for kernel in kernels} - {HOPPER})
    return [
        (arch, name, argument)
        for arch in archs
        for name, argument in expected_kernels()
        if not any(
            kernel.arch == arch and f"{len(name)}{name}" in kernel.name and argument in kernel.name
            for kernel in kernels
        )
    ]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    extension = find_extension()
    if extension is None:
        pytest.skip("the extension is not built")
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump on PATH, next to nvcc or in triton")
    run = subprocess.run([tool, "-res-usage", str(extension)], capture_output=True, text=True)
    found = [k for k in parse_resource_usage(run.stdout) if "unitsface" in k.name]
    if not found and "does not contain device code" in run.stdout + run.stderr:
        pytest.skip("the package was built without CUDA")
    assert found, f"cuobjdump found no kernels: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    return found


def test_every_kernel_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    assert not missing(kernels)
    wanted = os.environ.get("UNITSFACE_CUDA_ARCHS")
    if wanted:
        archs = {kernel.arch for kernel in kernels}
        assert {
            f"sm_{arch}" for arch in re.findall(r"(\d+)[af]?(?!\d*[af]?-virtual)", wanted)
        } <= archs


def test_hopper_has_its_kernels(kernels: list[Kernel]) -> None:
    found = [kernel.name for kernel in kernels if kernel.arch == HOPPER]
    if not any(kernel.arch == "sm_90" for kernel in kernels):
        assert not found
    else:
        assert [name for name in HOPPER_KERNELS if not any(name in k for k in found)] == []


def test_no_stack_no_spills(kernels: list[Kernel]) -> None:
    assert not wasteful(kernels)


def test_two_blocks_of_fused_kernels_fit(kernels: list[Kernel]) -> None:
    names = {name for of_macro in FUSED_KERNELS.values() for name in of_macro}
    found = [k for k in kernels if any(f"{len(n)}{n}" in k.name for n in names)]
    assert found
    large = [k for k in found if k.registers > FUSED_REGISTERS and not SEPARATE.search(k.name)]
    assert not large


USAGE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {name}:
  REG:32 STACK:{stack} SHARED:2048 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_checks_can_fail() -> None:
    name = "_ZN9unitsface4cuda21merge_partials_kernelEPKfllPfS3_"
    good = parse_resource_usage(USAGE.format(name=name, stack=0))
    bad = parse_resource_usage(USAGE.format(name=name, stack=16))
    assert good == [Kernel("sm_90", name, registers=32, stack=0, local=0)]
    assert not wasteful(good)
    assert wasteful(bad) == bad
    absent = {name for _, name, _ in missing(good)}
    assert "sum_tile_kernel" in absent
    assert "merge_partials_kernel" not in absent


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("sum_tile", [], marks=pytest.mark.extended),
        pytest.param("logsumexp_tile", [], marks=pytest.mark.extended),
        pytest.param("logsumexp_pairs_tile", [], marks=pytest.mark.extended),
        pytest.param("nearest_tile", [], marks=pytest.mark.extended),
        pytest.param("normalize_rows", [], marks=pytest.mark.extended),
        pytest.param("histogram_tile", [], marks=pytest.mark.extended),
        ("permuted", []),
        pytest.param("update_rows", [], marks=pytest.mark.extended),
        *(
            pytest.param(name, ["thorough"], marks=pytest.mark.slow)
            for name in ("sum_tile", "logsumexp_tile", "logsumexp_pairs_tile", "nearest_tile")
        ),
    ],
)
def test_kernels_compute_what_loops_compute(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    require_tools()
    program = build_program(tmp_path, name, f"{name}.cu", losses=LOSSES.get(name, ()))
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
