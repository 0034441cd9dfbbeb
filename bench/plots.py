"""Scaling curves as PNG: time with its roofline, and peak memory."""

from __future__ import annotations

from pathlib import Path

TITLES = {
    "pair": "USS in-batch, forward and backward, D = {size}",
    "class": "CosFace, N = {rows}, forward and backward, D = {size}",
}
AXES = {"pair": ("rows", "N"), "class": ("columns", "C")}
STYLES = {"eager": {"color": "tab:orange", "marker": "s"}}
OURS_STYLE = {"color": "tab:blue", "marker": "o"}
# A log axis has no zero; smaller values are drawn here.
LEAST_MB = 1.0


def draw(name: str, curve: dict, path: Path) -> None:
    """Two log-log panels: seconds with the roofline, and MB above inputs and gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key, symbol = AXES[name]
    points = curve["points"]
    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(9.0, 3.6))
    for implementation in points[0]["implementations"]:
        known = [p for p in points if "median_s" in p["implementations"][implementation]]
        if not known:
            continue
        x = [point[key] for point in known]
        rows = [point["implementations"][implementation] for point in known]
        ours = implementation == curve["primary"]
        style = OURS_STYLE if ours else STYLES.get(implementation, {"marker": "^"})
        label = f"fused ({implementation})" if ours else implementation
        time_axes.plot(x, [row["median_s"] for row in rows], label=label, **style)
        memory = [max(row["above_gradients_mb"], LEAST_MB) for row in rows]
        memory_axes.plot(x, memory, label=label, **style)
    roofline = [point["roofline_s"] for point in points]
    x = [point[key] for point in points]
    time_axes.plot(x, roofline, "k--", linewidth=1, label="roofline: GEMM rate")
    for axes, what in ((time_axes, "seconds"), (memory_axes, "peak MB above inputs and gradients")):
        axes.set_xscale("log", base=2 if name == "pair" else 10)
        axes.set_yscale("log")
        axes.set_xlabel(symbol)
        axes.set_ylabel(what)
        axes.grid(True, which="major", linewidth=0.4)
        axes.legend(fontsize=8)
    figure.suptitle(TITLES[name].format(**points[0]), fontsize=10)
    figure.tight_layout()
    # No date or version in the file: the same results give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
