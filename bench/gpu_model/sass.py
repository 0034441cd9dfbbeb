"""Instructions of a compiled kernel, by pipe: before, in and after its loop over the depth."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TENSOR = frozenset({"HGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA"})
#: Instructions of a GEMM without tensor cores.
MULTIPLICATIONS = frozenset({"FFMA", "FFMA2"})
#: Opcodes by pipe; all others are ALU.
PIPES = {
    "TENSOR": TENSOR,
    "FMA": {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"},
    "IMAD": {"IMAD", "HFMA2", "HADD2", "HMUL2"},
    # Conversions with a 32-bit integer or between widths run at the rate of the MUFU.
    "MUFU": {"MUFU", "I2F", "F2I", "F2F"},
    "SHFL": {"SHFL"},
    "SHARED": {"LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"},
    "LOAD": {"LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP", "LDGDEPBAR"},
    "STORE": {"STG", "ST", "UTMASTG", "RED", "ATOMG"},
    "LOCAL": {"LDL", "STL"},
    "SYNC": {
        *("BAR", "WARPSYNC", "SYNCS", "WARPGROUP", "DEPBAR", "MEMBAR", "FENCE"),
        *("ERRBAR", "CCTL", "ARRIVES", "NANOSLEEP", "BSYNC", "BSSY", "UTCBAR"),
    },
    "BRANCH": {"BRA", "EXIT", "RET", "CALL", "BRX", "JMP"},
    "UNIFORM": {"R2UR", "S2UR", "S2R", "CS2R", "R2P", "P2R"},
    "CONSTANT": {"LDC", "LDCU", "ULDC"},
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes}
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


class Instruction(NamedTuple):
    """``opcode`` with its modifiers: ``STG.E.128``."""

    address: int
    opcode: str
    text: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        if self.name in _PIPE_OF:
            return _PIPE_OF[self.name]
        return "UNIFORM" if self.name.startswith("U") else "ALU"


@dataclass(frozen=True)
class Regions:
    """Instructions of one warp by pipe, of a whole program.

    Attributes:
        before, inside, after: the steps of the GEMM, of which the compiler may have unrolled some
            or all; ``inside`` has every iteration.
        iterations: of the loop that is left in the code, 0: none.
        stored: bytes that a lane stores 16 at a time.
        loaded: bytes that a lane loads, each load counted once.
    """

    before: Counter[str]
    inside: Counter[str]
    after: Counter[str]
    iterations: float
    stored: int
    loaded: int


def find_cuobjdump() -> str | None:
    """On PATH, beside nvcc, or in Triton."""
    beside = []
    if nvcc := shutil.which("nvcc"):
        beside.append(Path(nvcc).resolve().parent)
    if home := os.environ.get("CUDA_HOME"):
        beside.append(Path(home) / "bin")
    # find_spec does not run Triton.
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        beside.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    candidates = [shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=p) for p in beside)]
    return next((path for path in candidates if path), None)


def disassemble(tool: Path, cubin: bytes) -> list[Instruction]:
    """The code of the only function of a cubin, without padding."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        instruction = _PREDICATE.sub("", match[2])
        opcode = instruction.split()[0]
        if opcode != "NOP":
            found.append(Instruction(int(match[1], 16), opcode, match[2]))
    return found


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of each loop: from the target of a backward branch to the branch."""
    addresses = [instruction.address for instruction in code]
    found = []
    for last, instruction in enumerate(code):
        target = re.search(r"\b0x([0-9a-f]+)", instruction.text)
        if instruction.name != "BRA" or target is None:
            continue
        goal = int(target[1], 16)
        if goal < instruction.address:
            # The target itself may be padding.
            found.append((next(i for i, a in enumerate(addresses) if a >= goal), last))
    return found


def count(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.pipe for instruction in code)


def _depth_loop(code: Sequence[Instruction], names: Container[str]) -> tuple[int, int] | None:
    """The innermost of the loops with the most instructions of these names."""
    ranked = [
        (sum(i.name in names for i in code[first : last + 1]), first - last, (first, last))
        for first, last in loops(code)
    ]
    ranked = [entry for entry in ranked if entry[0]]
    return max(ranked)[2] if ranked else None


def regions(code: Sequence[Instruction], products: float, one_step: bool = False) -> Regions:
    """Splits a kernel at the steps of its GEMM.

    Args:
        code: of one warp.
        products: instructions of the tensor cores that a warp issues in a program, by which the
            iterations of a loop are known; without tensor cores multiplications. 0: no GEMM, and
            everything is ``before``.
        one_step: count as many steps of the loop as ``products`` are, whatever the compiler has
            peeled off.
    """
    names: Container[str] = TENSOR if any(i.name in TENSOR for i in code) else MULTIPLICATIONS
    places = [place for place, i in enumerate(code) if i.name in names] if products else []
    if not places:
        return Regions(count(code), Counter(), Counter(), 0, *_moved(code))
    loop = _depth_loop(code, names)
    if loop is None:
        first, last = places[0], places[-1]
        inside, iterations = count(code[first : last + 1]), 0
    elif one_step or names is not TENSOR:
        # Multiplications stand outside, too: those are of the epilogue.
        first, last = loop
        body = count(code[first : last + 1])
        iterations = products / sum(i.name in names for i in code[first : last + 1])
        inside = Counter({pipe: round(n * iterations) for pipe, n in body.items()})
    else:
        # Steps before and after the loop belong to the GEMM too.
        first, last = min(loop[0], places[0]), max(loop[1], places[-1])
        body = count(code[loop[0] : loop[1] + 1])
        once = count(code[first : last + 1])
        iterations = round((products - once["TENSOR"]) / body["TENSOR"]) + 1
        inside = Counter({pipe: n + body[pipe] * (iterations - 1) for pipe, n in once.items()})
    before, after = count(code[:first]), count(code[last + 1 :])
    return Regions(before, inside, after, iterations, *_moved(code))


def _moved(code: Sequence[Instruction]) -> tuple[int, int]:
    stored = sum(16 for i in code if i.pipe == "STORE" and ".128" in i.opcode)
    return stored, sum(_width(i.opcode) for i in code if i.name in ("LDG", "LD"))


def _width(opcode: str) -> int:
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[m] for m in opcode.split(".") if m in widths), 4)
