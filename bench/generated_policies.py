"""``python -m bench.generated_policies``: generated policies against the hand-written ones.

The hand-written policies are those of a commit, ``--commit``, from before losses were generated.
Parts, each optional:

- ``instructions``: per pair, of the CPU's tile kernels, counted by single steps;
- ``cycles``: issue cycles per tile of the Triton kernels, counted by ``bench.gpu_model``;
- ``times``: of the CPU's tile kernels, both in one process, turn by turn; on an idle machine.

Results are kept in ``results/generated_policies.json`` part by part and rendered beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from unitsface_kernels import losses

from .gpu_model import budgets
from .gpu_model.compile import Compiled
from .gpu_model.tritons import Triton, tritons, unpacked
from .gpu_model.worker import EVERY, VARIANTS
from .machine import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "generated_policies.json"
#: The last commit whose policies are all hand-written.
COMMIT = "d971dd7"
#: Losses that had policies by hand, one each.
HANDWRITTEN = ("pair_softmax", "uss", "uce", "sphereface2", "margin_softmax", "pair_logsumexp")
PARTS = ("instructions", "cycles", "times")
#: More than this over the hand-written one, and that one stays.
GATE = 0.03
ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
ISAS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ),
}
#: Tile kernels of policy_tiles.cpp, by reduction and topology.
KERNELS = {
    ("sum", "pair"): ("sum", "sum both", "sum per column"),
    ("sum", "class"): ("sum", "sum of rows per column"),
    ("logsumexp", "class"): ("statistics", "gradient"),
    ("logsumexp", "pair"): ("pair negatives", "pair positives", "pair gradient"),
}
#: Parameters that choose another way through a policy.
MORE: dict[str, tuple[dict[str, float | str], ...]] = {
    "sphereface2": ({"margin_type": "A", "margin_gradient": "exact", "t": 2.5},),
}


def _usable(isas: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    flags = Path("/proc/cpuinfo").read_text().split()
    known = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return {name: own for name, own in isas.items() if known.get(name, set()) <= {*flags}}


# --- CPU ------------------------------------------------------------------------------------------


def _handwritten_header(include: Path, name: str, generated: str) -> str:
    """The hand-written policy with the scalar functions of its time, in a namespace of its own, and
    with the constant that policies of sums have since.
    """
    sources = (include / "scalar_math.h", include / "losses" / f"{name}.h")
    text = "\n".join(source.read_text() for source in sources)
    text = re.sub(r'#include "\.\./scalar_math\.h"|#pragma once', "", text)
    text = re.sub(r'#include "(?:\.\./)?(\w+\.h)"', r'#include "unitsface/\1"', text)
    text = _renamed(text.replace("inline namespace UF_ISA", "namespace handwritten"), "Handwritten")
    constant = "".join(re.findall(r"^ *static constexpr bool kRowThresholds.*", generated, re.M))
    text = text.replace("struct Handwritten {", f"struct Handwritten {{\n{constant}")
    return f"{text}\nnamespace unitsface {{\nusing handwritten::Handwritten;\n}}\n"


def _renamed(text: str, name: str) -> str:
    """The text with another name for the policy, its last struct."""
    struct = re.findall(r"^struct (\w+)", text, re.MULTILINE)[-1]
    return re.sub(rf"\b{struct}\b", name, text)


def _compiled(tree: Path, spec: losses.LossSpec, folder: Path) -> Iterator[tuple[str, Path]]:
    """Programs of ``policy_tiles.cpp`` for a loss, by instruction set."""
    include = Path("csrc/include/unitsface")
    generated = (ROOT / include / "generated" / f"{spec.name}.h").read_text()
    generated = generated.replace('#include "../', '#include "unitsface/')
    (folder / "generated.h").write_text(_renamed(generated, "Generated"))
    (folder / "handwritten.h").write_text(_handwritten_header(tree / include, spec.name, generated))
    kernels = "sum_kernels" if spec.reduction == "sum" else "logsumexp_kernels"
    if (spec.reduction, spec.topology) == ("logsumexp", "pair"):
        kernels = "pair_logsumexp_kernels"
    for isa, own in _usable(ISAS).items():
        program = folder / f"{spec.name}-{isa}"
        paths = (f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
        files = (Path(__file__).with_name("policy_tiles.cpp"), ROOT / "csrc/cpu/pool.cpp")
        defined = (f"-DUF_ISA={isa}", f"-DUF_KERNELS={kernels}")
        command = ["g++", *FLAGS, "-ffp-contract=fast", *own, *defined, *paths, *map(str, files)]
        subprocess.run([*command, "-pthread", "-o", str(program)], check=True)
        yield isa, program


def _runs(tree: Path, mode: str) -> Iterator[dict[str, Any]]:
    """Each kernel of each loss: what ``policy_tiles`` prints of both variants."""
    for name in HANDWRITTEN:
        spec = losses.REGISTRY[name]
        settings: tuple[dict[str, float | str], ...] = ({}, *MORE.get(name, ()))
        with tempfile.TemporaryDirectory() as folder:
            for isa, program in _compiled(tree, spec, Path(folder)):
                for kernel, more in product(KERNELS[spec.reduction, spec.topology], settings):
                    if kernel == "pair positives" and spec.positive is None:
                        continue
                    loss = " ".join([name, *(f"{k}={v}" for k, v in more.items())])
                    params = spec.pack(spec.defaults() | more)
                    rounds = _rounds(program, mode, kernel, (params, spec.kernel_params(params)))
                    yield {"loss": loss, "isa": isa, "kernel": kernel} | _row(rounds)


def _rounds(
    program: Path, mode: str, kernel: str, constants: tuple[tuple[float, ...], ...]
) -> list[tuple[float, ...]]:
    command = [str(program), mode, kernel, *(",".join(map(repr, c)) for c in constants)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()]


def _row(rounds: list[tuple[float, ...]]) -> dict[str, Any]:
    handwritten, generated = (list(column) for column in zip(*rounds, strict=True))
    row: dict[str, Any] = {
        "handwritten": statistics.median(handwritten),
        "generated": statistics.median(generated),
    }
    if len(rounds) > 1:
        # Ratios within a round: other load slows both variants.
        ratios = [new / old for old, new in rounds]
        row["quartiles"] = statistics.quantiles(ratios, n=4)[::2]
        row["ratio"] = statistics.median(ratios)
    else:
        row["ratio"] = row["generated"] / row["handwritten"]
    return row


# --- Triton ---------------------------------------------------------------------------------------


def _costs(tree: Path, triton: Triton, architecture: int) -> dict[str, float]:
    """Issue cycles of every kernel of every loss, in the sources ``tree``."""
    # The hand-written ones are the only losses of their commit.
    task = f"{VARIANTS}:{EVERY}" if tree == ROOT else VARIANTS
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_model.worker", str(architecture), task],
        capture_output=True,
        text=True,
        cwd=tree,
        env=triton.environment,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = [Compiled.load(row) for row in rows]
    found: dict[str, float] = {}
    for kernel in kernels:
        key = f"{kernel.kernel} [{kernel.variant}] {kernel.label}"
        found[key] = max(found.get(key, 0.0), budgets.cost(kernel).issue_cycles)
    return found


def _cycles(tree: Path) -> Iterator[dict[str, Any]]:
    for triton in tritons(unpacked()):
        for architecture in ARCHITECTURES:
            old, new = (_costs(place, triton, architecture) for place in (tree, ROOT))
            for key in sorted(old.keys() & new.keys()):
                of_loss = [name for name in HANDWRITTEN if f" {name}." in key]
                if of_loss:
                    yield {
                        "loss": of_loss[0],
                        "triton": triton.version,
                        "architecture": architecture,
                        "kernel": key,
                        "handwritten": old[key],
                        "generated": new[key],
                        "ratio": new[key] / old[key],
                    }


# --- results --------------------------------------------------------------------------------------


def _table(title: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    columns = (*keys, "handwritten", "generated", "change")
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        numbers = [f"{row[name]:.4g}" for name in ("handwritten", "generated")]
        change = f"{row['ratio'] - 1:+.1%}"
        if "quartiles" in row:
            change += " ({:+.1%} to {:+.1%})".format(*(q - 1 for q in row["quartiles"]))
        lines.append(f"| {' | '.join([*(str(row[key]) for key in keys), *numbers, change])} |")
    return [*lines, ""]


def rendered(results: dict[str, Any]) -> str:
    lines = [
        "# Generated policies against hand-written ones",
        "",
        f"`python -m bench.generated_policies`; hand-written policies of commit {COMMIT}. A "
        f"hand-written one would stay where the generated one takes more than {GATE:.0%} more.",
        "",
        "Where counts are equal, times can differ by the order in which the compiler schedules the "
        "same instructions, with AVX2 by up to a tenth in either direction. Sums of a weighted "
        "softplus (UCE) take two products of the generated policy, which has a logit: more "
        "instructions in less time.",
        "",
    ]
    titles = {
        "instructions": ("CPU: instructions per pair, counted", ("loss", "isa", "kernel")),
        "times": ("CPU: nanoseconds per pair, median and quartiles", ("loss", "isa", "kernel")),
        "cycles": (
            "Triton: issue cycles per tile, counted",
            ("loss", "triton", "architecture", "kernel"),
        ),
    }
    for part, (title, keys) in titles.items():
        if part in results:
            rows = results[part]
            if part == "cycles":
                # The variant of a kernel that gets worse by the most.
                worst: dict[tuple[Any, ...], dict[str, Any]] = {}
                for row in rows:
                    name = row["kernel"].partition(" ")[0]
                    place = (row["loss"], row["triton"], row["architecture"], name)
                    if place not in worst or row["ratio"] > worst[place]["ratio"]:
                        worst[place] = row | {"kernel": name}
                rows = list(worst.values())
            lines += _table(title, rows, keys)
    return "\n".join(lines)


def _handwritten(commit: str, folder: Path) -> Path:
    """The sources of a commit."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.generated_policies", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--commit", default=COMMIT)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        tree = _handwritten(options.commit, Path(folder))
        for part in options.parts:
            rows = []
            mode = {"instructions": "count", "times": "time"}.get(part)
            for row in _cycles(tree) if mode is None else _runs(tree, mode):
                print(json.dumps(row), flush=True)
                rows.append(row)
            results[part] = rows
            results["machine"] = machine()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(rendered(results))


if __name__ == "__main__":
    main()
