"""Figures of reports. Each is returned; :func:`save` and :func:`png` make files and bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from train.evaluation.roc import FARS, Roc
from train.evaluation.thresholds import Spread
from train.evaluation.verification import Bools, Floats
from unitsface_kernels import metrics

POSITIVE, NEGATIVE = "#1b7837", "#762a83"
LINES = ("#7f7f7f", "#bf9000", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")
LEARNED, BEST = {"color": "black"}, {"color": "0.3", "linestyle": ":"}
# More dots side by side cannot be told apart; every n-th identity is drawn.
LARGEST_SPREAD = 2000


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight", format="png")
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A name as it is: between dollars it would be taken for a formula."""
    return name.replace("$", r"\$")


def roc(curves: Mapping[str, Roc], title: str = "People never seen in training") -> Figure:
    """ROC of each method or set, the false accept rate on a log axis."""
    figure = Figure(figsize=(6.4, 4.8))
    axes = figure.subplots()
    floor = 1 / max(curve.negatives for curve in curves.values())
    for i, (name, curve) in enumerate(curves.items()):
        # From the strictest threshold on; a rate of 0 has no place on a log axis.
        far, tar = np.maximum(curve.far[::-1], 1 / curve.negatives), curve.tar[::-1]
        label = f"{_plain(name)} (AUC {curve.auc:.3f})"
        axes.step(far, tar, where="post", color=LINES[i % len(LINES)], label=label)
    for far_line in FARS:
        if far_line >= floor:
            axes.axvline(far_line, color="0.8", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log",
        xlim=(floor, 1),
        ylim=(0, 1.01),
        xlabel="false accept rate",
        ylabel="true accept rate",
        title=title,
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
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
    bins: int = 200,
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


def _two_columns(count: int) -> tuple[Figure, list[Any]]:
    """A figure with axes for ``count`` plots, in two columns where there are several."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(10 if columns > 1 else 6.4, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def histograms(
    counts: Mapping[str, Counts], thresholds: Mapping[str, tuple[float | None, float]]
) -> Figure:
    """Scores of positive and negative pairs, each normalized to its own area.

    ``thresholds`` gives the learned one, if there is one, and the best one of each method.
    """
    figure, grid = _two_columns(len(counts))
    for axes, (name, values) in zip(grid, counts.items(), strict=True):
        for kind, color, label in (
            (values.negatives, NEGATIVE, "different people"),
            (values.positives, POSITIVE, "same person"),
        ):
            density = kind / (max(1, kind.sum()) * np.diff(values.edges))
            axes.stairs(density, values.edges, fill=True, color=color, alpha=0.55, label=label)
        learned, best = thresholds[name]
        axes.axvline(best, label=f"best for these pairs: {best:.2f}", **BEST)
        if learned is not None:
            axes.axvline(learned, label=f"learned b/s: {learned:.2f}", **LEARNED)
        axes.set(title=_plain(name), xlabel="cosine of a pair", ylabel="density")
        axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=8, loc="upper left", ncols=2)
    return figure


def identity_thresholds(spread: Spread, learned: float | None, best: float) -> Figure:
    """A dot per identity at its best threshold, in ascending order, and the unified threshold as a
    line: UniTSFace's figure 1. Behind each dot, ours: from the identity's highest negative cosine
    to its lowest positive one, green where any threshold between them is right for all its pairs.
    """
    order = np.argsort(spread.thresholds, kind="stable")
    order = order[:: -(-len(order) // LARGEST_SPREAD)]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(order))
    low, high = spread.highest_negative[order], spread.lowest_positive[order]
    width = float(np.clip(200 / max(1, len(order)), 0.5, 6))
    for chosen, color, label in (
        (low < high, POSITIVE, "highest negative to lowest positive"),
        (low >= high, NEGATIVE, "the same where they overlap"),
    ):
        if chosen.any():
            axes.vlines(
                x[chosen],
                np.minimum(low, high)[chosen],
                np.maximum(low, high)[chosen],
                color=color,
                alpha=0.3,
                linewidth=width,
                label=label,
            )
    size = 24 if len(order) <= 100 else 5
    axes.scatter(x, spread.thresholds[order], size, "#1f77b4", zorder=3, label="best per identity")
    axes.axhline(best, label=f"best for all: {best:.3f}", **BEST)
    if learned is not None:
        axes.axhline(learned, label=f"learned b/s: {learned:.3f}", **LEARNED)
    axes.set(xlabel="identities, by threshold", ylabel="cosine", title="A threshold per identity")
    axes.grid(alpha=0.25, axis="y")
    axes.legend(fontsize=8)
    return figure


def loss_curves(
    runs: Mapping[str, list[dict[str, Any]]],
    best: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Total loss of each run, and the learned threshold of those that have one.

    ``best`` adds the best threshold of test sets over time: epochs and cosines.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, lines) in enumerate(runs.items()):
        color, shown = LINES[2:][i % 4], _plain(name)
        epochs = [line["epoch"] for line in lines]
        dots = "." if len(lines) < 20 else ""  # a single line would not show
        left.plot(epochs, _floats(lines, "loss"), marker=dots, color=color, label=shown)
        for term, style in (("class_loss", "--"), ("pair_loss", ":")):
            # The pair loss may begin later than the class loss.
            if all(
                any(line.get(t) is not None for line in lines) for t in ("class_loss", "pair_loss")
            ):
                left.plot(
                    epochs,
                    _floats(lines, term),
                    style,
                    color=color,
                    linewidth=0.9,
                    label=f"{shown}: its {term.replace('_', ' ')}",
                )
        if any(line.get("threshold") is not None for line in lines):
            values = _floats(lines, "threshold")
            right.plot(epochs, values, marker=dots, color=color, label=shown)
    for i, (name, (epochs, values)) in enumerate((best or {}).items()):
        color = LINES[::-1][i % len(LINES)]
        right.plot(epochs, values, ".:", color=color, label=f"best on {_plain(name)}")
    left.set(xlabel="epoch", ylabel="training loss", title="Loss", yscale="log")
    right.set(xlabel="epoch", ylabel="b / s (a cosine)", title="Learned unified threshold")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    _finish(left, right)
    return figure


def speed(lines: list[dict[str, Any]]) -> Figure:
    """Learning rate and images per second of one run."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    epochs = [line["epoch"] for line in lines]
    grid = figure.subplots(1, 2)
    for axes, (key, title) in zip(
        grid, (("lr", "Learning rate"), ("images_per_s", "Images per second")), strict=True
    ):
        axes.plot(epochs, _floats(lines, key), color=LINES[2])
        axes.set(xlabel="epoch", title=title)
        axes.set_ylim(bottom=0)
    _finish(*grid)
    return figure


def evaluations(
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
) -> Figure:
    """Figures of test sets in the course of training: epochs and values by figure and set."""
    figure, grid = _two_columns(len(curves))
    for axes, (figure_name, sets) in zip(grid, curves.items(), strict=True):
        for i, (name, (epochs, values)) in enumerate(sets.items()):
            axes.plot(epochs, values, ".-", color=LINES[2:][i % 4], label=_plain(name))
        axes.set(xlabel="epoch", title=_plain(figure_name))
        _finish(axes)
    return figure


def _floats(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Values with gaps where there are none."""
    return [np.nan if line.get(key) is None else line[key] for line in lines]


def _finish(*grid: Axes) -> None:
    for axes in grid:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
