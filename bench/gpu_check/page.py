"""The page of a run: one table per stage, of what has been reported so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Rows = list[str]
Report = dict[str, Any]
LISTED = 12
LONGEST_CELL = 110


def _table(head: str, rows: Iterable[Iterable[object]]) -> Rows:
    """A table with the column names ``head``, separated by " | "."""
    count = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * count]
    for row in rows:
        cells = [str(cell).replace("|", "/").replace("\n", " ")[:LONGEST_CELL] for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ms(row: Report, key: str) -> str:
    return f"{1e3 * row[key]:.3f}" if row.get(key) is not None else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _stages(found: Report) -> Rows:
    rows = [
        (s["name"], s["verdict"], f"{s['seconds']:.0f}", f"{s['limit']:.0f}")
        for s in found["stages"]
    ]
    return _table("stage | result | seconds | limit", rows)


def _environment(report: Report) -> Rows:
    packages = ", ".join(f"{k} {v}" for k, v in report["packages"].items() if v)
    lacking = ", ".join(k for k, v in (report["packages"] | report["tools"]).items() if not v)
    lines = [f"Python {report['python']}, {report['cores']} cores; {packages}.", ""]
    if lacking:
        lines += [f"Missing: {lacking}.", ""]
    if device := report.get("device"):
        lines += [", ".join(f"{k} {v}" for k, v in device.items()) + ".", ""]
    if report["clocks"]:
        lines += [", ".join(f"{k} {v}" for k, v in report["clocks"].items()) + "."]
    return lines


def _build(report: Report) -> Rows:
    attempts = [(a["name"], a["status"], f"{a['seconds']:.0f}") for a in report["attempts"]]
    return [
        f"Architecture {report['architecture']}.",
        "",
        *_table("attempt | status | seconds", attempts),
    ]


def _compile(report: Report) -> Rows:
    kernels = report["kernels"]
    lines = [
        f"{report['done']} of {report['tasks']} tasks, {len(kernels)} kernels; "
        f"{report.get('seconds', 0)} s, {report.get('processor_seconds', 0)} s one by one.",
        "",
    ]
    stacked = [row for row in kernels if row.get("stack") or row.get("local")]
    largest = sorted(kernels, key=lambda row: -row.get("registers", 0))
    shown = {id(row): row for row in (*stacked[:LISTED], *largest[: LISTED // 2], *kernels[:3])}
    keys = ("kernel", "registers", "stack", "local", "shared", "warps", "seconds", "first_in")
    lines += _table(
        " | ".join(keys), ([row.get(key, "") for key in keys] for row in shown.values())
    )
    return lines + _failures(report["failures"])


def _failures(failures: dict[str, str]) -> Rows:
    if not failures:
        return []
    rows = list(failures.items())[:LISTED]
    return ["", f"{len(failures)} failed:", "", *_table("what | why", rows)]


def _cases(report: Report) -> Rows:
    lines = [f"{report['ran']} of {report['cases']} ran, {len(report['failed'])} failed."]
    return lines + _failures(report["failed"])


def _host(report: Report) -> Rows:
    rows = [
        (
            name,
            _ms(row, "wall_s"),
            _ms(row, "launch_s"),
            _ms(row, "event_s"),
            _ms(row, "replay_s"),
            _ms(row, "predicted_s"),
            f"{row['replay_over_predicted']:.2f}" if "replay_over_predicted" in row else "",
            {True: "host", False: "device"}.get(row.get("host_bound"), ""),  # type: ignore[arg-type]
            row.get("error") or row.get("capture", ""),
        )
        for name, row in report.items()
    ]
    return _table(
        "step, ms | wall | launches | events | graph replay | predicted | replay / predicted "
        "| bound by | no replay because",
        rows,
    )


def _rates(report: Report) -> Rows:
    lines = []
    if report.get("copy_bytes"):
        lines += [
            f"Copy {report['copy_bytes'] / 1e12:.2f} TB/s; clock {report['clock_mhz']} MHz.",
            "",
        ]
    if report.get("l2_bytes"):
        clocked = report.get("l2_bytes_per_clock") or {}
        rows = [
            (name, f"{value / 1e12:.2f}", f"{clocked[name]:.1f}" if name in clocked else "")
            for name, value in report["l2_bytes"].items()
        ]
        lines += [*_table("L2 to SMs, data of | TB/s | bytes per clock and SM", rows), ""]
    if report.get("gemms"):
        rows = [
            (
                f"{name}: {row['m']} x {row['n']} x {row['k']}",
                *(f"{row[k] / 1e12:.0f}" if k in row else "" for k in ("warm", "cold")),
                row.get("error", row["why"]),
            )
            for name, row in report["gemms"].items()
        ]
        lines += _table("GEMM, m x n x k | TFLOP/s, operands in L2 | not in L2 | where", rows)
    return lines + _failures(report.get("errors", {}))


def _profile(report: Report) -> Rows:
    rows: list[tuple[object, ...]] = []
    for step in report["steps"]:
        name = f"{step['shape']} {step['backend']}"
        if "error" in step:
            rows.append((name, "", "", step["error"]))
            continue
        fraction = f"{_percent(step['roofline_fraction'])} of the roofline"
        rows.append((f"**{name}**", _ms(step, "median_s"), "", fraction))
        for phase in step["phases"]:
            rate = ""
            if "of_gemm" in phase:
                rate = f"{phase['tflops']:.0f} TFLOP/s, {_percent(phase['of_gemm'])} of GEMM"
            elif "of_copy" in phase:
                rate = f"{phase['gb_per_s']:.0f} GB/s, {_percent(phase['of_copy'])} of copy"
            share = _percent(phase["fraction"])
            rows.append((f"- {phase['phase']}", _ms(phase, "seconds"), share, rate))
    head = (
        f"GEMM {report['gemm_flops'] / 1e12:.0f} TFLOP/s, copy "
        f"{report['copy_bytes'] / 1e12:.2f} TB/s."
    )
    return [head, "", *_table("step and phase | ms | of the step | rate", rows)]


def _alternatives(report: Report) -> Rows:
    rows = []
    for step, found in report.items():
        # The best first; failures last.
        ordered = sorted(found.items(), key=lambda item: -item[1].get("speedup", 0.0))
        kept = [(n, r) for n, r in ordered if "shipped" in n] + [
            (n, r) for n, r in ordered if "shipped" not in n
        ][: LISTED // 2]
        for name, row in kept:
            note = row.get("error") or row.get("refused") or ""
            note = "WRONG RESULT" if row.get("wrong") else note
            speedup = f"{row['speedup']:.3f}" if "speedup" in row else ""
            rows.append((step, name, _ms(row, "median_s"), speedup, note))
    return _table("step | launch | ms | against the shipped | ", rows)


def _counters(report: Report) -> Rows:
    if "skipped" in report:
        return [f"None: {report['skipped']}"]
    launches = report["launches"]
    names = list(dict.fromkeys(name for launch in launches for name in launch))
    head = "counter | " + " | ".join(f"launch {i}" for i in range(len(launches)))
    rows = ([name, *(launch.get(name, "") for launch in launches)] for name in names)
    return [f"{report['step']}.", "", *_table(head, rows)]


def _peers(report: Report) -> Rows:
    rows = []
    for workload, found in report.items():
        if workload == "machine":
            continue
        whole = found.get("failed") or found.get("skipped")
        if whole:
            rows.append((workload, "", "", "", whole))
        for name, row in found.get("implementations", {}).items():
            speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
            reason = row.get("failed") or row.get("skipped") or ""
            rows.append((workload, name, _ms(row, "median_s"), speedup, reason))
    return _table("workload | implementation | ms | ours is faster by | ", rows)


def _tests(report: Report) -> Rows:
    keys = ("passed", "failed", "error", "skipped", "seconds")
    rows = [
        (name, *(row.get(key, "") for key in keys), "interrupted" if "interrupted" in row else "")
        for name, row in report.items()
        if row.get("status") != 5
    ]
    failures = {one: name for name, row in report.items() for one in row.get("failures", ())}
    return [*_table("file | passed | failed | errors | skipped | s | ", rows), *_failures(failures)]


#: By the key of a report, in the order of the page.
SECTIONS: dict[str, tuple[str, Callable[[Report], Rows]]] = {
    "environment": ("Environment", _environment),
    "build": ("Build", _build),
    "compile_kernels": ("Triton kernels", _compile),
    "cases": ("Small cases", _cases),
    "rates": ("Rates of the device", _rates),
    "device_tests": ("Tests", _tests),
    "peers": ("Other packages", _peers),
    "counters": ("Counters", _counters),
    "alternatives": ("Shipped launches against alternatives", _alternatives),
    "profile": ("Phases", _profile),
    "host": ("Host against device", _host),
}


def page(found: Report) -> str:
    """Markdown; the stages and what the model predicts come last, where a terminal shows them."""
    lines = ["# A run of bench/gpu_check.sh", "", f"`{found['command']}`", ""]
    if not found["finished"]:
        lines += ["Not finished.", ""]
    for key, (title, section) in SECTIONS.items():
        if key not in found:
            continue
        lines += [f"## {title}", ""]
        try:
            lines += section(found[key])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # An incomplete report is in the JSON file as it is.
            lines.append(f"Not complete: {type(error).__name__} {error}")
        lines.append("")
    return "\n".join([*lines, "## Stages", "", *_stages(found)]) + "\n"
