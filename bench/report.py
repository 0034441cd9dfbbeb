"""``python -m bench.report --readme``: stored results as Markdown, in README.md and bench/results.

``--check`` fails if a generated page or section differs from the stored results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from .targets import SCALING_DEVIATION, TARGETS, Target

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->"
NOTHING, TIMES = "-", "\N{MULTIPLICATION SIGN}"

# Workloads in the README, with their descriptions; those without results are omitted.
README_ROWS = {
    "pair-8k": "USS in-batch, N = 8192",
    "pair-8k-bf16": "the same under bfloat16 autocast",
    "pair-32k": "USS in-batch, N = 32 768",
    "memory-glint": "USS, N = 1024 against a memory of 360 232",
    "class-100k": "CosFace, N = 512, C = 100 000",
    "class-100k-trained": "the same, trained, with gradient filtering",
    "class-400k": "CosFace, N = 128, C = 400 000",
    "class-glint": "CosFace, N = 1024, C = 360 232",
    "uce-100k": "UCE, N = 512, C = 100 000",
}
README_COLUMNS = {
    "eager": "eager",
    "torch.compile": "torch.compile",
    "published": "as published",
}

EXPLANATION = (
    "Medians of interleaved rounds. Speedup: time of the implementation over the time of the",
    "first row, the median of the rounds' own ratios, with quartiles. Throughput: N x M pairs per",
    "second (in-batch M = N) and, of the fused implementations, the FLOPs of the algorithm's",
    "GEMMs. Peak memory is above inputs and gradients. Roofline fraction: the time of these GEMMs",
    "at the rate of a plain GEMM, or of reading inputs and writing gradients at the rate of a",
    "copy if that is longer, over the time taken; both rates are measured in the same run. A",
    "class softmax computes its cosines once where they can be kept, for D rows, else twice.",
    "Errors are relative, of the loss and of the worst gradient as a vector, against float64 on",
    "at most 256 rows and 4096 columns.",
)
COLUMNS = (
    "workload",
    "implementation",
    "median (samples)",
    "speedup",
    "throughput",
    "peak memory",
    "roofline fraction",
    "errors",
)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _speedup(row: dict) -> str:
    """Speedup of the primary implementation over this one, with quartiles of several rounds."""
    if "speedup" not in row:
        return ""
    text = f"{row['speedup']:.2f}{TIMES}"
    if "speedup_quartiles" in row:
        text += " ({:.2f}-{:.2f})".format(*row["speedup_quartiles"])
    return text


def _memory(row: dict) -> str:
    return f"{max(row['above_gradients_mb'], 0):.0f} MB" if "above_gradients_mb" in row else ""


def pairs(shape: dict) -> float:
    """Number of cosines: N x M, in-batch N x N."""
    return float(shape["rows"]) * (shape["columns"] or shape["rows"])


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def throughput(shape: dict, row: dict) -> str:
    """Pairs/s and, of fused implementations, TFLOP/s of the algorithm's GEMMs."""
    per_second = pairs(shape) / row["median_s"]
    text = f"{_significant(per_second / 1e6)} M pairs/s"
    if "roofline_fraction" in row:
        tflops = 2.0 * shape["gemms"] * shape["size"] * per_second / 1e12
        text += f", {_significant(tflops)} TFLOP/s"
    return text


def _errors(row: dict) -> str:
    if "errors" not in row:
        return ""
    gradients = [error for name, error in row["errors"].items() if name != "loss"]
    return ", ".join(f"{error:.0e}" for error in (row["errors"]["loss"], *sorted(gradients)[-1:]))


def _shape(name: str, result: dict) -> str:
    if "rows" not in result:
        return name
    columns = f"M = {result['columns']}" if result["columns"] else "in-batch"
    text = f"{name}: {result['loss']}, N = {result['rows']}, {columns}, D = {result['size']}"
    probability = result.get("facts", {}).get("negative_prob")
    return text if probability is None else f"{text}, negative_prob {probability:.3f}"


def _machine(results: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in results["machine"].items())


def page(results: dict) -> str:
    """The page ``bench/results/<device>.md`` of what ``python -m bench`` measured."""
    lines = [
        "# Forward and backward",
        "",
        f"`{results['command']}`; {_machine(results)}.",
        "",
        *EXPLANATION,
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for name, result in results["workloads"].items():
        shape = _shape(name, result)
        if result.get("command", results["command"]) != results["command"]:
            shape += f" (`{result['command']}`)"
        for reason in ("failed", "skipped"):
            if reason in result:
                lines.append(f"| {shape} | {reason}: {_cell(result[reason])} | | | | | | |")
        for implementation, row in result.get("implementations", {}).items():
            lines.append(f"| {shape} | {implementation} | {' | '.join(_cells(result, row))} |")
            shape = ""
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cells(result: dict, row: dict) -> list[str]:
    for reason in ("failed", "skipped"):
        if reason in row:
            return [_cell(f"{reason}: {row[reason]}"), "", "", "", "", _errors(row)]
    if "median_s" not in row:
        return [NOTHING, "", "", "", "", ""]
    samples = f" ({row['samples']})" if "samples" in row else ""
    return [
        seconds(row["median_s"]) + samples,
        _speedup(row),
        throughput(result, row),
        _memory(row),
        f"{row['roofline_fraction']:.0%}" if "roofline_fraction" in row else "",
        _errors(row),
    ]


def _other(row: dict | None) -> str:
    """Cell of an implementation in the README: speedup and peak memory, or the reason of a gap."""
    if row is None:
        return NOTHING
    if "skipped" in row:
        return "does not fit"
    if "speedup" not in row:
        return NOTHING
    return ", ".join(filter(None, (f"{row['speedup']:.2f}{TIMES}", _memory(row))))


def readme_section(folder: Path = RESULTS) -> str:
    """The README's table: time and peak memory of the fused loss, speedup over the others."""
    results = load(folder / "cpu.json")
    if results is None:
        return "Not measured yet: `make bench`.\n"
    machine = results["machine"]
    lines = [
        f"Forward and backward on {machine['processor']}, {machine['threads']} threads, Torch",
        f"{machine['torch']}, D = 512: time and peak memory above inputs and gradients of",
        "the fused loss, then its speedup over other implementations and their peak memory",
        f"([all results](bench/results/cpu.md), `{results['command']}`):",
        "",
        f"| | fused | {' | '.join(README_COLUMNS.values())} |",
        "|---" * (len(README_COLUMNS) + 2) + "|",
    ]
    for name, wording in README_ROWS.items():
        rows = results["workloads"].get(name, {}).get("implementations", {})
        ours = rows.get("native", {})
        if "median_s" not in ours:
            continue
        fused = ", ".join(filter(None, (seconds(ours["median_s"]), _memory(ours))))
        others = " | ".join(_other(rows.get(other)) for other in README_COLUMNS)
        lines.append(f"| {wording} | {fused} | {others} |")
    return "\n".join(lines) + "\n"


def _verdict(target: Target, results: dict | None) -> tuple[str, str]:
    """The measurement, and "yes" or "no": the target is met."""
    if results is None or target.workload not in results["workloads"]:
        return "not measured", NOTHING
    result = results["workloads"][target.workload]
    rows = result.get("implementations", {})
    primary = result.get("primary", "native")
    ours, other = rows.get(target.ours or primary, {}), rows.get(target.against, {})
    if "median_s" not in ours:
        return "not measured", NOTHING
    measured, met = [], []
    if target.speedup is not None:
        if "median_s" not in other:
            reason = other.get("skipped", other.get("failed", "not measured"))
            measured.append(f"{target.against}: {reason}")
        else:
            # Speedups of interleaved rounds are stored for the primary implementation only.
            stored = target.ours in (None, primary) and "speedup" in other
            speedup = other["speedup"] if stored else other["median_s"] / ours["median_s"]
            measured.append(_speedup(other) if stored else f"{speedup:.2f}{TIMES}")
            met.append(speedup >= target.speedup)
    if target.memory_mb is not None and "above_gradients_mb" in ours:
        measured.append(_memory(ours))
        met.append(ours["above_gradients_mb"] <= target.memory_mb)
    if target.memory_fraction is not None and "above_gradients_mb" in ours:
        measured.append(_memory(ours))
        if "above_gradients_mb" in other:
            fraction = ours["above_gradients_mb"] / max(other["above_gradients_mb"], 1.0)
            measured[-1] += f", {fraction:.1%} of {target.against}'s"
            met.append(fraction <= target.memory_fraction)
    if target.roofline_fraction is not None and "roofline_fraction" in ours:
        measured.append(f"{ours['roofline_fraction']:.0%} of the roofline")
        met.append(ours["roofline_fraction"] >= target.roofline_fraction)
    answer = NOTHING if not met else "yes" if all(met) else "no"
    return _cell("; ".join(measured)), answer


def _scaling_rows(folder: Path) -> Iterator[str]:
    scaling = load(folder / "scaling.json")
    target = f"a + b·N·M·D within {SCALING_DEVIATION:.0%}"
    if scaling is None:
        yield f"| `scaling` | {target} | not measured | {NOTHING} |"
        return
    for name, curve in scaling["curves"].items():
        fit = curve.get("fit")
        if fit is None:
            continue
        met = "yes" if fit["largest_deviation"] <= SCALING_DEVIATION else "no"
        yield f"| `scaling`, {name} | {target} | {fit['largest_deviation']:.0%} | {met} |"


def targets_section(folder: Path = RESULTS) -> str:
    """Every target beside the stored results."""
    lines = ["| workload | target | measured | met |", "|---|---|---|---|"]
    stored = {device: load(folder / f"{device}.json") for device in ("cpu", "cuda")}
    for target in TARGETS:
        aims = []
        if target.speedup is not None:
            ours = "" if target.ours is None else f"`{target.ours}` "
            aims.append(f"{ours}speedup {target.speedup:.3g} over {target.against}")
        if target.memory_mb is not None:
            aims.append(f"peak memory below {target.memory_mb:.3g} MB")
        if target.memory_fraction is not None:
            aims.append(f"{target.memory_fraction:.0%} of the peak memory of {target.against}")
        if target.roofline_fraction is not None:
            aims.append(f"{target.roofline_fraction:.0%} of the roofline")
        measured, met = _verdict(target, stored[target.device])
        where = "" if target.device == "cpu" else f" ({target.device})"
        lines.append(f"| `{target.workload}`{where} | {', '.join(aims)} | {measured} | {met} |")
    lines += _scaling_rows(folder)
    return "\n".join(lines) + "\n"


def load(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def updated(text: str, marker: str, section: str) -> str:
    begin, end = BEGIN.format(marker), END.format(marker)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + section + end + after


def gpu_steps_section() -> str:
    """The steps of docs/gpu.md, as ``python -m bench.gpu_model`` has predicted them."""
    results = load(RESULTS / "gpu_model.json")
    assert results is not None
    lines = [
        "| step | launches | predicted ms | predicted part of the GEMM roofline | host ms |",
        "|---" * 5 + "|",
    ]
    chosen = ("NVIDIA H200", "3.6.0")
    for step in (s for s in results["steps"] if (s["chip"], s["triton"]) == chosen):
        seconds, host = step["predicted_seconds"], step["host_seconds"]
        fraction = f"{step['predicted_roofline_fraction']:.0%}".replace("%", " %")
        times = f"{1e3 * seconds:.2f} | {fraction} | {'-' if host is None else f'{1e3 * host:.1f}'}"
        lines.append(f"| `{step['step']}` | {step['launches']} | {times} |")
    return "\n".join(lines) + "\n"


def _generated() -> Iterator[tuple[Path, str]]:
    """Pages with their present generated content."""
    for path, marker, section in (
        (ROOT / "README.md", "measured", readme_section()),
        (RESULTS / "README.md", "targets", targets_section()),
        (ROOT / "docs" / "gpu.md", "steps", gpu_steps_section()),
    ):
        yield path, updated(path.read_text(), marker, section)
    for device in ("cpu", "cuda"):
        results = load(RESULTS / f"{device}.json")
        if results is not None:
            yield RESULTS / f"{device}.md", page(results)


def outdated(write: bool) -> list[str]:
    """Pages that differ from the stored results; rewritten if ``write``."""
    found = []
    for path, now in _generated():
        if not path.exists() or now != path.read_text():
            found.append(path.relative_to(ROOT).as_posix())
            if write:
                path.write_text(now)
    return found


def main() -> None:
    if sys.argv[1:] not in (["--readme"], ["--check"]):
        sys.exit(__doc__)
    found = outdated(write="--readme" in sys.argv)
    if found and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(found)}; run python -m bench.report --readme")


if __name__ == "__main__":
    main()
