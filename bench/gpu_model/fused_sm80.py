"""Issue cycles of the fused CUDA kernels for sm_80 and later, for each type of their operands.

    python -m bench.gpu_model.fused_sm80

rewrites what they may cost, ``fused_sm80.json``. Needs nvcc, no GPU. Counts belong to one release
of nvcc: of others there are no budgets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from . import sass

PATH = Path(__file__).with_name("fused_sm80.json")
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = (80, 90)
#: What issue cycles may exceed their budget by.
TOLERANCE = 0.03
#: In which tiles of 128 x 128 are counted.
DEPTH = 512
WARPS, SCHEDULERS, STAGE_BYTES = 8, 4, 64


@dataclass(frozen=True)
class Type:
    """Type of the operands. ``product``: opcode of its instruction, of which a warp issues
    ``products`` in each stage of the pipeline; ``packed``: opcodes that round a gradient to it."""

    size: int
    product: str
    products: int
    packed: str | None


TYPES = {
    "bf16": Type(2, r"HMMA\.16816\.F32\.BF16$", 32, r"F2FP\.BF16"),
    "fp16": Type(2, r"HMMA\.16816\.F32$", 32, r"F2FP\.(F16|PACK)"),
    "tf32": Type(4, r"HMMA\.1688\.F32\.TF32$", 32, None),
    "fp32": Type(4, "FFMA$", 1024, None),
}
#: Source, losses and kernels, as they are named in mangled symbols.
REPRESENTATIVES = {
    "total": (("uss",), {"total": "fused_total_kernelINS_8baseline3USSE"}),
    "sum": (
        ("uss", "sphereface2"),
        {
            "sums": "fused_sum_kernelINS_8baseline3USSELb0E",
            "sums, thresholds in both directions": "fused_sum_kernelINS_8baseline3USSELb1E",
            "sums of SphereFace2": "fused_sum_kernelINS_8baseline11SphereFace2ELb0E",
        },
    ),
    "logsumexp": (
        ("margin_softmax",),
        {
            "statistics over classes": "fused_logsumexp_kernelI",
            "gradient over classes": "fused_logsumexp_gradient_kernelI",
        },
    ),
    "pairs": (
        ("pair_softmax", "multi_similarity"),
        {
            "statistics over samples": "fused_pair_negatives_kernelINS_8baseline11PairSoftmaxE",
            "statistics of positives and negatives": "fused_pair_negatives_kernelINS_8baseline15M",
            "positives": "fused_pair_positives_kernelI",
            "gradient over samples": "PairSoftmaxELb0ELb0E",
            "gradient over samples, both directions": "PairSoftmaxELb0ELb1E",
            "gradient of positives and negatives": "MultiSimilarityELb1ELb0E",
            "the same, both directions": "MultiSimilarityELb1ELb1E",
        },
    ),
}


@dataclass(frozen=True)
class Compiled:
    """``issue_cycles`` by type, for a tile of 128 x 128 x DEPTH; stack and spills in bytes."""

    registers: int
    stack: int
    spilled: int
    issue_cycles: dict[str, int]

    def broken_by(self, cost: Compiled) -> list[str]:
        """What a kernel of this cost has too much of."""
        found = [
            f"{key}: {have} issue cycles instead of {self.issue_cycles[key]}"
            for key, have in cost.issue_cycles.items()
            if have > (1 + TOLERANCE) * self.issue_cycles[key]
        ]
        for name in ("registers", "stack", "spilled"):
            have, allowed = getattr(cost, name), getattr(self, name)
            if have > allowed:
                found.append(f"{name}: {have} instead of {allowed}")
        return found


#: By kernel.
Costs = dict[str, Compiled]


@dataclass(frozen=True)
class _Block:
    """``code`` that is run from first to last, then one of the blocks ``next``."""

    code: list[sass.Instruction]
    next: tuple[int, ...]
    ends: bool

    @property
    def place(self) -> int:
        return self.code[0].address

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, i.opcode) for i in self.code)


def _target(instruction: sass.Instruction) -> int | None:
    found = re.search(r"\b0x([0-9a-f]+)", instruction.text)
    return int(found[1], 16) if found and instruction.name in ("BRA", "CALL") else None


def _blocks(code: list[sass.Instruction]) -> list[_Block]:
    """Branches back are left out: a path runs through a loop once."""
    addresses = [instruction.address for instruction in code]
    # The target itself may be padding.
    jumps = {p: bisect_left(addresses, goal) for p, i in enumerate(code) if (goal := _target(i))}
    leaving = [place for place, i in enumerate(code) if i.name in ("BRA", "CALL", "EXIT", "RET")]
    starts = sorted({0, *jumps.values(), *(p + 1 for p in leaving if p + 1 < len(code))})
    index = {start: number for number, start in enumerate(starts)}
    found = []
    for number, start in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else len(code)
        last = code[stop - 1]
        # "BRA P0, 0x10" has a condition as well.
        conditional = last.text.startswith("@") or last.name == "CALL" or "," in last.text
        onward = [] if last.name in ("BRA", "EXIT", "RET") and not conditional else [number + 1]
        if stop - 1 in jumps:
            onward.append(index[jumps[stop - 1]])
        ahead = tuple(n for n in onward if number < n < len(starts))
        found.append(_Block(code[start:stop], ahead, last.name == "EXIT"))
    return found


def _depth_loop(code: list[sass.Instruction], kind: Type) -> tuple[range, range, int]:
    """Addresses of the loop over the stages of the pipeline and of the one in it, or itself, that
    multiplies, and how often that is run in each stage."""

    def counter(pattern: str) -> Callable[[int, int], int]:
        known = re.compile(pattern)
        sums = [0, *accumulate(known.match(i.opcode) is not None for i in code)]
        return lambda first, last: sums[last + 1] - sums[first]

    products, tensor, copies = counter(kind.product), counter("HMMA"), counter("LDGDEPBAR")
    around: list[tuple[range, int]] = []
    for first, last in sorted(sass.loops(code), key=lambda loop: loop[1] - loop[0]):
        count = products(first, last)
        foreign = kind.product == "FFMA$" and tensor(first, last)
        if not count or foreign:
            continue
        stage = range(code[first].address, code[last].address + 1)
        around.append((stage, count))
        if copies(first, last):
            own, issued = next(n for n in around if n[0][0] in stage and n[0][-1] in stage)
            times = 1 if own == stage else kind.products // issued
            if issued * times == kind.products == count * times:
                return stage, own, times
    raise ValueError(f"no loop over the depth has {kind.products} times {kind.product}")


def _dominators(blocks: list[_Block]) -> list[int]:
    """Blocks on every path to each block, as bits; 0: no path leads there."""
    found = [1, *[-1] * (len(blocks) - 1)]
    reached = {0}
    for number, block in enumerate(blocks):
        if number not in reached:
            found[number] = 0
            continue
        found[number] |= 1 << number
        for k in block.next:
            found[k] &= found[number]
            reached.add(k)
    return found


def _without(
    dominators: list[int], excluded: Callable[[int], bool], wanted: Callable[[int], bool]
) -> set[int]:
    """The blocks that are left without the excluded ones, and without those that decide for them
    and not for a wanted one, with all that only these lead to."""
    needed = entries = 0
    for number, own in enumerate(dominators):
        needed |= own if wanted(number) and not excluded(number) else 0
    for number, own in enumerate(dominators):
        alone = own & ~needed
        entries |= alone & -alone if excluded(number) else 0
    return {number for number, own in enumerate(dominators) if own and not own & entries}


def issue_cycles(code: list[sass.Instruction], key: str) -> int:
    """Issue cycles of a tile whose operands, and whose gradient if of 16 bits, have a type.

    Counted along the longest path of such a tile in rows that start at multiples of 16 bytes: of
    every other branch the side that takes more, of every loop but that over the depth the code
    once. All warps take as long as the slowest.
    """
    kind = TYPES[key]
    stage, step, inner = _depth_loop(code, kind)
    others = [_depth_loop(code, other)[0] for other in TYPES.values() if other != kind]
    blocks = _blocks(code)
    rounds = [kind.packed is not None and block.has("F2FP") for block in blocks]
    for number, block in reversed(list(enumerate(blocks))):
        rounds[number] |= any(rounds[k] for k in block.next)

    def of_other_types(number: int) -> bool:
        block = blocks[number]
        packed = block.has("F2FP") and not of_type(number)
        # Stored between columns that are rounded: a gradient of float32.
        float32 = block.has(r"STG\.E$") and rounds[number]
        return packed or float32 or any(block.place in loop for loop in others)

    def of_type(number: int) -> bool:
        rounded = blocks[number].has(kind.packed or r"STG\.E$")
        return rounded or blocks[number].place in step

    def of_elements(number: int) -> bool:
        return blocks[number].has(r"(LDG|STG)\.E\.U16")

    def of_chunks(number: int) -> bool:
        return blocks[number].has("LDGSTS") or blocks[number].has(r"STG\.E\.64")

    dominators = _dominators(blocks)
    left = _without(dominators, of_other_types, of_type) & _without(
        dominators, of_elements, of_chunks
    )
    longest: list[int | None] = [None] * len(blocks)
    for number, block in reversed(list(enumerate(blocks))):
        ahead = [n for k in block.next if (n := longest[k]) is not None]
        if number in left and (ahead or block.ends):
            times = DEPTH * kind.size // STAGE_BYTES if block.place in stage else 1
            times *= inner if block.place in step else 1
            longest[number] = len(block.code) * times + max(ahead, default=0)
    if longest[0] is None:
        raise ValueError(f"no path through the kernel in {key}")
    return longest[0] * WARPS // SCHEDULERS


def compile_source(
    nvcc: str, disassembler: str, source: str, architecture: int, folder: Path
) -> Costs:
    """Representatives of ``csrc/cuda/fused/<source>_sm80.cu``; ``folder``: for temporary files."""
    losses, kernels = REPRESENTATIVES[source]
    write_losses(folder / "unitsface", losses)
    cubin = folder / f"{source}_{architecture}.cubin"
    command = [
        *(nvcc, "-std=c++17", "-Xptxas=-v", "-cubin", "-o", f"{cubin}"),
        f"-gencode=arch=compute_{ARCHITECTURES[0]},code=sm_{architecture}",  # as in CMakeLists.txt
        *(f"-I{folder}", f"-I{SOURCES}", f"-I{SOURCES / 'include'}"),
        f"{SOURCES / 'cuda' / 'fused' / f'{source}_sm80.cu'}",
    ]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    dump = [disassembler, "-sass", f"{cubin}"]
    text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    parts = {part.split()[0]: part for part in text.split("Function : ")[1:]}
    found = {}
    for key, symbol in kernels.items():
        [name] = [name for name in parts if symbol in name]
        usage = log.split(f"Function properties for {name}\n")[1].split("\n")[:2]
        stack, stores, loads = (int(n) for n in re.findall(r"(\d+) bytes", usage[0])[:3])
        registers = re.search(r"Used (\d+) registers", usage[1])
        assert registers is not None
        code = sass.parse(parts[name])
        cycles = {kind: issue_cycles(code, kind) for kind in TYPES}
        found[key] = Compiled(int(registers[1]), stack, stores + loads, cycles)
    return found


def write_losses(folder: Path, losses: Iterable[str]) -> None:
    """The list of losses with these alone, which is found before the whole one."""
    whole = SOURCES / "include" / "unitsface" / "loss_list.def"
    text = whole.read_text().replace('#include "', f'#include "{whole.parent}/')
    kept = [
        line
        for line in text.splitlines()
        if not (match := re.match(r"UF_\w+_LOSS\((\w+),", line)) or match[1] in losses
    ]
    folder.mkdir(exist_ok=True)
    (folder / whole.name).write_text("\n".join(kept) + "\n")


def release(nvcc: str) -> str:
    """Such as 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def load() -> dict[str, dict[str, Costs]]:
    """By release of nvcc and architecture."""
    return {
        version: {
            architecture: {key: Compiled(**row) for key, row in rows.items()}
            for architecture, rows in architectures.items()
        }
        for version, architectures in json.loads(PATH.read_text()).items()
    }


def main() -> int:
    nvcc, disassembler = shutil.which("nvcc"), sass.find_cuobjdump()
    if nvcc is None or disassembler is None:
        print("needs nvcc and cuobjdump", file=sys.stderr)
        return 1

    def compiled(task: tuple[int, str]) -> Costs:
        architecture, source = task
        with tempfile.TemporaryDirectory() as folder:
            return compile_source(nvcc, disassembler, source, architecture, Path(folder))

    tasks = [(architecture, source) for architecture in ARCHITECTURES for source in REPRESENTATIVES]
    found: dict[str, Costs] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (architecture, _), costs in zip(tasks, pool.map(compiled, tasks), strict=True):
            found.setdefault(f"sm_{architecture}", {}).update(costs)
    whole = (load() if PATH.exists() else {}) | {release(nvcc): found}
    PATH.write_text(json.dumps(whole, default=asdict, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
