"""Triton's compilation of the kernels for GPUs that need not be present.

Runs whole calls through the engine with a driver that only names its target, so that every kernel
is compiled with the arguments, the specialization and the configuration of a real launch, and
reads registers, stack and instructions off the result.

``python python_tests/kernels/test_codegen.py [ARCHITECTURE ...]`` prints the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Per block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS_OF_AN_SM = 65536
SHARED_OF_AN_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
MATMUL_KERNELS = (
    "sum_kernel",
    "sum_total_kernel",
    "statistics_kernel",
    "gradient_kernel",
    "pair_negatives_kernel",
    "pair_positives_kernel",
    "pair_gradient_kernel",
    "nearest_kernel",
)
# What a call compiles. bfloat16 has every variant of every kernel that a loss of the registry
# launches (a tile on the diagonal of a batch, one beside it, a memory, losses only, row weights);
# with every loss. The other dtypes differ in element size and in the conversion of gradients: the
# variant with the most state and the two logsumexp kernels, of the first loss of each driver, stand
# for the rest, which halves the time. float32 runs on ordinary multiplications, which no
# architecture does differently: one stands for all.
VARIANTS = {
    "bfloat16": ("batch", "batch losses", "batch weights", "memory", "classes"),
    "float16": ("batch", "classes"),
    "float32": ("batch", "classes"),
}
# What ``make test`` compiles: with the first loss of each driver.
REPRESENTATIVES = {"bfloat16": ("batch", "classes")}


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel; ``instructions``: which of the tensor-core families its PTX has."""

    architecture: int
    dtype: str
    variant: str
    kernel: str
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    max_registers: int | None
    instructions: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"sm_{self.architecture:<4}{self.dtype:10}{self.variant:15}{self.kernel:27}"
            f"{self.registers:4} registers {self.stack:4} stack {self.shared:7} shared  "
            f"{' '.join(self.instructions)}"
        )


def _variants(architecture: int, thorough: bool) -> dict[str, tuple[str, ...]]:
    """By dtype."""
    chosen = VARIANTS if thorough else REPRESENTATIVES
    return {k: v for k, v in chosen.items() if k != "float32" or architecture == 90}


def _tool() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_tool(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _compile(architecture: int, thorough: bool) -> Iterator[Compiled]:
    """Every kernel of ``_variants`` for one architecture; needs a process of its own."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from unitsface_kernels import passes
    from unitsface_kernels.backends.streaming import Call, logsumexp_pairs
    from unitsface_kernels.backends.triton import configs, launch
    from unitsface_kernels.losses import REGISTRY

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

    found: dict[str, Compiled] = {}
    dtype = variant = ""

    def run(kernel, programs, *args, **options) -> None:
        """In place of a launch; CPU tensors have all that the specialization looks at."""
        compiled = kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **options)
        if compiled.hash in found:
            return
        usage = _usage(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        found[compiled.hash] = Compiled(
            architecture,
            dtype,
            variant,
            kernel.fn.__name__,
            usage["REG"],
            usage["STACK"],
            usage["LOCAL"],
            compiled.metadata.shared,
            compiled.metadata.num_warps,
            options.get("maxnreg"),
            tuple(name for name in TENSOR_CORES.values() if name in ptx),
        )

    select = configs.select

    def select_small(*args) -> configs.Config:
        """The same kernels; a batch of 192 rows already has tiles beside the diagonal."""
        config = select(*args)
        return dataclasses.replace(config, wave=dataclasses.replace(config.wave, gradient_rows=128))

    driver.set_active(Driver())
    launch.run, configs.select = run, select_small
    launch.capability = lambda device: architecture
    # The tiles of a GPU, where no label is read: kernels that do not run leave labels unset.
    logsumexp_pairs._possible_positives = lambda call, engine, operands: (operands, None)
    labels, many = torch.arange(192) % 7, torch.arange(256) % 7

    def make_call(loss: str, columns: torch.Tensor | None, **changes) -> Call:
        spec = REGISTRY[loss]
        call = Call(
            spec,
            spec.pack(spec.defaults()),
            "mean",
            "triton",
            rows.dtype,
            rows=rows,
            row_labels=labels,
            columns=columns,
            column_labels=many if spec.topology == "pair" and columns is not None else None,
            self_offset=None if columns is not None else 0,
            threshold=None if spec.threshold == "none" else torch.zeros(1),
            need_rows=True,
            need_columns=True,
            need_threshold=True,
        )
        return dataclasses.replace(call, **changes)

    for dtype, variants in _variants(architecture, thorough).items():
        rows = torch.zeros(192, 512, dtype=getattr(torch, dtype))
        columns = torch.zeros(256, 512, dtype=rows.dtype)
        for variant in variants:
            seen: set[tuple[str, ...]] = set()
            # Thresholds per column are the most state.
            for loss, spec in sorted(
                REGISTRY.items(), key=lambda item: item[1].threshold != "per_column"
            ):
                if (spec.topology == "class") != (variant == "classes"):
                    continue
                # Elsewhere the first of a driver and kind of threshold stands for all.
                kind: tuple[str, ...] = (spec.reduction, spec.topology, spec.threshold)
                if thorough and dtype == "bfloat16":
                    kind = (loss,)
                if kind in seen:
                    continue
                seen.add(kind)
                other = columns if variant in ("classes", "memory") else None
                call = make_call(loss, other)
                if variant == "batch losses":
                    passes.forward(call, gradients=False)
                elif variant == "batch weights":
                    # Of the others, weights are what every backward pass has.
                    if spec.reduction == "sum":
                        passes.backward(call, torch.zeros(0), torch.ones(192))
                else:
                    result = passes.forward(call, gradients=True)
                    if result.state is not None:
                        passes.backward(call, result.state, torch.ones(192))
        # Counts decide the size of tiles: the largest, too.
        variant = "largest counts"
        for loss, spec in REGISTRY.items():
            largest = {p.name: p.maximum for p in spec.parameters if p.integer}
            if largest:
                params = spec.pack(spec.defaults() | largest)
                passes.forward(make_call(loss, columns, params=params), gradients=False)
    yield from found.values()


def _compile_elsewhere(architecture: int, thorough: bool, cache: Path) -> list[Compiled]:
    # The rest of the test session may run under the interpreter, which is decided at import.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    process = subprocess.run(
        [sys.executable, __file__, "--json", *["--thorough"] * thorough, str(architecture)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return [Compiled(**row | {"instructions": tuple(row["instructions"])}) for row in rows]


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.extended)],
    ids=["representatives", "all"],
)
def thorough(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def kernels(thorough: bool, tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    pytest.importorskip("triton")
    if not _tool().exists():
        pytest.skip("this Triton has no cuobjdump")
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda one: _compile_elsewhere(one, thorough, cache), ARCHITECTURES)
        return [kernel for kernels in found for kernel in kernels]


def _listed(kernels: list[Compiled]) -> str:
    return "\n".join(map(str, kernels))


def test_every_kernel_is_compiled(kernels: list[Compiled], thorough: bool) -> None:
    from unitsface_kernels.backends.triton import kernels as package

    names = set()
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        names |= {name for name in members if name.endswith("_kernel")}
    for architecture in ARCHITECTURES:
        found = {k.kernel for k in kernels if k.architecture == architecture}
        assert found == names
        for dtype in _variants(architecture, thorough):
            of_dtype = {
                k.kernel for k in kernels if (k.architecture, k.dtype) == (architecture, dtype)
            }
            assert set(MATMUL_KERNELS) <= of_dtype


def test_no_kernel_spills_or_has_a_stack(kernels: list[Compiled]) -> None:
    wasteful = [kernel for kernel in kernels if kernel.stack or kernel.local]
    assert not wasteful, _listed(wasteful)


def test_matmuls_run_on_tensor_cores(kernels: list[Compiled]) -> None:
    """float32 does not: without TF32 there is no tensor core that is exact enough."""
    slow = [
        kernel
        for kernel in kernels
        if kernel.kernel in MATMUL_KERNELS
        and kernel.dtype != "float32"
        and TENSOR_CORES[kernel.architecture] not in kernel.instructions
    ]
    assert not slow, _listed(slow)


def test_shared_memory_fits(kernels: list[Compiled]) -> None:
    large = [kernel for kernel in kernels if kernel.shared > SHARED_LIMIT[kernel.architecture]]
    assert not large, _listed(large)


def test_capped_kernels_share_an_sm(kernels: list[Compiled]) -> None:
    """That is what the cap on their registers is for."""
    capped = [kernel for kernel in kernels if kernel.max_registers is not None]
    assert capped
    alone = [
        kernel
        for kernel in capped
        if 2 * kernel.registers * 32 * kernel.warps > REGISTERS_OF_AN_SM
        # One KB of each block is the system's.
        or 2 * (kernel.shared + 1024) > SHARED_OF_AN_SM[kernel.architecture]
    ]
    assert not alone, _listed(alone)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    everything = "--thorough" in sys.argv or "--json" not in sys.argv
    for one in map(int, arguments) if arguments else ARCHITECTURES:
        if "--json" in sys.argv:
            for compiled_kernel in _compile(one, everything):
                print(json.dumps(dataclasses.asdict(compiled_kernel)))
        else:
            for compiled_kernel in _compile_elsewhere(one, everything, Path(tempfile.mkdtemp())):
                print(compiled_kernel)
