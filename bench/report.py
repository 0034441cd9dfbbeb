"""Results as a Markdown page."""

from __future__ import annotations

from .workloads import WORKLOADS


def markdown(results: dict) -> str:
    """The page ``bench/results/*.md`` of what ``python -m bench`` measured."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [
        "# Forward and backward, float32",
        "",
        f"`{results['command']}`; {machine}.",
        "",
        "Medians of rounds in which every contestant runs once; ratios are medians of the rounds'",
        "own ratios, with quartiles. Memory is the peak above inputs and gradients, each",
        "contestant in a process of its own. The bound is the time of the fused algorithm's matrix",
        "products at the rate of a 1024 x 1024 x D product measured in the same rounds.",
        "",
        "| workload | contestant | median | native is faster by | memory | of the GEMM bound |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["workloads"].items():
        workload = WORKLOADS[name]
        columns = f"C = {workload.columns}" if workload.columns else "in-batch"
        shape = f"{name}: {workload.loss}, N = {workload.rows}, {columns}, D = {workload.size}"
        for contestant, row in result["contestants"].items():
            low, high = row["times_native_quartiles"]
            ours = contestant == "native"
            ratio = "" if ours else f"{row['times_native']:.2f}x ({low:.2f}-{high:.2f})"
            memory = f"{row['above_gradients_mb']:.0f} MB" if "above_gradients_mb" in row else ""
            bound = f"{100 * result['fraction_of_gemm_bound']:.0f} %" if ours else ""
            lines.append(
                f"| {shape} | {contestant} | {_seconds(row['median_s'])} | {ratio} | {memory} "
                f"| {bound} |"
            )
            shape = ""
    return "\n".join(lines) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
