"""Triton kernels compiled ahead of time, and what they consist of."""

from __future__ import annotations

import hashlib
import io
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from . import sass

if TYPE_CHECKING:
    from ..fake_device import Work
    from .launches import Launch

#: Families of tensor-core instructions in PTX.
FAMILIES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_DOT = re.compile(r"tt\.dot .*tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>")
_LOOP = re.compile(r"scf\.for .* = %(\S+) to %(\S+) step %(\S+) ")
_CONSTANT = re.compile(r"%(\S+) = arith\.constant (-?\d+) : i32")
#: Where in a source file an operation comes from: at its end, and in lines of their own.
_PLACES = re.compile(r"""^#loc.*\n| ?loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)""", re.MULTILINE)
_BITS = {"f32": 32, "f16": 16, "bf16": 16}


@dataclass(frozen=True)
class Gemm:
    """The GEMM of one program: (m, depth) with (depth, n), ``step`` of the depth at a time.

    ``open``: the depth is known on the device only, and ``depth`` is that of one step.
    """

    m: int
    n: int
    depth: int
    step: int
    element_bytes: int
    open: bool = False

    @property
    def steps(self) -> int:
        return self.depth // self.step

    @property
    def operand_bytes(self) -> int:
        return (self.m + self.n) * self.depth * self.element_bytes


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        label: of the first call that launches it.
        variant: what it is specialized to; see ``Launch.variant``.
        local: bytes of spills.
        families: tensor-core instructions of its PTX.
        warnings: numbers of ptxas performance warnings.
        gemm: of one program; None for a kernel without one.
        products: instructions of the GEMM that a warp issues, by the GEMM's shape.
        before, inside, after: instructions of one warp by pipe, see ``sass.Regions``.
        iterations: of the loop over the depth, 0 where the compiler has unrolled it.
        stored: bytes that one program stores 16 at a time, which is how tiles are stored.
        loaded: bytes of one program's loads, each counted once whether in a loop or not.
        key_of_ir: see ``key_of``.
    """

    triton: str
    architecture: int
    label: str
    kernel: str
    variant: str
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    max_registers: int | None
    families: tuple[str, ...]
    warnings: tuple[str, ...]
    gemm: Gemm | None
    products: float
    iterations: float
    before: dict[str, int]
    inside: dict[str, int]
    after: dict[str, int]
    stored: int
    loaded: int
    key_of_ir: str = ""

    @classmethod
    def load(cls, row: dict[str, Any]) -> Compiled:
        """The inverse of ``asdict`` and JSON."""
        gemm = None if row["gemm"] is None else Gemm(**row["gemm"])
        return cls(**row | {"gemm": gemm, **{k: tuple(row[k]) for k in ("families", "warnings")}})

    @property
    def key(self) -> str:
        return f"{self.kernel} [{self.variant}]"

    @property
    def dtype(self) -> str:
        return self.variant.partition(" ")[0]

    @property
    def tensor_cores(self) -> bool:
        return self.inside.get("TENSOR", 0) > 0

    @property
    def instructions(self) -> Counter[str]:
        """Instructions of one warp in a whole program, by pipe."""
        return Counter(self.before) + Counter(self.inside) + Counter(self.after)

    @property
    def issue_cycles(self) -> float:
        """Issue cycles of one program: an SM issues from four warps per cycle."""
        return sum(self.instructions.values()) * self.warps / 4

    def __str__(self) -> str:
        return (
            f"sm_{self.architecture:<4}Triton {self.triton:7}{self.label:26}{self.kernel:27}"
            f"{self.registers:4} registers {self.stack:4} stack {self.shared:7} shared  "
            f"{' '.join([*self.families, *self.warnings])}"
        )


def gemm_of(ttir: str, arguments: Mapping[str, Any]) -> Gemm | None:
    """The GEMM in a kernel's Triton IR: its operands' shapes and the bounds of its loop.

    Args:
        ttir: of a kernel with at most one GEMM.
        arguments: of the launch, which the bounds may depend on.
    """
    dot = _DOT.search(ttir)
    if dot is None:
        return None
    m, step, n = int(dot[1]), int(dot[2]), int(dot[4])
    size = _BITS[dot[3]] // 8
    known = dict(arguments) | {name: int(value) for name, value in _CONSTANT.findall(ttir)}
    loops = list(_LOOP.finditer(ttir, 0, dot.start()))
    if not loops:
        return Gemm(m, n, step, step, size)
    first, last, by = (known.get(name) for name in loops[-1].groups())
    if first is None or last is None or by is None:
        return Gemm(m, n, step, step, size, open=True)
    return Gemm(m, n, step * -(-(last - first) // by), step, size)


def key_of(triton: str, architecture: int, ir: str, *options: Any) -> str:
    """Equal for compilations with equal results.

    Args:
        ir: in Triton's dialect.
        options: what else decides what is compiled and how it is counted.
    """
    text = "\n".join([triton, str(architecture), _PLACES.sub("", ir), *map(str, options)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _products(opcode: str, gemm: Gemm) -> int:
    """Multiplications of one instruction of the tensor cores, or of one FFMA of a warp."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if shape is not None:
        return math.prod(map(int, shape.groups()))
    if opcode.startswith("HMMA"):
        # m16n8 and the depth: HMMA.16816, HMMA.1688
        return 16 * 8 * int(re.search(r"\.168(\d+)", opcode)[1])  # type: ignore[index]
    if opcode.startswith("UTCHMMA"):
        return min(gemm.m, 128) * min(gemm.n, 256) * 32 // gemm.element_bytes
    return 32 * (2 if opcode == "FFMA2" else 1)


def _products_per_warp(code: Sequence[sass.Instruction], gemm: Gemm, warps: int) -> float:
    """Instructions of the GEMM that a warp issues in a program."""
    opcodes = [i.opcode for i in code if i.name in sass.TENSOR]
    opcode = opcodes[0] if opcodes else "FFMA"
    # Four warps make a warpgroup; on Blackwell one thread issues for all.
    issuing = {"HGMMA": warps // 4, "UTCHMMA": 1}.get(opcode.partition(".")[0], warps)
    return gemm.m * gemm.n * gemm.depth / _products(opcode, gemm) / issuing


def _usage(tool: Path, cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


class _KnownKernelError(Exception):
    """The kernel has been compiled before."""


def compiled(
    launch: Launch,
    triton: str,
    architecture: int,
    known: Mapping[str, Compiled],
    sources: dict[str, tuple[str, str]],
) -> Compiled:
    """Compiles a launch's kernel and counts its code, unless it is one of the ``known``.

    ``sources``: IR and options of what this process has compiled, by Triton's hash. Triton keeps
    kernels: of another launch of the same one neither its front end nor ptxas says anything.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    after_front_end, source = CUDABackend.make_ttgir, None

    def key(ir: str, options: str) -> str:
        return key_of(triton, architecture, ir, options, gemm_of(ir, launch.arguments))

    def stop_if_known(module: Any, metadata: Any, options: Any, *rest: Any) -> Any:
        nonlocal source
        source = str(module), options.hash()
        if key(*source) in known:
            raise _KnownKernelError
        return after_front_end(module, metadata, options, *rest)

    log = io.StringIO()
    front_end = patch.object(CUDABackend, "make_ttgir", staticmethod(stop_if_known))
    try:
        with front_end, patch.object(knobs.nvidia, "dump_ptxas_log", True), redirect_stdout(log):
            kernel = launch.compile()
    except _KnownKernelError:
        assert source is not None
        return replace(known[key(*source)], label=launch.label, variant=launch.variant)
    if source is None:
        source = sources[kernel.hash]
    sources[kernel.hash] = source
    tool = Path(knobs.nvidia.cuobjdump.path)
    usage = _usage(tool, kernel.asm["cubin"])
    code = sass.disassemble(tool, kernel.asm["cubin"])
    gemm, warps = gemm_of(kernel.asm["ttir"], launch.arguments), kernel.metadata.num_warps
    products = _products_per_warp(code, gemm, warps) if gemm else 0
    found = sass.regions(code, products, one_step=gemm is not None and gemm.open)
    return Compiled(
        triton=triton,
        architecture=architecture,
        label=launch.label,
        kernel=launch.name,
        variant=launch.variant,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=kernel.metadata.shared,
        warps=warps,
        max_registers=launch.options.get("maxnreg"),
        families=tuple(name for name in FAMILIES if name in kernel.asm["ptx"]),
        warnings=tuple(dict.fromkeys(re.findall(r"\((C75\d\d)\)", log.getvalue()))),
        gemm=gemm,
        products=products,
        iterations=found.iterations,
        before=dict(found.before),
        inside=dict(found.inside),
        after=dict(found.after),
        stored=32 * warps * found.stored,
        loaded=32 * warps * found.loaded,
        key_of_ir=key(*source),
    )


class Compiler:
    """Compiles what the fake device records, each kernel once; one per process.

    Triton has one active driver, which here only names its target.

    Args:
        known: kernels that need not be compiled; see :mod:`bench.gpu_model.record`.
    """

    def __init__(self, architecture: int, known: Mapping[str, Compiled] | None = None) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        class Driver:
            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", architecture, 32)

        driver.set_active(Driver())
        self.architecture, self.triton = architecture, triton.__version__
        self.known = known or {}
        self._sources: dict[str, tuple[str, str]] = {}
        self.found: dict[tuple[Any, ...], Compiled] = {}

    def __call__(self, work: Work) -> Compiled:
        from .launches import Launch

        launch = Launch.of(work)
        kernel = self.found.get(launch.identity)
        if kernel is None:
            kernel = compiled(launch, self.triton, self.architecture, self.known, self._sources)
            self.found[launch.identity] = kernel
        return kernel
