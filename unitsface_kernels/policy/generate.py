"""Kernels of the package's own losses, written into its sources from their formulas."""

from __future__ import annotations

from pathlib import Path

from ..losses import REGISTRY, TOWERS, LossSpec
from .cpp import cpp_struct
from .formula import Formula
from .triton_source import triton_module

_PACKAGE = Path(__file__).resolve().parents[1]
_CPP = _PACKAGE.parent / "csrc" / "include" / "unitsface" / "generated"
_TRITON = _PACKAGE / "backends" / "triton" / "generated"
_NOTE = "Generated from losses/{name}.py by python -m unitsface_kernels.policy generate"


def generated_files() -> dict[Path, str]:
    """Text by path, of every loss of the package that is defined by a policy of its own."""
    found = {}
    for spec in (*REGISTRY.values(), *TOWERS.values()):
        if spec.formula is None or spec.policy is not None or spec.triplet is not None:
            continue
        note = _NOTE.format(name=spec.name)
        found[_CPP / f"{spec.name}.h"] = _header(note, spec.formula)
        if triton_reads(spec):
            text = f"# {note}\n{triton_module(spec.formula)}"
            found[_TRITON / f"{spec.name}.py"] = text
    return found


def triton_reads(spec: LossSpec) -> bool:
    """Whether Triton's kernels read the variables of a loss, if its tiles have any."""
    if spec.reduction == "sum" or spec.topology == "class":
        return True
    return not any(variable.streamed for variable in spec.variables)


def _header(note: str, formula: Formula) -> str:
    lines = [
        f"// {note}",
        "#pragma once",
        "",
        "#include <math.h>",
        "",
        '#include "../policy.h"',
        '#include "../scalar_math.h"',
        "",
        "namespace unitsface {",
        "inline namespace UF_ISA {",
        "",
        cpp_struct(formula, formula.name).strip("\n"),
        "",
        "}  // namespace UF_ISA",
        "}  // namespace unitsface",
    ]
    return "\n".join(lines) + "\n"


def differences(files: dict[Path, str]) -> list[str]:
    """What in the sources is not as it would be generated."""
    found = []
    for path, text in files.items():
        if not path.exists():
            found.append(f"{path} is missing")
        elif path.read_text() != text:
            found.append(f"{path} is out of date")
    kept = {*_CPP.glob("*.h"), *_TRITON.glob("*.py")} - {_TRITON / "__init__.py"}
    return found + [f"{path} has no formula" for path in sorted(kept - files.keys())]


def generate(check: bool = False) -> list[str]:
    """Writes the files that differ, or only names them; returns the differences.

    Raises:
        FileNotFoundError: this is an installed package, without the sources of its extension.
    """
    if not _CPP.parent.is_dir():
        raise FileNotFoundError(f"{_CPP.parent} is not there: generate needs the package's sources")
    files = generated_files()
    found = differences(files)
    if not check:
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
    return found
