"""Writes the table of losses and backends into the README, from the registry.

``python docs/support_table.py`` rewrites it, ``--check`` fails if it is not up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from unitsface_kernels.backends.triton.losses import policy_of
from unitsface_kernels.functional.variables import refuse_unsupported
from unitsface_kernels.losses import REGISTRY, LossSpec
from unitsface_kernels.modules import CLASS_LOSSES, PAIR_LOSSES

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- support: begin -->\n", "<!-- support: end -->")


def native_policies() -> set[str]:
    text = (ROOT / "csrc/include/unitsface/loss_list.def").read_text()
    return set(
        re.findall(r"^UF_(?:SUM|(?:PAIR_)?LOGSUMEXPS?)_LOSS\((\w+),", text, flags=re.MULTILINE)
    )


def _on_triton(spec: LossSpec) -> bool:
    try:
        refuse_unsupported(spec, None, "triton")
    except ValueError:
        return False
    return policy_of(spec) is not None


def table() -> str:
    native = native_policies()
    triton = {n for n, s in REGISTRY.items() if s.triplet is None and _on_triton(s)}
    modules = {**CLASS_LOSSES, **PAIR_LOSSES}
    lines = [
        "| loss | function | modules | reference | native CPU | native CUDA | triton |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, spec in REGISTRY.items():
        known = (m for m in modules.values() if m.loss == name or getattr(m, "spec", None) is spec)
        own = ", ".join(f"`{m.__name__}`" for m in known)
        # A nearest loss needs no policy of its own.
        eager = spec.triplet is not None
        marks = ["yes", *["yes" if eager or name in native else "no"] * 2]
        if any(variable.streamed for variable in spec.variables):
            marks[-1] = "Torch operations"
        marks.append("yes" if eager or name in triton else "no")
        lines.append(f"| {name} | `{spec.function}` | {own} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    before, rest = readme.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    return before + MARKERS[0] + table() + MARKERS[1] + after


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    if "--check" in sys.argv[1:]:
        if updated(text) != text:
            sys.exit("README.md: the table of losses is out of date; run docs/support_table.py")
        return
    path.write_text(updated(text))


if __name__ == "__main__":
    main()
