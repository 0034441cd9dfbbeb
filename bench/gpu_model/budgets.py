"""Instruction budgets: what each kernel of the named workloads may cost, in ``budgets.json``.

The costs are counted, so a change of a kernel, of its configuration or of the compiler shows
without a GPU. A budget belongs to one version of Triton, which brings its own ptxas.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .chips import CHIPS
from .compile import Compiled
from .tiles import REFERENCE_PAIRS

PATH = Path(__file__).with_name("budgets.json")
#: What issue cycles may exceed their budget by.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Budget:
    """Attributes:
    issue_cycles: per ``REFERENCE_PAIRS``; of a kernel without a GEMM per program.
    programs: that share an SM, at least.
    stack, local: bytes.
    warnings: numbers of the ptxas performance warnings that it has.
    """

    issue_cycles: float
    programs: int
    stack: int
    local: int
    warnings: tuple[str, ...]

    def worse(self, other: Budget) -> Budget:
        """What both keep to."""
        return Budget(
            max(self.issue_cycles, other.issue_cycles),
            min(self.programs, other.programs),
            max(self.stack, other.stack),
            max(self.local, other.local),
            tuple(sorted({*self.warnings, *other.warnings})),
        )

    def broken_by(self, cost: Budget) -> list[str]:
        """What a kernel of this cost has too much of."""
        found = []
        if cost.issue_cycles > (1 + TOLERANCE) * self.issue_cycles:
            more = cost.issue_cycles / self.issue_cycles - 1
            found.append(
                f"{cost.issue_cycles:.0f} issue cycles, {more:+.1%} over {self.issue_cycles:.0f}"
            )
        if cost.programs < self.programs:
            found.append(f"{cost.programs} programs per SM instead of {self.programs}")
        for name in ("stack", "local"):
            have, allowed = getattr(cost, name), getattr(self, name)
            if have > allowed:
                found.append(f"{have} bytes of {name} memory instead of {allowed}")
        new = sorted({*cost.warnings} - {*self.warnings})
        return [*found, *(f"ptxas warning {number}" for number in new)]


#: By version of Triton, architecture and kernel.
Budgets = dict[str, dict[str, dict[str, Budget]]]


def cost(kernel: Compiled) -> Budget:
    scale = 1.0 if kernel.gemm is None else REFERENCE_PAIRS / (kernel.gemm.m * kernel.gemm.n)
    chip = CHIPS[kernel.architecture]
    programs = chip.programs_per_sm(kernel.registers, kernel.shared, kernel.warps)
    cycles = kernel.issue_cycles * scale
    return Budget(cycles, programs, kernel.stack, kernel.local, kernel.warnings)


def costs(kernels: Iterable[Compiled]) -> Budgets:
    """Costs by variant; the largest where sizes specialize a variant in several ways."""
    found: Budgets = {}
    for kernel in kernels:
        place = found.setdefault(kernel.triton, {}).setdefault(f"sm_{kernel.architecture}", {})
        own = cost(kernel)
        place[kernel.key] = place.get(kernel.key, own).worse(own)
    return found


def violations(kernels: Iterable[Compiled], budgets: Budgets) -> list[str]:
    """What the kernels of all named workloads exceed; nothing where a Triton or an architecture has
    no budgets.

    A kernel without a budget counts as a violation, and so does a budget without a kernel.
    """
    found = []
    for version, architectures in costs(kernels).items():
        for architecture, have in architectures.items():
            allowed = budgets.get(version, {}).get(architecture)
            if allowed is None:
                continue
            where = f"Triton {version}, {architecture}"
            for key in sorted({*have, *allowed}):
                if key not in allowed:
                    found.append(f"{where}: {key} has no budget")
                elif key not in have:
                    found.append(f"{where}: no workload launches {key}")
                else:
                    broken = allowed[key].broken_by(have[key])
                    found += [f"{where}: {key}: {text}" for text in broken]
    return found


def load(path: Path = PATH) -> Budgets:
    def budget(row: dict[str, Any]) -> Budget:
        return Budget(**row | {"warnings": tuple(row["warnings"])})

    return {
        version: {
            architecture: {key: budget(row) for key, row in rows.items()}
            for architecture, rows in architectures.items()
        }
        for version, architectures in json.loads(path.read_text()).items()
    }


def update(kernels: Iterable[Compiled], path: Path = PATH) -> None:
    """Replaces the budgets of the kernels' Tritons and architectures; the others stay."""
    found = load(path) if path.exists() else {}
    for version, architectures in costs(kernels).items():
        found.setdefault(version, {}).update(architectures)
    # One kernel per line, so that a change shows as one.
    lines = ["{"]
    for version, architectures in sorted(found.items()):
        lines.append(f' "{version}": {{')
        for architecture, rows in sorted(architectures.items()):
            lines.append(f'  "{architecture}": {{')
            entries = [f'   "{k}": {json.dumps(asdict(row))}' for k, row in sorted(rows.items())]
            lines.append(",\n".join(entries) + "\n  },")
        lines[-1] = lines[-1].removesuffix(",")
        lines.append(" },")
    lines[-1] = lines[-1].removesuffix(",")
    path.write_text("\n".join([*lines, "}"]) + "\n")
