"""``python -m bench.report --readme``: results as Markdown, in the README and beside the results.

``--check`` fails if the generated parts of the READMEs are not those of the stored results.
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

# Workload and its wording in the README; those without results are left out.
README_ROWS = {
    "pair-8k": "USS in-batch, N = 8192",
    "pair-32k": "USS in-batch, N = 32 768",
    "memory-glint": "USS, N = 1024 against a memory of 360 232",
    "class-100k": "CosFace, N = 512, C = 100 000",
    "class-100k-trained": "the same, trained, negligible tiles skipped",
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
    "Medians of rounds in which contestants run in turns; ratios are medians of the rounds' own",
    "ratios, with quartiles. Memory is the peak above inputs and gradients. The bound is the time",
    "of the fused algorithm's matrix products at the rate of a plain product, or of reading inputs",
    "and writing gradients at the rate of a copy if that is longer, both measured in the same run.",
    "Cosines of a class softmax are multiplied once where they can be kept, of D rows; else twice.",
    "Errors are relative, of the loss and of the worst gradient as a vector, against float64 on at",
    "most 256 rows and 4096 columns.",
)
COLUMNS = (
    "workload",
    "contestant",
    "median (of)",
    "ours is faster by",
    "memory",
    "of the bound",
    "errors",
)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _ratio(row: dict) -> str:
    """How many times longer than ours, with the quartiles where there are several rounds."""
    if "times_ours" not in row:
        return ""
    text = f"{row['times_ours']:.2f}{TIMES}"
    if "times_ours_quartiles" in row:
        text += " ({:.2f}-{:.2f})".format(*row["times_ours_quartiles"])
    return text


def _memory(row: dict) -> str:
    return f"{max(row['above_gradients_mb'], 0):.0f} MB" if "above_gradients_mb" in row else ""


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
    share = result.get("facts", {}).get("negatives_share")
    return text if share is None else f"{text}, negatives' share {share:.3f}"


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
                lines.append(f"| {shape} | {reason}: {_cell(result[reason])} | | | | | |")
        for contestant, row in result.get("contestants", {}).items():
            lines.append(f"| {shape} | {contestant} | {' | '.join(_cells(row))} |")
            shape = ""
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _cells(row: dict) -> list[str]:
    for reason in ("failed", "skipped"):
        if reason in row:
            return [_cell(f"{reason}: {row[reason]}"), "", "", "", _errors(row)]
    if "median_s" not in row:
        return [NOTHING, "", "", "", ""]
    samples = f" ({row['samples']})" if "samples" in row else ""
    bound = f"{row['of_bound']:.0%}" if "of_bound" in row else ""
    return [seconds(row["median_s"]) + samples, _ratio(row), _memory(row), bound, _errors(row)]


def _other(row: dict | None) -> str:
    """A contestant in the README: its ratio and memory, or why there is none."""
    if row is None:
        return NOTHING
    if "skipped" in row:
        return "does not fit"
    if "times_ours" not in row:
        return NOTHING
    return ", ".join(filter(None, (f"{row['times_ours']:.2f}{TIMES}", _memory(row))))


def readme_section(folder: Path = RESULTS) -> str:
    """The README's figures: fused time and memory, and how many times longer the others take."""
    results = load(folder / "cpu.json")
    if results is None:
        return "Not measured yet: `make bench`.\n"
    machine = results["machine"]
    lines = [
        f"Forward and backward on {machine['processor']}, {machine['threads']} threads, with Torch",
        f"{machine['torch']}, float32, D = 512: time of the fused loss and its memory above inputs",
        "and gradients, then how many times longer the others take, and their memory",
        f"([all results](bench/results/cpu.md), `{results['command']}`):",
        "",
        f"| | fused | {' | '.join(README_COLUMNS.values())} |",
        "|---" * (len(README_COLUMNS) + 2) + "|",
    ]
    for name, wording in README_ROWS.items():
        rows = results["workloads"].get(name, {}).get("contestants", {})
        ours = rows.get("native", {})
        if "median_s" not in ours:
            continue
        fused = ", ".join(filter(None, (seconds(ours["median_s"]), _memory(ours))))
        others = " | ".join(_other(rows.get(other)) for other in README_COLUMNS)
        lines.append(f"| {wording} | {fused} | {others} |")
    for plot, alt in (
        ("scaling_pair.png", "Time and memory of USS against N"),
        ("scaling_class.png", "Time and memory of CosFace against C"),
    ):
        if (folder / plot).exists():
            lines += ["", f"![{alt}](bench/results/{plot})"]
    return "\n".join(lines) + "\n"


def _verdict(target: Target, results: dict | None) -> tuple[str, str]:
    """What was measured, and whether the target is met."""
    if results is None or target.workload not in results["workloads"]:
        return "not measured", NOTHING
    result = results["workloads"][target.workload]
    rows = result.get("contestants", {})
    primary = result.get("primary", "native")
    ours, other = rows.get(target.ours or primary, {}), rows.get(target.against, {})
    if "median_s" not in ours:
        return "not measured", NOTHING
    measured, met = [], []
    if target.ratio is not None:
        if "median_s" not in other:
            reason = other.get("skipped", other.get("failed", "not measured"))
            measured.append(f"{target.against}: {reason}")
        else:
            # Rounds' own ratios are stored against the primary contestant only.
            usual = target.ours in (None, primary) and "times_ours" in other
            ratio = other["times_ours"] if usual else other["median_s"] / ours["median_s"]
            measured.append(_ratio(other) if usual else f"{ratio:.2f}{TIMES}")
            met.append(ratio >= target.ratio)
    if target.memory_mb is not None and "above_gradients_mb" in ours:
        measured.append(_memory(ours))
        met.append(ours["above_gradients_mb"] <= target.memory_mb)
    if target.memory_share is not None and "above_gradients_mb" in ours:
        measured.append(_memory(ours))
        if "above_gradients_mb" in other:
            share = ours["above_gradients_mb"] / max(other["above_gradients_mb"], 1.0)
            measured[-1] += f", {share:.1%} of {target.against}'s"
            met.append(share <= target.memory_share)
    if target.of_bound is not None and "of_bound" in ours:
        measured.append(f"{ours['of_bound']:.0%} of the bound")
        met.append(ours["of_bound"] >= target.of_bound)
    answer = NOTHING if not met else "yes" if all(met) else "no"
    return _cell("; ".join(measured)), answer


def _scaling_rows(folder: Path) -> Iterator[str]:
    scaling = load(folder / "scaling.json")
    aim = f"a + b·N·M·D within {SCALING_DEVIATION:.0%}"
    if scaling is None:
        yield f"| `scaling` | {aim} | not measured | {NOTHING} |"
        return
    for name, curve in scaling["curves"].items():
        fit = curve.get("fit")
        if fit is None:
            continue
        met = "yes" if fit["largest_deviation"] <= SCALING_DEVIATION else "no"
        yield f"| `scaling`, {name} | {aim} | {fit['largest_deviation']:.0%} | {met} |"


def targets_section(folder: Path = RESULTS) -> str:
    """Every target against what the stored results say."""
    lines = ["| workload | aim | measured | met |", "|---|---|---|---|"]
    stored = {device: load(folder / f"{device}.json") for device in ("cpu", "cuda")}
    for target in TARGETS:
        aims = []
        if target.ratio is not None:
            ours = "" if target.ours is None else f"`{target.ours}` "
            aims.append(f"{ours}{target.ratio:.3g} {TIMES} as fast as {target.against}")
        if target.memory_mb is not None:
            aims.append(f"below {target.memory_mb:.3g} MB")
        if target.memory_share is not None:
            aims.append(f"{target.memory_share:.0%} of the memory of {target.against}")
        if target.of_bound is not None:
            aims.append(f"{target.of_bound:.0%} of the bound")
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


def outdated(write: bool) -> list[str]:
    """The READMEs whose generated part is not that of the results; rewritten if ``write``."""
    found = []
    for path, marker, section in (
        (ROOT / "README.md", "measured", readme_section()),
        (RESULTS / "README.md", "targets", targets_section()),
    ):
        text = path.read_text()
        now = updated(text, marker, section)
        if now != text:
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
