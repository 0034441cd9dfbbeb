"""Figures of reports, of one panel each: :func:`save` and :func:`svg` make files and markup."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from train.evaluation.roc import FARS, Roc
from train.evaluation.thresholds import Spread
from train.evaluation.verification import Bools, Floats
from unitsface_kernels import metrics

# In a page, which has two schemes, these are its --c0, --c1, ... and black is that of text.
COLORS = ("#0b62a4", "#b93b08", "#0a7350", "#8b3f96", "#7d5b00", "#5f6672")
LINE = "#d3d9df"
POSITIVE, NEGATIVE = COLORS[2], COLORS[3]
LEARNED, BEST = {"color": "black"}, {"color": "black", "linestyle": ":"}
# Inches: text is legible where a panel fills the width of a phone.
WIDTH, HEIGHT = 4.4, 3.1
# More points cannot be distinguished: curves are averaged, of identities every n-th is drawn.
MOST_POINTS = 400
LONGEST_LABEL = 34


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=200)


def svg(figure: Figure, caption: str) -> str:
    """SVG markup that scales and takes the fonts and colors of the page. The page shows the
    caption; screen readers read it, and the first and last values of the curves.
    """
    (axes,) = figure.axes
    axes.set_title("")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    _, _, text = buffer.getvalue().partition("<svg ")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = text.partition(">")[2].replace("#000000", "currentColor").replace("xlink:href", "href")
    for name, color in {**{f"c{i}": color for i, color in enumerate(COLORS)}, "line": LINE}.items():
        text = text.replace(color, f"var(--{name})")
    # Ids that nothing refers to would be those of every other figure as well.
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"<[^>]+>", lambda m: re.sub(r"(\.\d\d)\d+|\s*\n\s*", r"\1 ", m[0]), text)
    lines = [(line.get_label(), np.asarray(line.get_ydata(), float)) for line in axes.lines]
    ends = [f"{name} {y[0]:.3g} to {y[-1]:.3g}" for name, y in lines if y.size > 2]
    label = escape(": ".join([caption, ", ".join(ends)] if ends else [caption]))
    return f'<svg role="img" aria-label="{label}" {box[0]}>{text}'


def _plain(name: str) -> str:
    """A name as it is, or its end: between dollars it would be taken for a formula."""
    cut = name if len(name) <= LONGEST_LABEL else f"…{name[1 - LONGEST_LABEL :]}"
    return cut.replace("$", r"\$")


def _panel(title: str, height: float = HEIGHT, **labels: Any) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(title=_plain(title), **labels)
    axes.title.set_size(11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Below the axes, where it covers nothing."""
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) <= LONGEST_LABEL * 2 // 3 else 1
    if handles:
        place = {"loc": "outside lower center", "ncols": columns}
        figure.legend(handles, labels, fontsize=9, frameon=False, **place)


def roc(curves: Mapping[str, Roc], title: str = "ROC") -> Figure:
    """ROC of each method or set, the false accept rate on a log axis."""
    floor = 1 / max(curve.negatives for curve in curves.values())
    limits = {"xscale": "log", "xlim": (floor, 1), "ylim": (0, 1.01)}
    figure, axes = _panel(title, xlabel="false accept rate", ylabel="true accept rate", **limits)
    for i, (name, curve) in enumerate(curves.items()):
        # From the strictest threshold on; a rate of 0 has no place on a log axis.
        far, tar = np.maximum(curve.far[::-1], 1 / curve.negatives), curve.tar[::-1]
        label = f"{_plain(name)}: AUC {curve.auc:.3f}"
        axes.step(far, tar, where="post", color=COLORS[i % len(COLORS)], label=label)
    for far_line in FARS:
        if far_line >= floor:
            axes.axvline(far_line, color="black", alpha=0.2, linewidth=0.8, zorder=0)
    _legend(figure)
    return figure


@dataclass(frozen=True)
class Counts:
    """Pairs per bin of their cosine."""

    edges: NDArray[np.floating[Any]]  # (B + 1,)
    positives: NDArray[np.integer[Any]]  # (B,)
    negatives: NDArray[np.integer[Any]]  # (B,)


def count(scores: Floats, same: Bools, bins: int = 60) -> Counts:
    """Counts of listed pairs."""
    edges = np.linspace(scores.min(), scores.max(), bins + 1)
    positives, negatives = (np.histogram(scores[kind], edges)[0] for kind in (same, ~same))
    return Counts(edges, positives, negatives)


def count_all(
    features: Floats,
    labels: NDArray[np.integer[Any]],
    device: torch.device | str = "cpu",
    bins: int = 80,
) -> Counts:
    """Counts of all unordered pairs of (N, D) features, without a list of them."""
    feats = torch.as_tensor(features, dtype=torch.float32, device=device)
    identities = torch.as_tensor(labels, dtype=torch.int64, device=device)
    histogram = metrics.pair_histogram(feats, identities, bins=bins)
    inside = []
    for kind in (histogram.positives.numpy(), histogram.negatives.numpy()):
        kind[1] += kind[0]  # rounding may carry a cosine beyond 1
        kind[-2] += kind[-1]
        inside.append(kind[1:-1])
    used = np.flatnonzero(inside[0] + inside[1])
    first, last = used[0], used[-1] + 1
    edges = histogram.edges.double().numpy()[first : last + 1]
    return Counts(edges, inside[0][first:last], inside[1][first:last])


def histogram(name: str, values: Counts, learned: float | None, best: float) -> Figure:
    """Scores of positive and negative pairs, each normalized to its own area."""
    figure, axes = _panel(name, xlabel="cosine of a pair", ylabel="density")
    for kind, color, label in (
        (values.negatives, NEGATIVE, "different people"),
        (values.positives, POSITIVE, "same person"),
    ):
        density = kind / (max(1, kind.sum()) * np.diff(values.edges))
        axes.stairs(density, values.edges, fill=True, color=color, alpha=0.6, label=label)
    axes.axvline(best, label=f"best for these: {best:.2f}", **BEST)
    if learned is not None:
        axes.axvline(learned, label=f"learned b/s: {learned:.2f}", **LEARNED)
    _legend(figure)
    return figure


def identity_thresholds(spread: Spread, learned: float | None, best: float) -> Figure:
    """A dot per identity at its best threshold, in ascending order, and the unified threshold as a
    line: UniTSFace's figure 1. Behind each dot, ours: from the identity's highest negative cosine
    to its lowest positive one, green where any threshold between them is right for all its pairs.
    """
    order = np.argsort(spread.thresholds, kind="stable")
    order = order[:: -(-len(order) // MOST_POINTS)]
    figure, axes = _panel(
        "A threshold per identity", xlabel="identities, by threshold", ylabel="cosine"
    )
    x = np.arange(len(order))
    low, high = spread.highest_negative[order], spread.lowest_positive[order]
    width = float(np.clip(120 / max(1, len(order)), 0.5, 6))
    ends = np.minimum(low, high), np.maximum(low, high)
    for chosen, color, label in (
        (low < high, POSITIVE, "gap between its kinds"),
        (low >= high, NEGATIVE, "overlap"),
    ):
        if chosen.any():
            lines = {"color": color, "alpha": 0.4, "linewidth": width, "label": label}
            axes.vlines(x[chosen], ends[0][chosen], ends[1][chosen], **lines)
    size = 20 if len(order) <= 100 else 4
    axes.scatter(x, spread.thresholds[order], size, COLORS[0], zorder=3, label="best per identity")
    axes.axhline(best, label=f"best for all: {best:.3f}", **BEST)
    if learned is not None:
        axes.axhline(learned, label=f"learned b/s: {learned:.3f}", **LEARNED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    return figure


def curves(
    title: str, lines: Mapping[str, tuple[ArrayLike, ArrayLike]], *, log: bool = False
) -> Figure:
    """Values against epochs by name; None and NaN are gaps, points beyond what can be seen means
    of neighbors.
    """
    figure, axes = _panel(title, xlabel="epoch", yscale="log" if log else "linear")
    for i, (name, points) in enumerate(lines.items()):
        x, y = (np.asarray(values, float) for values in points)
        each = -(-len(x) // MOST_POINTS)
        if each > 1:
            starts = np.arange(0, len(x), each)
            sizes = np.diff(np.append(starts, len(x)))
            x, y = (np.add.reduceat(values, starts) / sizes for values in (x, y))
        dots = "." if len(x) < 20 else ""  # a single point would not show
        axes.plot(x, y, marker=dots, color=COLORS[i % len(COLORS)], label=_plain(name))
    if log:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    if len(lines) > 1:
        _legend(figure)
    return figure


def dots(title: str, xlabel: str, rows: Mapping[str, Sequence[float]]) -> Figure:
    """A row per name, the first on top: a dot per seed, and their mean as a bar."""
    figure, axes = _panel(title, 0.9 + 0.21 * len(rows), xlabel=xlabel)
    for i, values in enumerate(rows.values()):
        axes.scatter(values, [i] * len(values), 18, COLORS[0], alpha=0.75, linewidths=0)
        axes.plot([np.mean(values)], [i], "|", color="black", markersize=9)
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure
