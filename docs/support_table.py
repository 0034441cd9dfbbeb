"""Writes the table of losses and backends into the README, from the registry.

``python docs/support_table.py`` rewrites it, ``--check`` fails if it is not up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from unitsface_kernels.backends.triton.losses import policy_of
from unitsface_kernels.losses import CUSTOM, REGISTRY, TOWERS
from unitsface_kernels.losses.custom import SCALARS
from unitsface_kernels.modules import CLASS_LOSSES, PAIR_LOSSES

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- support: begin -->\n", "<!-- support: end -->")


def native_policies() -> set[str]:
    text = (ROOT / "csrc/include/unitsface/loss_list.def").read_text()
    return set(
        re.findall(r"^UF_(?:SUM|(?:PAIR_)?LOGSUMEXPS?)_LOSS\((\w+),", text, flags=re.MULTILINE)
    )


def table() -> str:
    # Those that the package has beside the registry run on the kernels of another loss.
    others = {n: s for n, s in CUSTOM.items() if s.tiles is not None and SCALARS not in n}
    modules = {**CLASS_LOSSES, **PAIR_LOSSES}
    by_name = {module.loss for module in modules.values()}
    more = {name: spec for name, spec in TOWERS.items() if name in by_name}
    specs = {**REGISTRY, **more, **others}
    native = native_policies() | others.keys()
    triton = {n for n, spec in specs.items() if spec.triplet is None and policy_of(spec)}
    lines = [
        "| loss | function | modules | reference | native CPU | native CUDA | triton |",
        "|---|---|---|---|---|---|---|",
    ]
    listed: dict[str, set[str]] = {}
    for name, spec in specs.items():
        known = (m for m in modules.values() if m.loss == name or getattr(m, "spec", None) is spec)
        own = ", ".join(f"`{m.__name__}`" for m in known)
        # Other kernels of a loss that has a row.
        modules_of = listed.setdefault(spec.function, set())
        if own in modules_of or (modules_of and not own):
            continue
        modules_of.add(own)
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
