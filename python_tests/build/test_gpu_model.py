"""The GPU model's counting and formulas on small examples; test_codegen.py runs it on kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.fake_device import Array, Gemm
from bench.gpu_model import budgets, compile, predict, sass, tiles, tritons
from bench.gpu_model.chips import CHIPS, H200

LINE = "        /*{:04x}*/                   {} ;                    /* 0x0000000000000000 */"
WGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
IR = """
  tt.func public @kernel(%a: !tt.ptr<bf16>, %depth: i32) {
    %total = arith.constant dense<0.0> : tensor<128x64xf32>
    %zero = arith.constant 0 : i32
    %step = arith.constant 32 : i32
    %sum:2 = scf.for %k = %zero to LAST step %step iter_args(%acc = %total) -> (f32)  : i32 {
      %next = tt.dot %x, %y, %acc : tensor<128x32xbf16> * tensor<32x64xbf16> -> tensor<128x64xf32>
"""


def _code(*instructions: str) -> list[sass.Instruction]:
    lines = [LINE.format(16 * place, text) for place, text in enumerate(instructions)]
    return sass.parse("\n".join(["\t\tFunction : kernel", *lines]))


def _kernel(**changes) -> compile.Compiled:
    found = compile.Compiled(
        triton="3.6.0",
        architecture=90,
        label="step",
        kernel="kernel",
        variant="bf16",
        registers=128,
        stack=0,
        local=0,
        shared=96 * 1024,
        warps=8,
        max_registers=None,
        families=(),
        warnings=(),
        gemm=compile.Gemm(128, 128, 512, 64, 2),
        products=32,
        iterations=0,
        before={"ALU": 100},
        inside={"TENSOR": 32, "ALU": 68},
        after={"FMA": 600, "IMAD": 100, "MUFU": 100},
        stored=32 * 1024,
        loaded=4096,
    )
    return replace(found, **changes)


def test_instructions_are_sorted_into_pipes() -> None:
    code = _code(
        *("@!P0 IADD3 R1, R2, R3, RZ", "@UP0 UIADD3 UR4, UR4, 0x1, URZ", "MUFU.EX2 R0, R1", "NOP"),
        *("STG.E.128 desc[UR4][R2.64], R4", "IMAD.WIDE R2, R3, 0x4, R4", "FFMA R1, R2, R3, R4"),
    )
    pipes = ["ALU", "UNIFORM", "MUFU", "STORE", "IMAD", "FMA"]
    assert [instruction.pipe for instruction in code] == pipes
    found = sass.regions(code, products=0)
    assert found.before == Counter(pipes)
    assert (found.iterations, found.stored, found.loaded) == (0, 16, 0)


def test_a_loop_counts_once_per_iteration() -> None:
    """Steps of the GEMM before the loop and peeled off after it do not change that."""
    code = _code(
        *("MOV R1, R2", WGMMA),
        *("IADD3 R1, R2, R3, RZ", WGMMA, WGMMA, "@P0 BRA 0x20"),
        *(WGMMA, "FADD R1, R2, R3", "EXIT", "BRA 0x90"),
    )
    assert sass.loops(code) == [(2, 5)]
    found = sass.regions(code, products=8)
    assert found.iterations == 3
    assert found.before == Counter(ALU=1)
    assert found.inside == Counter(TENSOR=8, ALU=3, BRANCH=3)
    assert found.after == Counter(FMA=1, BRANCH=2)


def test_one_step_of_a_loop_whose_iterations_are_not_known() -> None:
    code = _code("MOV R1, R2", "IADD3 R1, R2, R3, RZ", WGMMA, WGMMA, "@P0 BRA 0x10", "EXIT")
    found = sass.regions(code, products=1, one_step=True)
    assert found.inside["TENSOR"] == 1
    assert found.iterations == 0.5


def test_an_unrolled_loop_lies_between_its_products() -> None:
    code = _code("MOV R1, R2", WGMMA, "IADD3 R1, R2, R3, RZ", WGMMA, "FADD R1, R2, R3")
    found = sass.regions(code, products=2)
    assert found.iterations == 0
    assert (found.before, found.inside) == (Counter(ALU=1), Counter(TENSOR=2, ALU=1))


def test_the_shape_of_a_gemm_is_read_from_the_ir() -> None:
    constant = IR.replace("LAST", "%last").replace(
        "%zero =", "%last = arith.constant 512 : i32\n%zero ="
    )
    want = compile.Gemm(128, 64, 512, 32, 2)
    assert compile.gemm_of(constant, {}) == want
    assert compile.gemm_of(IR.replace("LAST", "%depth"), {"depth": 512}) == want
    # Known on the device only: one step.
    assert compile.gemm_of(IR.replace("LAST", "%depth"), {}) == replace(want, depth=32, open=True)
    assert compile.gemm_of("tt.func public @kernel() {}", {}) is None
    assert want.operand_bytes == (128 + 64) * 512 * 2


def test_programs_per_sm_are_limited_by_what_runs_out_first() -> None:
    assert H200.programs_per_sm(registers=128, shared=96 * 1024, warps=8) == 2
    assert H200.programs_per_sm(registers=129, shared=0, warps=8) == 1
    assert H200.programs_per_sm(registers=32, shared=113 * 1024, warps=4) == 2
    assert H200.programs_per_sm(registers=32, shared=114 * 1024, warps=4) == 1
    assert H200.programs_per_sm(registers=16, shared=0, warps=4) == 16


def test_a_tile_costs_at_least_what_its_busiest_resource_takes() -> None:
    cost = tiles.tile_cost(_kernel(), H200)
    assert cost.tensor == 128 * 128 * 512 / 2048
    assert cost.issue == 1000 * 8 / 4
    assert cost.pipes["FMA"] == 700 * 256 / 128
    assert cost.l2_bytes == (256 * 512 + 128 * 128) * 2
    assert cost.cycles > max(cost.tensor, cost.issue, cost.l2)
    # Nothing runs beside the epilogue of a program that is alone.
    alone = tiles.tile_cost(_kernel(registers=255), H200)
    assert (alone.programs, cost.programs) == (1, 2)
    assert alone.cycles > cost.cycles


def test_an_open_gemm_costs_its_steps() -> None:
    fixed = _kernel(before={}, after={}, inside={"TENSOR": 32, "ALU": 64})
    step = _kernel(before={}, after={}, inside={"TENSOR": 4, "ALU": 8})
    step = replace(step, gemm=compile.Gemm(128, 128, 64, 64, 2, open=True))
    assert tiles.tile_cost(step, H200, steps=8.0) == tiles.tile_cost(fixed, H200)


def _budgets(*kernels: compile.Compiled) -> list[str]:
    return budgets.violations(kernels, budgets.costs([_kernel()]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"before": {"ALU": 131}}, "issue cycles, +3.1% over 2000"),
        ({"registers": 129}, "1 programs per SM instead of 2"),
        ({"stack": 8}, "8 bytes of stack memory instead of 0"),
        ({"local": 4}, "4 bytes of local memory instead of 0"),
        ({"warnings": ("C7515",)}, "ptxas warning C7515"),
        ({"variant": "fp16"}, "no workload launches kernel [bf16]"),
    ],
)
def test_a_kernel_that_costs_more_breaks_its_budget(changes: dict, text: str) -> None:
    assert any(text in line for line in _budgets(_kernel(**changes))), _budgets(_kernel(**changes))


def test_a_kernel_within_its_budget_breaks_nothing() -> None:
    for kernel in (_kernel(), _kernel(before={"ALU": 129}), _kernel(before={}, registers=90)):
        assert _budgets(kernel) == []
    # A larger block with as many instructions per pair; other Tritons have no budgets yet.
    double = _kernel(gemm=compile.Gemm(256, 128, 512, 64, 2), warps=16, registers=64)
    double = replace(double, shared=1024)
    assert _budgets(double) == []
    assert _budgets(_kernel(triton="4.0.0", before={"ALU": 999})) == []
    assert len(_budgets(_kernel(), _kernel(variant="fp16"))) == 1


def test_budgets_are_kept_as_they_were_counted(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    budgets.update([_kernel()], path)
    budgets.update([_kernel(architecture=80), _kernel(triton="3.9.0", warnings=("C7515",))], path)
    found = budgets.load(path)
    assert found["3.6.0"]["sm_90"] == budgets.costs([_kernel()])["3.6.0"]["sm_90"]
    assert found["3.9.0"]["sm_90"]["kernel [bf16]"].warnings == ("C7515",)
    assert [*found["3.6.0"]] == ["sm_80", "sm_90"]


def _array(address: int, size: int, storage: int = 1) -> Array:
    return Array(storage, 0, address, (size,), (1,), torch.uint8)


def test_l2_keeps_what_was_used_last() -> None:
    cache = predict.Cache(H200)
    half = int(0.5 * H200.l2_usable * H200.device.l2_bytes) // predict.PAGE * predict.PAGE
    first, second, third = (_array(place * half, half, place) for place in range(3))
    assert [cache.missed(array) for array in (first, second, first, second)] == [1, 1, 0, 0]
    assert [cache.missed(array) for array in (third, second, first)] == [1, 0, 1]
    # A small tensor is where another one was freed.
    assert cache.missed(_array(1 << 40, predict.PAGE, 7)) == 0


def _gemm(m: int, n: int, k: int) -> Gemm:
    half, array = torch.bfloat16, _array(0, 1)
    return Gemm(m, n, k, half, torch.float32, False, array, array, array)


def test_a_library_gemm_fills_the_chip_or_is_split() -> None:
    seconds = predict.gemm_seconds
    large = _gemm(32768, 4096, 512)
    assert seconds(large, H200) == pytest.approx(large.flops / H200.gemm_rate, rel=0.05)
    # 64 blocks on 132 SMs; a deep GEMM has parts.
    small, deep = _gemm(4096, 512, 1024), _gemm(4096, 512, 8192)
    assert seconds(small, H200) == pytest.approx(small.flops / H200.gemm_rate * 132 / 64)
    assert seconds(deep, H200) < 0.7 * deep.flops / H200.gemm_rate * 132 / 64


def test_every_assumption_has_a_meaning_and_a_source() -> None:
    for architecture, chip in CHIPS.items():
        assert chip.architecture == architecture
        for name, entry in chip.assumptions().items():
            assert entry["unit"], name
            assert entry["source"], name
            assert entry["value"], name


def test_a_triton_is_known_by_its_version(tmp_path: Path) -> None:
    for folder, version in (("a", "3.6.0"), ("b", "3.7.1"), ("c", "3.7.1")):
        package = tmp_path / folder / "triton"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"__version__ = '{version}'\n")
    found = tritons.tritons([tmp_path / folder for folder in "abc"])
    assert [triton.version for triton in found[-2:]] == ["3.6.0", "3.7.1"]
    path = found[-1].environment["PYTHONPATH"]
    assert path.startswith(str(tmp_path / "b"))
